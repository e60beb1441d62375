"""Slots that a reset dropped while transfers used them."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from triton_offload.scheduler.orphans import Orphans
from triton_offload.specs import Direction

A, B = b"a", b"b"
STORE, LOAD = Direction.STORE, Direction.LOAD


def test_a_slot_is_free_when_its_last_transfer_in_either_direction_has_ended() -> None:
    orphans = Orphans()
    orphans.add(A, 7, num_stores=1, num_loads=2)
    assert (len(orphans), orphans.slots) == (1, {7})
    assert orphans.complete([A], LOAD) == []
    assert orphans.complete([A], STORE) == []
    assert orphans.complete([A], STORE) == []  # means no orphan
    orphans._check()
    assert orphans.complete([A, A], LOAD) == [7]
    orphans._check()
    assert (len(orphans), orphans.slots) == (0, frozenset())


def test_a_completion_means_the_oldest_orphan_that_has_a_transfer_in_its_direction() -> None:
    orphans = Orphans()
    orphans.add(A, 1, num_stores=1, num_loads=0)
    orphans.add(A, 2, num_stores=1, num_loads=1)
    orphans.add(A, 3, num_stores=0, num_loads=1)
    orphans._check()
    assert orphans.complete([A], LOAD) == []  # that of slot 2
    assert orphans.complete([A], LOAD) == [3]
    assert orphans.complete([A], STORE) == [1]
    assert orphans.complete([B, A, A], STORE) == [2]


def test_what_means_no_orphan_is_left_over() -> None:
    orphans = Orphans()
    orphans.add(A, 1, num_stores=1, num_loads=2)
    assert orphans.without([A, B, A, A], LOAD) == [B, A]
    assert orphans.without([B, A], STORE) == [B]
    assert orphans._pins(LOAD) == Counter({A: 2})
    assert orphans._pins(STORE) == Counter({A: 1})
    assert orphans.complete([A, B, A, A], LOAD) == []
    assert orphans._pins(LOAD) == Counter()


class Listed:
    """The same with a plain list."""

    def __init__(self) -> None:
        self.orphans: list[tuple[bytes, int, Counter[Direction]]] = []

    def complete(self, keys: list[bytes], direction: Direction) -> list[int]:
        freed = []
        for key in keys:
            for name, slot, left in self.orphans:
                if name == key and left[direction]:
                    left[direction] -= 1
                    if not left.total():
                        freed.append(slot)
                    break
        self.orphans = [orphan for orphan in self.orphans if orphan[2].total()]
        return freed


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from([A, B]), st.integers(0, 1), st.integers(0, 3)),
            st.tuples(st.lists(st.sampled_from([A, B]), max_size=4), st.sampled_from(Direction)),
        ),
        max_size=30,
    )
)
def test_any_order_of_resets_and_completions(calls: list[tuple[object, ...]]) -> None:
    orphans, listed = Orphans(), Listed()
    for slot, call in enumerate(calls):
        if len(call) == 3:
            key, stores, loads = call
            if stores or loads:
                orphans.add(key, slot, stores, loads)
                listed.orphans.append((key, slot, Counter({STORE: stores, LOAD: loads})))
        else:
            keys, direction = call
            there = {
                key: sum(left[direction] for name, _, left in listed.orphans if name == key)
                for key in (A, B)
            }
            rest = [key for i, key in enumerate(keys) if keys[: i + 1].count(key) > there[key]]
            assert orphans.without(keys, direction) == rest
            assert orphans.complete(keys, direction) == listed.complete(keys, direction)
        orphans._check()
        assert orphans.slots == {slot for _, slot, _ in listed.orphans}
        for direction in Direction:
            pins: Counter[bytes] = Counter()
            for key, _, left in listed.orphans:
                pins[key] += left[direction]
            assert orphans._pins(direction) == +pins
