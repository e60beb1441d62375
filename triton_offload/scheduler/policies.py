"""Which chunk leaves the host pool when another needs its place: the interface, LRU and ARC.

A chunk's place in the eviction order is that of its last use, and a transfer never moves it: a
chunk that is to be stored has its place before its bytes land, together with the prefix it belongs
to, and a load gives nothing but its `touch`. So it does not matter which transfer ends first, nor
how late.

Keys come in the order of their prefix. A chunk is of no use once a chunk before it is gone, so
every method that makes several keys the most recent does it from the last to the first: the
leading one ends up as the most recent of them and outlives the rest. Of chunks that one call made
the most recent, whether they were there before or not, the last leaves first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from collections.abc import Set as AbstractSet
from math import ceil
from typing import Literal, Protocol, TypeAlias

from triton_offload.scheduler.order import Key, Order, pop_oldest

__all__ = ["ARCPolicy", "EvictionPolicy", "Key", "LRUPolicy", "PolicyChoice", "PolicyMaker"]


class EvictionPolicy(Protocol):
    """An eviction order over the keys of one pool. One of your own is given as what makes it of
    the number of chunks: `KVOffloader(..., policy=YourPolicy)`.

    A key's life: `admit`, then `land` or `remove`; while it is known, any `touch` and `refresh`; at
    the end `evict` returns it, or `clear` forgets all. The caller keeps to that (`admit` of unknown
    keys, `land` or `remove` of admitted ones, and no eviction of them before; known keys
    elsewhere, one call may name some twice); what else may happen is a KeyError or an order
    undefined. Keys come in the order of their prefix.

    The methods are called under the lock of the offloader, and must not call it. LRU's and ARC's
    are O(1) per key, but for chunks that were in use when their turn came: these cost O(log of
    their number), once.

    A method `drop(keys)`, if there is one, removes these keys, which are neither busy nor pending,
    as `evict` would: where chunks differ in size, all that lies in one place may have to leave.
    Without it `evict` is called with all others as `protected`, which costs O(all keys).

    A method `_check(keys, busy)` that asserts what should hold, if there is one, is called in tests
    with every key that is known.
    """

    def admit(self, keys: Sequence[Key]) -> None:
        """Takes in keys that are about to be stored, as the most recent ones. They are busy."""

    def land(self, keys: Sequence[Key]) -> None:
        """Tells that what was admitted has been stored, and is busy no more. It keeps its place."""

    def remove(self, keys: Sequence[Key]) -> None:
        """Takes back what was admitted: its store has failed. Nothing is learnt from it."""

    def refresh(self, keys: Sequence[Key]) -> None:
        """Makes keys the most recent ones without counting a use of them."""

    def touch(self, keys: Sequence[Key], pending: Collection[Key] = ()) -> None:
        """Counts a use of each key, but only refreshes the `pending` ones, which haven't landed."""

    def evict(
        self, count: int, protected: AbstractSet[Key], busy: Sequence[AbstractSet[Key]] = ()
    ) -> list[Key]:
        """Removes and returns `count` keys that are neither in `protected` nor in one of `busy`.

        The caller has made sure that there are as many. The others keep their places; `busy` ones
        are not looked at again until `release` names them.
        """

    def release(self, keys: Sequence[Key]) -> None:
        """Tells that keys are busy no more. They keep their places."""

    def clear(self) -> None:
        """Forgets every key and all that was learnt."""


PolicyMaker: TypeAlias = Callable[[int], EvictionPolicy]
PolicyChoice: TypeAlias = Literal["lru", "arc"] | PolicyMaker


class LRUPolicy:
    """Evicts what was used least recently."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._order = Order()

    def admit(self, keys: Sequence[Key]) -> None:
        order = self._order.keys
        for key in reversed(keys):
            order[key] = None

    def land(self, keys: Sequence[Key]) -> None:
        self.release(keys)

    def remove(self, keys: Sequence[Key]) -> None:
        self._order.recall(keys)
        for key in keys:
            del self._order.keys[key]

    def refresh(self, keys: Sequence[Key]) -> None:
        self._order.recall(keys)
        for key in reversed(keys):
            self._order.keys.move_to_end(key)

    def touch(self, keys: Sequence[Key], pending: Collection[Key] = ()) -> None:
        self.refresh(keys)

    def evict(
        self, count: int, protected: AbstractSet[Key], busy: Sequence[AbstractSet[Key]] = ()
    ) -> list[Key]:
        return self._order.take(count, protected, busy)

    def release(self, keys: Sequence[Key]) -> None:
        self._order.release(keys)

    def drop(self, keys: Sequence[Key]) -> None:
        self.remove(keys)

    def clear(self) -> None:
        self._order.clear()

    def _check(self, keys: Collection[Key], busy: AbstractSet[Key]) -> None:
        self._order._check(busy)
        assert sorted(self._order) == sorted(keys)
        assert len(self._order) <= self._capacity


class ARCPolicy:
    """Adaptive replacement (Megiddo and Modha, FAST 2003), in chunks.

    `recent` (T1) holds what was used once, `frequent` (T2) what was used again; each has a ghost
    list (B1, B2) of keys that were evicted from it. A store of a ghost tells which of the two was
    cut too short, and moves the target size of `recent` that way.

    The order within a prefix holds in each of the two lists. Which list gives is ARC's choice by
    size: a head that was used again can leave before a tail that was not.

    Two things differ from the paper, which knows no transfers. What a ghost teaches counts when
    its store lands, after the eviction that made room for it (and so without the paper's tie rule
    for that eviction); until then it counts for no size. Busy keys count for the sizes of their
    lists, but can't be evicted: where one list has nothing left to give, the other one gives.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._recent = Order()
        self._frequent = Order()
        self._ghost_recent: OrderedDict[Key, None] = OrderedDict()
        self._ghost_frequent: OrderedDict[Key, None] = OrderedDict()
        self._num_landing = 0  # in recent; what lands in frequent:
        self._landing_ghosts: set[Key] = set()
        self._target = 0.0  # of the size of recent, 0 to capacity

    def admit(self, keys: Sequence[Key]) -> None:
        recent, frequent = self._recent.keys, self._frequent.keys
        ghost_recent, ghost_frequent = self._ghost_recent, self._ghost_frequent
        num_recent = len(recent)
        for key in reversed(keys):
            if key in ghost_recent or key in ghost_frequent:
                frequent[key] = None
                self._landing_ghosts.add(key)
            else:
                recent[key] = None
        self._num_landing += len(recent) - num_recent

    def land(self, keys: Sequence[Key]) -> None:
        self.release(keys)
        ghost_recent, ghost_frequent = self._ghost_recent, self._ghost_frequent
        self._num_landing -= len(keys)
        for key in reversed(keys) if self._landing_ghosts else ():
            if key not in self._landing_ghosts:
                continue
            self._landing_ghosts.remove(key)
            self._num_landing += 1
            if key in ghost_recent:
                step = max(1.0, len(ghost_frequent) / len(ghost_recent))
                self._target = min(float(self._capacity), self._target + step)
                del ghost_recent[key]
            elif key in ghost_frequent:
                step = max(1.0, len(ghost_recent) / len(ghost_frequent))
                self._target = max(0.0, self._target - step)
                del ghost_frequent[key]
        self._trim_ghosts()

    def remove(self, keys: Sequence[Key]) -> None:
        self._recent.recall(keys)
        self._frequent.recall(keys)
        for key in keys:
            if key in self._landing_ghosts:
                self._landing_ghosts.remove(key)
                del self._frequent.keys[key]
            else:
                self._num_landing -= 1
                del self._recent.keys[key]

    def refresh(self, keys: Sequence[Key]) -> None:
        self._recent.recall(keys)
        self._frequent.recall(keys)
        recent, frequent = self._recent.keys, self._frequent.keys
        for key in reversed(keys):
            (frequent if key in frequent else recent).move_to_end(key)

    def touch(self, keys: Sequence[Key], pending: Collection[Key] = ()) -> None:
        self._recent.recall(keys)
        self._frequent.recall(keys)
        recent, frequent = self._recent.keys, self._frequent.keys
        for key in reversed(keys):
            if key in frequent:
                frequent.move_to_end(key)
            elif key in pending:
                recent.move_to_end(key)
            else:
                del recent[key]
                frequent[key] = None

    def evict(
        self, count: int, protected: AbstractSet[Key], busy: Sequence[AbstractSet[Key]] = ()
    ) -> list[Key]:
        recent, frequent = self._recent, self._frequent
        above_target = ceil(len(recent) - self._num_landing - self._target)
        evicted: list[Key] = []
        # Recent down to its target, then frequent, and recent again where that can't give enough.
        # What becomes a ghost changes none of the sums that bound the ghost lists.
        for order, ghosts, limit in (
            (recent, self._ghost_recent, min(count, above_target)),
            (frequent, self._ghost_frequent, count),
            (recent, self._ghost_recent, count),
        ):
            if len(evicted) < limit:
                taken = order.take(limit - len(evicted), protected, busy)
                for key in taken:
                    ghosts[key] = None
                evicted += taken
        return evicted

    def release(self, keys: Sequence[Key]) -> None:
        self._recent.release(keys)
        self._frequent.release(keys)

    def drop(self, keys: Sequence[Key]) -> None:
        self._recent.recall(keys)
        self._frequent.recall(keys)
        for key in keys:
            if key in self._frequent.keys:
                del self._frequent.keys[key]
                self._ghost_frequent[key] = None
            else:
                del self._recent.keys[key]
                self._ghost_recent[key] = None

    def clear(self) -> None:
        for keys in (self._recent, self._frequent, self._ghost_recent, self._ghost_frequent):
            keys.clear()
        self._num_landing = 0
        self._landing_ghosts.clear()
        self._target = 0.0

    def _trim_ghosts(self) -> None:
        """Keeps the paper's bounds: T1 + B1 within the capacity, all four within twice of it."""
        ghost_recent, ghost_frequent = self._ghost_recent, self._ghost_frequent
        num_recent = len(self._recent) - self._num_landing
        pop_oldest(ghost_recent, num_recent + len(ghost_recent) - self._capacity)
        num_frequent = len(self._frequent) - len(self._landing_ghosts)
        num_known = num_recent + num_frequent + len(ghost_recent)
        pop_oldest(ghost_frequent, num_known + len(ghost_frequent) - 2 * self._capacity)

    def _check(self, keys: Collection[Key], busy: AbstractSet[Key]) -> None:
        recent, frequent = set(self._recent), set(self._frequent)
        assert not recent & frequent, "a key is in two lists"
        assert sorted([*self._recent, *self._frequent]) == sorted(keys)
        self._recent._check(busy)
        self._frequent._check(busy)
        assert 0 <= self._num_landing <= len(recent & busy)
        assert self._landing_ghosts <= frequent & busy
        listed = recent | (frequent - self._landing_ghosts)
        ghosts = [*self._ghost_recent, *self._ghost_frequent]
        assert len(ghosts) == len(set(ghosts) - listed), "a ghost is in two lists, or is none"
        assert 0.0 <= self._target <= self._capacity
        assert len(recent) - self._num_landing + len(self._ghost_recent) <= self._capacity
        assert len(listed) - self._num_landing + len(ghosts) <= 2 * self._capacity
