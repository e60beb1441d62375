"""Threads of ours, none of which is under way any more when the interpreter goes.

As it goes, it stops daemon threads wherever they are. One that is inside torch takes the process
down then ("terminate called without an active exception"), and its exit status with it. So before,
at exit, each is told to stop after the operation that it is in, and waited for. (Other threads than
daemons would be waited for earlier, when nobody has told them yet.)
"""

from __future__ import annotations

import atexit
import inspect
import os
import threading
from collections.abc import Callable
from weakref import WeakMethod

_running: set[OwnThread] = set()


class OwnThread(threading.Thread):
    """Runs `work` from its making on. `tell` makes that return soon; it is called from any thread,
    more than once, and at exit."""

    def __init__(self, name: str, work: Callable[[], None], tell: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._work: Callable[[], None] | None = work
        self.tell = tell
        _running.add(self)
        try:
            self.start()
        except BaseException:
            _running.discard(self)
            raise

    def run(self) -> None:
        try:
            assert self._work is not None
            self._work()
        finally:
            self._work = None
            _running.discard(self)

    def wait(self) -> None:
        """Until it has ended; on the thread itself, not at all."""
        if self is not threading.current_thread():
            self.join()


def on_own_thread() -> bool:
    return isinstance(threading.current_thread(), OwnThread)


def weakly(
    step: Callable[[], float | None], gone: Callable[[], None]
) -> Callable[[], Callable[[], float | None] | None]:
    """What gives `step` as long as it can be called: a bound method, as long as its object lives,
    and `gone` is called when that ends (on any thread, by the garbage collector)."""
    if inspect.ismethod(step):
        return WeakMethod(step, lambda _: gone())
    return lambda: step


@atexit.register
def _end_all() -> None:
    threads = list(_running)
    for thread in threads:
        thread.tell()
    for thread in threads:
        thread.join()


os.register_at_fork(after_in_child=_running.clear)  # they are the parent's alone
