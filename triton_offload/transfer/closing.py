"""Closing what may fail to close."""

from __future__ import annotations

from collections.abc import Callable


class CloseSteps:
    """What is to be done at a close. A step that raised is done again by the next call."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._steps = list(steps)

    def run(self) -> None:
        """Do all that is left, whatever one of them raises; what the last one raised is raised
        then, with the others as its context."""
        self._do(tuple(self._steps))

    def _do(self, steps: tuple[Callable[[], object], ...]) -> None:
        if steps:
            try:
                steps[0]()
                self._steps.remove(steps[0])
            finally:
                self._do(steps[1:])
