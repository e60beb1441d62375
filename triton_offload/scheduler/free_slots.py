"""Which slot of the host pool is given out next."""

from __future__ import annotations

from collections.abc import Collection, Iterable


class FreeSlots:
    """The free slots of a pool. They leave in ascending order, so that adjacent ones go together.

    What one call freed is what the next call takes, and chunks that were stored together are
    evicted together: sorted, their slots are adjacent again.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._unused = 0  # this one and all above have not been handed out since the last reset
        self._returned: list[int] = []

    def __len__(self) -> int:
        return self._count - self._unused + len(self._returned)

    def put(self, slots: Iterable[int]) -> None:
        """Takes slots back."""
        self._returned.extend(slots)

    def take(self, count: int) -> list[int]:
        """`count` slots; the caller has made sure that there are as many."""
        start = self._unused
        self._unused = min(start + count, self._count)
        slots = list(range(start, self._unused))
        rest = count - len(slots)
        if rest:
            slots += self._returned[-rest:]
            del self._returned[-rest:]
            slots.sort()
        return slots

    def reset(self) -> None:
        """Frees all."""
        self._unused = 0
        self._returned.clear()

    def _check(self, used: Collection[int]) -> None:
        """Asserts that each slot is either free or one of `used`, once."""
        free = [*self._returned, *range(self._unused, self._count)]
        assert len(free) == len(self)
        assert sorted([*free, *used]) == list(range(self._count)), "a slot is lost or doubled"
