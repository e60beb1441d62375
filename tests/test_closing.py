"""A close does all that it can, and what it could not when it is asked again."""

from __future__ import annotations

import pytest

from triton_offload.transfer.closing import CloseSteps


def steps(failing: dict[str, int]) -> tuple[CloseSteps, list[str]]:
    """Steps a, b and c, of which some fail so many times; what was tried."""
    tried: list[str] = []

    def step(name: str):
        def do() -> None:
            tried.append(name)
            if failing.get(name, 0) > 0:
                failing[name] -= 1
                raise RuntimeError(f"{name} failed")

        return do

    return CloseSteps(*(step(name) for name in "abc")), tried


def test_steps_are_done_in_order_and_once():
    closing, tried = steps({})
    closing.run()
    closing.run()
    assert tried == ["a", "b", "c"]


def test_a_step_that_fails_keeps_none_from_being_done_and_is_done_again():
    closing, tried = steps({"b": 2})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="b failed"):
            closing.run()
    assert tried == ["a", "b", "c", "b"]
    closing.run()
    closing.run()
    assert tried == ["a", "b", "c", "b", "b"]


def test_of_several_failures_the_last_is_raised_and_the_others_are_with_it():
    closing, tried = steps({"a": 1, "c": 1})
    with pytest.raises(RuntimeError, match="c failed") as raised:
        closing.run()
    assert str(raised.value.__context__) == "a failed"
    closing.run()
    assert tried == ["a", "b", "c", "a", "c"]
