"""Which chunk leaves the host pool when another needs its place (LRU and ARC), and which slot.

An eviction policy knows keys only, and only those whose bytes are there: a chunk is admitted when
its store has landed, so a store that failed never leaves a trace here. What is being read or
written is held, which takes it out of the eviction order: an eviction takes the head of an order
and never searches, however many chunks are in use.

Keys come in the order of their prefix. A chunk is of no use once a chunk before it is gone, so
every method that makes several keys the most recent does it from the last to the first: the
leading one ends up as the most recent of them and outlives the rest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import repeat
from math import ceil
from typing import Protocol, TypeAlias

Key: TypeAlias = bytes  # what is in use; nothing here needs more than a hashable
_Order: TypeAlias = OrderedDict[Key, None]  # least recent first; a plain dict's head is not O(1)


class EvictionPolicy(Protocol):
    """An eviction order over the keys of one pool. Each method is O(1) a key.

    The caller keeps the preconditions (`admit` of unknown keys, `hold` of known keys that are not
    held, `release` of held ones); breaking them is a KeyError or leaves the order undefined.
    """

    def admit(self, keys: Sequence[Key]) -> None:
        """Takes in keys whose first store has landed; they can be evicted from now on."""

    def touch(self, keys: Sequence[Key]) -> None:
        """Counts a use of each key. Keys that aren't known are ignored, held ones are not."""

    def hold(self, keys: Sequence[Key]) -> None:
        """Takes keys out of the eviction order."""

    def release(self, keys: Sequence[Key]) -> None:
        """Puts held keys back as the most recent ones; that alone is not a use."""

    def evict(self, count: int, protected: AbstractSet[Key]) -> list[Key]:
        """Removes and returns `count` keys that are neither held nor in `protected`.

        The caller has made sure that there are as many. `protected` keys keep their places; each
        costs at most one step.
        """

    def clear(self) -> None:
        """Forgets every key and all that was learnt."""

    def _check(self, free: Collection[Key], held: Collection[Key]) -> None:
        """Asserts that exactly these keys are in the eviction order and held, and more."""


class LRUPolicy:
    """Evicts what was used least recently."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._order: _Order = OrderedDict()
        self._held: set[Key] = set()

    def admit(self, keys: Sequence[Key]) -> None:
        order = self._order
        for key in reversed(keys):
            order[key] = None

    def touch(self, keys: Sequence[Key]) -> None:
        # A held key needs nothing: it becomes the most recent one when it is released.
        order = self._order
        for key in reversed(keys):
            if key in order:
                order.move_to_end(key)

    def hold(self, keys: Sequence[Key]) -> None:
        order = self._order
        for key in keys:
            del order[key]
        self._held.update(keys)

    def release(self, keys: Sequence[Key]) -> None:
        self._held.difference_update(keys)
        self.admit(keys)

    def evict(self, count: int, protected: AbstractSet[Key]) -> list[Key]:
        return _pop_oldest(self._order, count, protected)

    def clear(self) -> None:
        self._order.clear()
        self._held.clear()

    def _check(self, free: Collection[Key], held: Collection[Key]) -> None:
        assert len(free) == len(self._order)
        assert all(key in self._order for key in free)
        assert self._held == set(held)
        assert len(self._order) + len(self._held) <= self._capacity


class ARCPolicy:
    """Adaptive replacement (Megiddo and Modha, FAST 2003), in chunks.

    `recent` (T1) holds what was used once, `frequent` (T2) what was used again; each has a ghost
    list (B1, B2) of keys that were evicted from it. A store of a ghost tells which of the two was
    cut too short, and moves the target size of `recent` that way.

    Two things differ from the paper, which knows no transfers. What a ghost teaches counts when
    its store lands, after the eviction that made room for it (and so without the paper's tie rule
    for that eviction). Held keys count for the sizes of their lists, but can't be evicted: where
    one list has nothing left to give, the other one gives.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._recent: _Order = OrderedDict()
        self._frequent: _Order = OrderedDict()
        self._ghost_recent: _Order = OrderedDict()
        self._ghost_frequent: _Order = OrderedDict()
        self._held: dict[Key, bool] = {}  # True: belongs to frequent
        self._num_held_recent = 0
        self._target = 0.0  # of the size of recent, 0 to capacity

    def admit(self, keys: Sequence[Key]) -> None:
        recent, frequent = self._recent, self._frequent
        ghost_recent, ghost_frequent = self._ghost_recent, self._ghost_frequent
        for key in reversed(keys):
            if key in ghost_recent:
                step = max(1.0, len(ghost_frequent) / len(ghost_recent))
                self._target = min(float(self._capacity), self._target + step)
                del ghost_recent[key]
                frequent[key] = None
            elif key in ghost_frequent:
                step = max(1.0, len(ghost_recent) / len(ghost_frequent))
                self._target = max(0.0, self._target - step)
                del ghost_frequent[key]
                frequent[key] = None
            else:
                recent[key] = None
        self._trim_ghosts()

    def touch(self, keys: Sequence[Key]) -> None:
        recent, frequent, held = self._recent, self._frequent, self._held
        for key in reversed(keys):
            if key in frequent:
                frequent.move_to_end(key)
            elif key in recent:
                del recent[key]
                frequent[key] = None
            elif held.get(key) is False:
                held[key] = True
                self._num_held_recent -= 1

    def hold(self, keys: Sequence[Key]) -> None:
        recent, frequent, held = self._recent, self._frequent, self._held
        for key in keys:
            if key in frequent:
                del frequent[key]
                held[key] = True
            else:
                del recent[key]
                held[key] = False
                self._num_held_recent += 1

    def release(self, keys: Sequence[Key]) -> None:
        recent, frequent, held = self._recent, self._frequent, self._held
        for key in reversed(keys):
            if held.pop(key):
                frequent[key] = None
            else:
                recent[key] = None
                self._num_held_recent -= 1

    def evict(self, count: int, protected: AbstractSet[Key]) -> list[Key]:
        recent, frequent = self._recent, self._frequent
        above_target = ceil(len(recent) + self._num_held_recent - self._target)
        evicted: list[Key] = []
        # Recent down to its target, then frequent, and recent again where that can't give enough.
        # What becomes a ghost changes none of the sums that bound the ghost lists.
        for order, ghosts, limit in (
            (recent, self._ghost_recent, min(count, above_target)),
            (frequent, self._ghost_frequent, count),
            (recent, self._ghost_recent, count),
        ):
            if len(evicted) < limit:
                taken = _pop_oldest(order, limit - len(evicted), protected)
                for key in taken:
                    ghosts[key] = None
                evicted += taken
        return evicted

    def clear(self) -> None:
        for keys in (self._recent, self._frequent, self._ghost_recent, self._ghost_frequent):
            keys.clear()
        self._held.clear()
        self._num_held_recent = 0
        self._target = 0.0

    def _trim_ghosts(self) -> None:
        """Keeps the paper's bounds: T1 + B1 within the capacity, all four within twice of it."""
        ghost_recent, ghost_frequent = self._ghost_recent, self._ghost_frequent
        num_recent = len(self._recent) + self._num_held_recent
        for _ in range(num_recent + len(ghost_recent) - self._capacity):
            ghost_recent.popitem(last=False)
        num_known = len(self._recent) + len(self._frequent) + len(self._held) + len(ghost_recent)
        for _ in range(num_known + len(ghost_frequent) - 2 * self._capacity):
            ghost_frequent.popitem(last=False)

    def _check(self, free: Collection[Key], held: Collection[Key]) -> None:
        ghosts = [*self._ghost_recent, *self._ghost_frequent]
        listed = [*self._recent, *self._frequent, *self._held, *ghosts]
        assert len(listed) == len(set(listed)), "a key is in two lists"
        assert len(free) == len(self._recent) + len(self._frequent)
        assert all(key in self._recent or key in self._frequent for key in free)
        assert self._held.keys() == set(held)
        assert self._num_held_recent == sum(not often for often in self._held.values())
        assert 0.0 <= self._target <= self._capacity
        num_recent = len(self._recent) + self._num_held_recent
        assert num_recent + len(self._ghost_recent) <= self._capacity
        assert len(listed) <= 2 * self._capacity


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

    def reset(self, kept: AbstractSet[int]) -> None:
        """Frees all but the `kept` slots."""
        self._unused = self._count if kept else 0
        self._returned = [slot for slot in reversed(range(self._unused)) if slot not in kept]

    def _check(self, used: Collection[int]) -> None:
        """Asserts that each slot is either free or one of `used`, once."""
        free = [*self._returned, *range(self._unused, self._count)]
        assert len(free) == len(self)
        assert sorted([*free, *used]) == list(range(self._count)), "a slot is lost or doubled"


def _pop_oldest(order: _Order, count: int, protected: AbstractSet[Key]) -> list[Key]:
    """Takes `count` keys from the head of `order`, or all; `protected` ones keep their places."""
    count = min(count, len(order))
    popped = [key for key, _ in map(order.popitem, repeat(False, count))]
    if protected.isdisjoint(popped):
        return popped
    spared = [key for key in popped if key in protected]
    popped = [key for key in popped if key not in protected]
    while order and len(popped) < count:
        key, _ = order.popitem(last=False)
        (spared if key in protected else popped).append(key)
    for key in reversed(spared):
        order[key] = None
        order.move_to_end(key, last=False)
    return popped
