"""A lock that a forked child meets with an error, and not for ever."""

from __future__ import annotations

import os
import threading
from types import TracebackType

_forks = 0  # between the program's start and this process


def fork_number() -> int:
    """Another in every child after `fork` than in its parent; `os.getpid` takes three times as
    long."""
    return _forks


def _forked() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_forked)


class ProcessLock:
    """A reentrant lock of the process that made it.

    A child after `fork` has none of the threads that move the bytes, and one of them may have held
    the lock at that moment. There, entering raises RuntimeError.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pid = os.getpid()
        self._forks = _forks
        self._lock = threading.RLock()
        self._acquire, self._release = self._lock.acquire, self._lock.release

    @property
    def foreign(self) -> bool:
        """Whether this is another process than the lock's."""
        return self._forks != _forks

    def __enter__(self) -> None:
        if self._forks != _forks:
            raise RuntimeError(
                f"{self._name}: expected use by process {self._pid} that made it, got a call in "
                f"its fork {os.getpid()}, which has none of its threads; make one there"
            )
        self._acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._release()
