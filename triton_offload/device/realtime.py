"""The host's own steps on a real machine: its clock, and threads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue

from triton_offload.device.threads import OwnThread, weakly


class RealTime:
    """The part of the seam (`base.Device`) that real devices share."""

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def enter_thread(self) -> None:
        """Called first on each thread of ours."""

    def background(
        self,
        name: str,
        step: Callable[[], float | None],
        orphaned: Callable[[], None] | None = None,
    ) -> BackgroundThread:
        return BackgroundThread(name, step, orphaned, self.enter_thread)


class _Signals:
    """What the thread waits for. All may be called by a finalizer, in the midst of anything: of
    what wakes threads, only a SimpleQueue allows that."""

    def __init__(self) -> None:
        self._signals: SimpleQueue[bool] = SimpleQueue()  # whether it is about the end
        self.woken = False
        self.stopped = False

    def wake(self) -> None:
        if not self.woken:  # else the step that follows has not begun
            self.woken = True
            self._signals.put(False)

    def stop(self) -> None:
        self.stopped = True
        self.look()

    def look(self) -> None:
        self._signals.put(True)

    def wait(self) -> None:
        self._signals.get()

    def sleep(self, seconds: float) -> None:
        """Without a break but for the end."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                if self._signals.get(timeout=left):
                    return
            except Empty:
                return


class BackgroundThread:
    """See `base.Background`."""

    def __init__(
        self,
        name: str,
        step: Callable[[], float | None],
        orphaned: Callable[[], None] | None = None,
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        self._signals = _Signals()
        step_of = weakly(step, self._signals.look)
        work = partial(_run, step_of, self._signals, orphaned, enter)
        self._thread = OwnThread(name, work, self._signals.stop)

    def wake(self) -> None:
        self._signals.wake()

    def stop(self) -> None:
        self._signals.stop()
        self._thread.wait()


def _run(
    step_of: Callable[[], Callable[[], float | None] | None],
    signals: _Signals,
    orphaned: Callable[[], None] | None,
    enter: Callable[[], None],
) -> None:
    with suppress(Exception):  # what the steps do then, they find out themselves
        enter()
    while not signals.stopped:
        signals.woken = False  # before the step, which sees what woke it
        step = step_of()
        if step is None:
            if orphaned is not None:
                orphaned()
            return
        seconds = step()
        del step  # while this waits, it holds nothing of the step's object
        if seconds is None:
            signals.wait()
        elif seconds == math.inf:
            return
        else:
            signals.sleep(seconds)
