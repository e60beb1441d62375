"""Faults that a test injects into the simulated device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from triton_offload.testing.schedule import Operation


class InjectedError(RuntimeError):
    """Raised where a test asked for it."""


@dataclass(slots=True)
class _Fault:
    """On the `nth` match from now on, `times` in a row."""

    what: str
    nth: int
    times: int
    error: BaseException

    def strikes(self, what: str) -> bool:
        if what != self.what or self.times == 0:
            return False
        self.nth -= 1
        if self.nth > 0:
            return False
        self.times -= 1
        return True


class Faults:
    """What goes wrong, and when.

    `in_call`: a call of the seam raises, and nothing is queued. `in_run`: an operation of that
    kind fails when it runs; with `sticky`, as an illegal access does, the device is lost.
    `never_ends`: an operation of that kind never completes. `nth` counts from now.
    """

    def __init__(self) -> None:
        self._calls: list[_Fault] = []
        self._runs: list[tuple[_Fault, bool]] = []
        self._hangs: list[_Fault] = []

    def in_call(
        self, call: str, nth: int = 1, *, times: int = 1, error: BaseException | None = None
    ) -> None:
        error = error or InjectedError(f"injected: {call} raised")
        self._calls.append(_Fault(call, nth, times, error))

    def in_run(
        self,
        kind: str,
        nth: int = 1,
        *,
        times: int = 1,
        sticky: bool = False,
        error: BaseException | None = None,
    ) -> None:
        error = error or InjectedError(f"injected: {kind} failed")
        self._runs.append((_Fault(kind, nth, times, error), sticky))

    def never_ends(self, kind: str, nth: int = 1) -> None:
        self._hangs.append(_Fault(kind, nth, 1, InjectedError(kind)))

    def clear(self) -> None:
        """No more of them."""
        self._calls.clear()
        self._runs.clear()
        self._hangs.clear()

    # -- for the simulation --

    @property
    def armed(self) -> bool:
        return bool(self._calls or self._runs or self._hangs)

    def call(self, call: str) -> None:
        for fault in self._calls:
            if fault.strikes(call):
                raise fault.error

    def arm(self, operation: Operation, lose: Callable[[BaseException], None]) -> None:
        """Let the operation fail, or never end, where it is its turn."""
        if any(fault.strikes(operation.kind) for fault in self._hangs):
            operation.hangs = True
        for fault, sticky in self._runs:
            if fault.strikes(operation.kind):
                operation.run = _failing(fault.error, lose if sticky else None)


def _failing(
    error: BaseException, lose: Callable[[BaseException], None] | None
) -> Callable[[], None]:
    def run() -> None:
        if lose is not None:
            lose(error)
        raise error

    return run
