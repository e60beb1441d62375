"""Slots that are still in use although their keys are gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from triton_offload.scheduler.policies import Key
from triton_offload.specs import Direction


class Orphans:
    """Slots whose keys a reset dropped while transfers used them, until these have ended.

    A completion names its key only. It means the oldest orphan of that key which still has a
    transfer in that direction and, where there is none, no orphan.
    """

    def __init__(self) -> None:
        self._of: dict[Key, list[tuple[int, Counter[Direction]]]] = {}  # oldest first
        self._slots: set[int] = set()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def slots(self) -> frozenset[int]:
        """The slots that can't be given out yet."""
        return frozenset(self._slots)

    def add(self, key: Key, slot: int, num_stores: int, num_loads: int) -> None:
        """Takes over a slot; its newer ones follow in the order of their resets."""
        left = Counter({Direction.STORE: num_stores, Direction.LOAD: num_loads})
        self._of.setdefault(key, []).append((slot, left))
        self._slots.add(slot)

    def without(self, keys: Sequence[Key], direction: Direction) -> list[Key]:
        """Those of `keys` whose completion means no orphan."""
        seen: Counter[Key] = Counter()
        rest = []
        for key in keys:
            seen[key] += 1
            if seen[key] > sum(left[direction] for _, left in self._of.get(key, ())):
                rest.append(key)
        return rest

    def complete(self, keys: Sequence[Key], direction: Direction) -> list[int]:
        """Ends a transfer for each key that means an orphan; returns the slots that are free."""
        freed = []
        for key in keys:
            for orphan in (orphans := self._of.get(key, [])):
                slot, left = orphan
                if left[direction]:
                    left[direction] -= 1
                    if not left.total():
                        orphans.remove(orphan)
                        freed.append(slot)
                    break
            if not orphans:
                self._of.pop(key, None)
        self._slots.difference_update(freed)
        return freed

    def _pins(self, direction: Direction) -> Counter[Key]:
        """How many transfers in that direction hold each key."""
        pins: Counter[Key] = Counter()
        for key, orphans in self._of.items():
            pins[key] += sum(left[direction] for _, left in orphans)
        return pins

    def _check(self) -> None:
        """Asserts that each slot is here once, and because of a transfer."""
        listed = [slot for orphans in self._of.values() for slot, _ in orphans]
        assert sorted(listed) == sorted(self._slots)
        assert all(self._of.values())
        for orphans in self._of.values():
            assert all(left.total() and min(left.values()) >= 0 for _, left in orphans)
