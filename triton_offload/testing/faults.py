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
    times: float
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
    `flip_bit`: a copy of that kind ("copy") lands with one bit flipped, which one by the seed.
    `never_ends`: an operation of that kind never completes. `refuse`: host memory is not pinned,
    and nothing raised. `nth` counts from now; `times` may be `math.inf`. `num_struck` counts what
    went wrong so far.
    """

    def __init__(self) -> None:
        self.num_struck = 0
        self.hung: list[Operation] = []  # never end
        self._refusals: list[_Fault] = []
        self._calls: list[_Fault] = []
        self._runs: list[tuple[_Fault, bool]] = []
        self._hangs: list[_Fault] = []
        self._flips: list[_Fault] = []
        self.armed = False

    def in_call(
        self, call: str, nth: int = 1, *, times: float = 1, error: BaseException | None = None
    ) -> None:
        error = error or InjectedError(f"injected: {call} raised")
        self.armed = True
        self._calls.append(_Fault(call, nth, times, error))

    def in_run(
        self,
        kind: str,
        nth: int = 1,
        *,
        times: float = 1,
        sticky: bool = False,
        error: BaseException | None = None,
    ) -> None:
        error = error or InjectedError(f"injected: {kind} failed")
        self.armed = True
        self._runs.append((_Fault(kind, nth, times, error), sticky))

    def flip_bit(self, kind: str, nth: int = 1, *, times: float = 1) -> None:
        self.armed = True
        self._flips.append(_Fault(kind, nth, times, InjectedError("flipped")))

    def never_ends(self, kind: str, nth: int = 1) -> None:
        self.armed = True
        self._hangs.append(_Fault(kind, nth, 1, InjectedError(kind)))

    def refuse(self, nth: int = 1, *, times: float = 1) -> None:
        self.armed = True
        self._refusals.append(_Fault("register", nth, times, InjectedError("refused")))

    def clear(self) -> None:
        """No more of them."""
        self.armed = False
        self._refusals.clear()
        self._calls.clear()
        self._runs.clear()
        self._hangs.clear()
        self._flips.clear()

    # -- for the simulation --

    def call(self, call: str) -> None:
        for fault in self._calls:
            if fault.strikes(call):
                self.num_struck += 1
                raise fault.error

    def refuses(self) -> bool:
        """Whether memory is not to be pinned this time."""
        refused = any(fault.strikes("register") for fault in self._refusals)
        self.num_struck += refused
        return refused

    def arm(self, operation: Operation, lose: Callable[[BaseException], None]) -> None:
        """Let the operation fail, or never end, where it is its turn."""
        if any(fault.strikes(operation.kind) for fault in self._hangs):
            operation.hangs = True
            self.hung.append(operation)
            self.num_struck += 1
        if operation.flip is not None and any(f.strikes(operation.kind) for f in self._flips):
            self.num_struck += 1
            operation.run = _both(operation.run, operation.flip)
        for fault, sticky in self._runs:
            if fault.strikes(operation.kind):
                self.num_struck += 1
                operation.run = _failing(fault.error, lose if sticky else None)


def _both(run: Callable[[], object] | None, flip: Callable[[], object]) -> Callable[[], None]:
    def run_and_flip() -> None:
        if run is not None:
            run()
        flip()

    return run_and_flip


def _failing(
    error: BaseException, lose: Callable[[BaseException], None] | None
) -> Callable[[], None]:
    def run() -> None:
        if lose is not None:
            lose(error)
        raise error

    return run
