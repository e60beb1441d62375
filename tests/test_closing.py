"""Steps that are all run, whatever one of them raises, and tried again where one did."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest

from triton_offload.closing import Closing


class Steps:
    """Three steps of which some fail a number of times."""

    def __init__(self, **failures: int) -> None:
        self.failures = dict(failures)
        self.ran: list[str] = []
        self.closing = Closing()
        for name in "abc":
            self.closing.callback(self.step, name)

    def step(self, name: str) -> None:
        self.ran.append(name)
        if self.failures.get(name, 0) > 0:
            self.failures[name] -= 1
            raise OSError(f"injected: {name}")


def test_steps_run_once_and_the_last_first():
    steps = Steps()
    steps.closing.close()
    assert steps.ran == ["c", "b", "a"]
    steps.closing.close()
    assert steps.ran == ["c", "b", "a"]


@pytest.mark.parametrize(
    "failing",
    [names for n in (1, 2, 3) for names in itertools.combinations("abc", n)],
    ids="".join,
)
def test_what_raised_is_raised_when_all_ran_and_is_tried_again_in_order(failing):
    steps = Steps(**dict.fromkeys(failing, 2))
    for _ in range(2):
        with pytest.raises(OSError, match=f"injected: {failing[0]}"):  # the last that failed
            steps.closing.close()
    again = sorted(failing, reverse=True)
    assert steps.ran == ["c", "b", "a", *again]
    steps.closing.close()
    assert steps.ran == ["c", "b", "a", *again, *again]
    steps.closing.close()
    assert len(steps.ran) == 3 + 2 * len(again)


def test_an_interrupt_is_no_reason_to_leave_the_rest_nor_to_forget_the_step():
    ran = []

    def interrupt():
        raise KeyboardInterrupt

    closing = Closing()
    closing.callback(ran.append, 1)
    closing.callback(interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            closing.close()
    assert ran == [1]


def test_while_a_step_runs_nothing_holds_what_the_steps_before_it_freed():
    class Memory:
        def free(self):
            return

    memory = Memory()
    alive = weakref.ref(memory)
    seen = []
    closing = Closing()
    closing.callback(lambda: seen.append(alive()))
    closing.callback(memory.free)
    del memory
    gc.disable()
    try:
        closing.close()
    finally:
        gc.enable()
    assert seen == [None]
