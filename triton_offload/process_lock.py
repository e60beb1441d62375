"""A lock that a forked child meets with an error, and not for ever."""

from __future__ import annotations

import os
import threading
from types import TracebackType


class ProcessLock:
    """A reentrant lock of the process that made it.

    A child after `fork` has none of the threads that move the bytes, and one of them may have held
    the lock at that moment. There, entering raises RuntimeError.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pid = os.getpid()
        self._lock = threading.RLock()

    @property
    def foreign(self) -> bool:
        """Whether this is another process than the lock's."""
        return os.getpid() != self._pid

    def __enter__(self) -> None:
        if self.foreign:
            raise RuntimeError(
                f"{self._name}: expected use by process {self._pid} that made it, got a call in "
                f"its fork {os.getpid()}, which has none of its threads; make one there"
            )
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()
