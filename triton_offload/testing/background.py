"""The host's side of a simulation: functions that a real machine calls on threads."""

from __future__ import annotations

import math
from collections.abc import Callable

from triton_offload.device.threads import weakly


class Background:
    """See `device.base.Background`. The scheduler calls it, where the host blocks or sleeps; once
    the step's object is gone, no more."""

    def __init__(
        self, name: str, step: Callable[[], float | None], now: float, tasks: list[Background]
    ) -> None:
        self.name = name
        self.at: float = now  # not before this virtual time
        self._step_of = weakly(step, lambda: None)
        self._tasks = tasks
        tasks.append(self)
        self._sleeps = False
        self._runs = False

    @property
    def due(self) -> bool:
        """Whether it may be called now (by whoever does not look at the time)."""
        return not self._sleeps and not self._runs

    def wake(self) -> None:
        self._sleeps = False

    def stop(self) -> None:
        if self in self._tasks:
            self._tasks.remove(self)

    def run(self, now: Callable[[], float]) -> None:
        step = self._step_of()
        if step is None:
            self.stop()
            return
        self._runs = True
        self._sleeps = True  # unless it is woken while it runs
        try:
            seconds = step()
        finally:
            self._runs = False
        if seconds == math.inf:
            self.stop()
        elif seconds is not None:
            self._sleeps = False
            self.at = now() + seconds
        else:
            self.at = now()

    def __str__(self) -> str:
        return self.name
