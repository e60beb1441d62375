"""The host's own steps on a real machine: its clock, and threads."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable


class RealTime:
    """The part of the seam (`base.Device`) that real devices share."""

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def background(self, name: str, step: Callable[[], float | None]) -> BackgroundThread:
        return BackgroundThread(name, step)


class BackgroundThread:
    """See `base.Background`."""

    def __init__(self, name: str, step: Callable[[], float | None]) -> None:
        self._step = step
        self._woken = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._woken.set()

    def stop(self) -> None:
        self._stopped.set()
        self._woken.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._woken.clear()
            if self._stopped.is_set():  # `stop` set both just before the `clear`
                return
            seconds = self._step()
            if seconds is None:
                self._woken.wait()
            elif seconds == math.inf:
                return
            else:
                self._stopped.wait(seconds)
