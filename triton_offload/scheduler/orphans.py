"""Slots that are still in use although their keys are gone."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from triton_offload.scheduler.order import Key
from triton_offload.specs import Direction


class Orphans:
    """Slots whose keys a reset dropped while transfers used them, until these have ended.

    A completion that names its slot means the orphan there. One that names its key only means the
    oldest orphan of that key which still has a transfer in that direction and, where there is none,
    no orphan. Every method but `_check` is O(1) per transfer, however many orphans a key has, for a
    key that is named alone.
    """

    def __init__(self) -> None:
        # By direction and key: the slot of each transfer under way, the oldest orphan's first.
        self._slots_of: dict[Direction, dict[Key, deque[int]]] = {each: {} for each in Direction}
        self._num_left: dict[int, int] = {}  # by slot: its transfers under way

    def __len__(self) -> int:
        return len(self._num_left)

    @property
    def slots(self) -> frozenset[int]:
        """The slots that can't be given out yet."""
        return frozenset(self._num_left)

    def add(self, key: Key, slot: int, num_stores: int, num_loads: int) -> None:
        """Takes over a slot; its newer ones follow in the order of their resets."""
        for direction, count in ((Direction.STORE, num_stores), (Direction.LOAD, num_loads)):
            if count:
                self._slots_of[direction].setdefault(key, deque()).extend([slot] * count)
        self._num_left[slot] = num_stores + num_loads

    def without(
        self, keys: Sequence[Key], direction: Direction, slots: Sequence[int] | None = None
    ) -> list[Key]:
        """Those of `keys` whose completion means no orphan."""
        if slots is not None:
            pairs = zip(keys, slots, strict=True)
            return [key for key, slot in pairs if slot not in self._num_left]
        slots_of = self._slots_of[direction]
        seen: Counter[Key] = Counter()
        rest = []
        for key in keys:
            seen[key] += 1
            if seen[key] > len(slots_of.get(key, ())):
                rest.append(key)
        return rest

    def complete(
        self, keys: Sequence[Key], direction: Direction, slots: Sequence[int] | None = None
    ) -> list[int]:
        """Ends a transfer for each key that means an orphan; returns the slots that are free."""
        slots_of = self._slots_of[direction]
        freed = []
        for i, key in enumerate(keys):
            if (under_way := slots_of.get(key)) is None:
                continue
            if slots is None:
                slot = under_way.popleft()
            elif (slot := slots[i]) in self._num_left:
                under_way.remove(slot)
            else:
                continue
            if not under_way:
                del slots_of[key]
            self._num_left[slot] -= 1
            if not self._num_left[slot]:
                del self._num_left[slot]
                freed.append(slot)
        return freed

    def _pins(self, direction: Direction) -> Counter[Key]:
        """How many transfers in that direction hold each key."""
        return Counter({key: len(slots) for key, slots in self._slots_of[direction].items()})

    def _check(self) -> None:
        """Asserts that each slot is here because of a transfer, and each transfer once."""
        under_way: Counter[int] = Counter()
        for slots_of in self._slots_of.values():
            assert all(slots_of.values())
            for slots in slots_of.values():
                under_way.update(slots)
        assert under_way == self._num_left
