"""Closing what may fail to close."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack


class CloseSteps:
    """What is to be done at a close. A step that raised is done again by the next call."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._steps = list(steps)

    def run(self) -> None:
        """Do all that is left, whatever one of them raises; what the last one raised is raised
        then, with the others as its context."""
        with ExitStack() as rest:
            for step in reversed(self._steps):
                rest.callback(self._do, step)

    def _do(self, step: Callable[[], object]) -> None:
        step()
        self._steps.remove(step)
