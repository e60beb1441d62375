"""Keys by their last use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from heapq import heappop, heappush
from itertools import count, repeat
from typing import TypeAlias

Key: TypeAlias = bytes  # what is in use; nothing here needs more than a hashable


def pop_oldest(keys: OrderedDict[Key, None], number: int) -> list[Key]:
    """Takes the first `number` keys, none if that is negative."""
    return [key for key, _ in map(keys.popitem, repeat(False, number))]


class Order:
    """Keys, least recent first, of which the first that may go is always at hand.

    `keys` has all but those set aside: what an eviction met and had to leave, since a transfer
    used it (or the call that evicts names it), is older than all of `keys`. It is kept with its
    place, so that no eviction has to pass it again, and is looked at before `keys` from its
    `release` on.
    """

    def __init__(self) -> None:
        self.keys: OrderedDict[Key, None] = OrderedDict()  # a plain dict's head is not O(1)
        self._busy: dict[Key, int] = {}  # set aside: its place
        self._idle: dict[Key, int] = {}  # set aside, and released since
        self._queue: list[tuple[int, Key]] = []  # a heap of all in _idle, and of some that were
        self._places = count()

    def __len__(self) -> int:
        return len(self.keys) + len(self._busy) + len(self._idle)

    def __iter__(self) -> Iterator[Key]:
        aside = self._busy | self._idle
        return iter([*sorted(aside, key=aside.__getitem__), *self.keys])

    def take(
        self, number: int, protected: AbstractSet[Key], busy: Sequence[AbstractSet[Key]]
    ) -> list[Key]:
        """Removes and returns the `number` least recent keys that are neither in `protected` nor
        in one of `busy`, or all there are. The others keep their places."""
        order = self.keys
        taken: list[Key] = []
        if not self._idle:
            taken = pop_oldest(order, min(number, len(order)))
            if protected.isdisjoint(taken) and all(keys.isdisjoint(taken) for keys in busy):
                return taken
            for key in reversed(taken):  # one by one, then
                order[key] = None
                order.move_to_end(key, last=False)
            taken = []
        spared: list[tuple[int, Key]] = []
        while len(taken) < number and (self._queue or order):
            if self._queue:
                place, key = heappop(self._queue)
                if self._idle.get(key) != place:
                    continue  # it was used since
                del self._idle[key]
            else:
                key, _ = order.popitem(last=False)
                place = next(self._places)
            for keys in busy:
                if key in keys:
                    self._busy[key] = place
                    break
            else:
                if key in protected:
                    spared.append((place, key))
                else:
                    taken.append(key)
        for place, key in spared:
            self._set_idle(key, place)
        return taken

    def release(self, keys: Sequence[Key]) -> None:
        """Tells that keys are busy no more."""
        if self._busy:
            for key in keys:
                if (place := self._busy.pop(key, None)) is not None:
                    self._set_idle(key, place)

    def recall(self, keys: Sequence[Key]) -> None:
        """Puts those that were set aside back into `keys`, where the caller moves them on."""
        if self._busy or self._idle:
            for key in keys:
                for aside in (self._busy, self._idle):
                    if aside.pop(key, None) is not None:
                        self.keys[key] = None

    def clear(self) -> None:
        for keys in (self.keys, self._busy, self._idle, self._queue):
            keys.clear()

    def _set_idle(self, key: Key, place: int) -> None:
        self._idle[key] = place
        heappush(self._queue, (place, key))

    def _check(self, busy: AbstractSet[Key]) -> None:
        """Asserts that what is set aside is there once, and waits for a release."""
        listed = [*self.keys, *self._busy, *self._idle]
        assert len(listed) == len(set(listed)) == len(self)
        assert self._busy.keys() <= busy, "an idle key would never be evicted"
        assert set(self._queue) >= {(place, key) for key, place in self._idle.items()}
