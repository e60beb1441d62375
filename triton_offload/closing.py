"""What must be closed, all of it, whatever one of the steps raises."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial


class Closing:
    """Steps that `close` runs, the last first. One thread at a time.

    Unlike an `ExitStack`'s, a step that raised stays, and the next `close` tries it again.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def callback(self, step: Callable[..., object], *arguments: object) -> None:
        """Let `close` call `step(*arguments)`."""
        self._steps.append(partial(step, *arguments))

    def close(self) -> None:
        """Run every step that has not ended well yet. What steps raised is raised when all ran."""
        with ExitStack() as rest:
            while (
                self._steps
            ):  # no name here holds a step, nor what it would free, while others run
                rest.callback(self._run, self._steps.pop(0))

    def _run(self, step: Callable[[], object]) -> None:
        try:
            step()
        except BaseException:
            self._steps.insert(0, step)
            raise
