"""Chunks of several sizes in one pool: which of them leave for which."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set

from triton_offload.scheduler.order import Key
from triton_offload.scheduler.policies import PolicyChoice
from triton_offload.scheduler.room import Room
from triton_offload.scheduler.shared_slabs import SharedSlabs
from triton_offload.slabs import Slabs


class SharedRoom(Room):
    """One policy orders all chunks, whatever their size, and what it names leaves next.

    A chunk of the size that is needed leaves its slot. So does one of another size, which will find
    another of its own there: where both are stored and leave evenly, no slab changes hands. Where
    more of a size leaves than is stored, so that two slabs of its slots are free, that slab of it
    is emptied which was used least recently, and is cut anew; at once, where all of it is free.
    What a transfer uses keeps its whole slab.

    So no chunk stays or leaves for its size: of two sizes that are used alike, each keeps bytes in
    proportion to those that are stored, and what is used no more leaves, whichever it is.

    Costs O(1) per key, what leaves included.
    """

    def __init__(self, slabs: Slabs, policy: PolicyChoice) -> None:
        super().__init__(slabs.most_chunks, policy)
        self._slab_bytes, self._sizes = slabs.slab_bytes, slabs.sizes
        self._slots = SharedSlabs(slabs)
        self._num_pinned_of = [0] * len(slabs.sizes)
        self._keys_in: list[dict[Key, None]] = [{} for _ in range(slabs.num_slabs)]
        self._pins_in = [0] * slabs.num_slabs
        # By size: the slabs that hold chunks of which none is pinned, least recently used first.
        self._idle: list[OrderedDict[int, None]] = [OrderedDict() for _ in slabs.sizes]

    @property
    def wasted_bytes(self) -> int:
        behind = (self._slab_bytes % cut.num_bytes for cut in self._sizes)
        return sum(self._slots.num_cut(size) * each for size, each in enumerate(behind))

    def used_by_size(self) -> list[int]:
        return [self._slots.num_used(size) for size in range(len(self._sizes))]

    def pinned_by_size(self) -> list[int]:
        """`num_pinned` of each size."""
        return list(self._num_pinned_of)

    def use(self, keys: Iterable[Key]) -> None:
        for key in keys:
            slab = self._slab_of(key)
            if not self._pins_in[slab]:
                self._idle[self._slots.size_of[slab]].move_to_end(slab)

    def make(
        self, num_new: int, size: int, kept: Set[Key], num_idle: int, busy: Sequence[Set[Key]]
    ) -> Sequence[Key] | None:
        short = num_new - self._slots.num_free(size)
        if short <= 0:
            return ()
        per_slab = self._sizes[size].per_slab
        others = sum(map(len, self._idle)) - len(self._idle[size])
        idle = self._slots.num_used(size) - self._num_pinned_of[size] - num_idle
        if short > idle + others * per_slab:
            return None
        return self._evict(_Leaving(self, {size: num_new}), kept, busy)

    def has_room(self, wanted: Mapping[int, int]) -> bool:
        """Whether so many new chunks, by size, need no eviction."""
        begun = [self._slots.num_begun(size) for size in range(len(self._sizes))]
        return self._slabs_for(wanted, begun) <= self._slots.num_whole

    def make_several(
        self, wanted: Mapping[int, int], kept: Set[Key], idle: Collection[Key]
    ) -> Sequence[Key] | None:
        """`make`, for new chunks of several sizes at once: `wanted` says how many, by size.

        `idle`: those of `kept` that are here, of any size, and are not pinned.
        """
        held = {self._slab_of(key) for key in idle}
        if not self._could_hold(wanted, idle, held):
            return None
        return self._evict(_Leaving(self, wanted, held), kept, ())

    def _could_hold(self, wanted: Mapping[int, int], idle: Collection[Key], held: Set[int]) -> bool:
        """Whether there is room when all has left but what is pinned and `idle`, in `held`."""
        staying = Counter(map(self._size_of, idle))
        held_of = Counter(self._slots.size_of[slab] for slab in held if not self._pins_in[slab])
        num_whole = self._slots.num_whole + sum(map(len, self._idle)) - held_of.total()
        free = []
        for size, cut in enumerate(self._sizes):  # of slabs that stay cut
            slabs = self._slots.num_cut(size) - len(self._idle[size]) + held_of[size]
            free.append(slabs * cut.per_slab - self._num_pinned_of[size] - staying[size])
        return self._slabs_for(wanted, free) <= num_whole

    def _slabs_for(self, wanted: Mapping[int, int], num_free: Sequence[int]) -> int:
        """How many whole slabs these need beside free slots, by size."""
        needed = 0
        for size, count in wanted.items():
            more = count - num_free[size]
            if more > 0:
                needed += -(-more // self._sizes[size].per_slab)
        return needed

    def _evict(self, leaving: _Leaving, kept: Set[Key], busy: Sequence[Set[Key]]) -> Sequence[Key]:
        # Nothing leaves before all is chosen: a policy of a user's may raise in between.
        while (short := leaving.short) > 0:
            # Never more than there must be, if each were worth a slab.
            named = self.policy.evict(short, leaving.spared(kept), busy)
            for key in named:
                leaving.add(key, named)
        evicted = list(leaving.keys)
        self.free(evicted)
        return evicted

    def free(self, keys: Sequence[Key]) -> None:
        self._slots.put(self._forget(keys))

    def place(self, keys: Sequence[Key], size: int) -> list[int]:
        slots = self._slots.take(len(keys), size)
        for key, slot in zip(keys, slots, strict=True):
            self.slot_of[key] = slot
            self._keys_in[self._slots.slab_of(slot)][key] = None
        self.pin(keys)
        return slots

    def take_back(self, keys: Sequence[Key]) -> None:
        self.free_pinned(self._forget(keys))

    def pin(self, keys: Sequence[Key]) -> None:
        self.num_pinned += len(keys)
        for key in keys:
            slab = self._slab_of(key)
            size = self._slots.size_of[slab]
            self._pins_in[slab] += 1
            self._num_pinned_of[size] += 1
            self._idle[size].pop(slab, None)

    def unpin(self, keys: Sequence[Key]) -> None:
        self._unpin([self.slot_of[key] for key in keys])

    def free_pinned(self, slots: Sequence[int]) -> None:
        self._unpin(slots)
        self._slots.put(slots)

    def reset(self, busy: Set[Key]) -> None:
        idle = (slot for key, slot in self.slot_of.items() if key not in busy)
        self._slots.put(sorted(idle, reverse=True))
        self.slot_of.clear()
        for keys in self._keys_in:
            keys.clear()
        for slabs in self._idle:
            slabs.clear()

    def _unpin(self, slots: Sequence[int]) -> None:
        self.num_pinned -= len(slots)
        for slot in slots:
            slab = self._slots.slab_of(slot)
            size = self._slots.size_of[slab]
            self._pins_in[slab] -= 1
            self._num_pinned_of[size] -= 1
            if not self._pins_in[slab] and self._keys_in[slab]:
                self._idle[size][slab] = None

    def _forget(self, keys: Iterable[Key]) -> list[int]:
        """Returns the slots of these chunks, which are nobody's now."""
        for key in keys:
            slab = self._slab_of(key)
            del self._keys_in[slab][key]
            if not self._keys_in[slab]:
                self._idle[self._slots.size_of[slab]].pop(slab, None)
        return list(map(self.slot_of.pop, keys))

    def _slab_of(self, key: Key) -> int:
        return self._slots.slab_of(self.slot_of[key])

    def _size_of(self, key: Key) -> int:
        return self._slots.size_of[self._slab_of(key)]

    def _check(self, busy: Set[Key], orphans: Set[int]) -> None:
        assert self.num_pinned == len(busy) + len(orphans) == sum(self._num_pinned_of)
        self._slots._check([*self.slot_of.values(), *orphans])
        pins = [0] * len(self._pins_in)
        for slot in [*(self.slot_of[key] for key in busy), *orphans]:
            pins[self._slots.slab_of(slot)] += 1
        assert pins == self._pins_in
        for slab, keys in enumerate(self._keys_in):
            assert all(self._slab_of(key) == slab for key in keys)
            for size, idle in enumerate(self._idle):
                mine = self._slots.size_of[slab] == size
                assert (slab in idle) == (mine and not pins[slab] and len(keys) > 0)
        assert sum(map(len, self._keys_in)) == len(self.slot_of)
        self.policy._check(self.slot_of.keys(), busy)


class _Leaving:
    """Chunks that are to leave for others, while they are chosen.

    `wanted`: how many others there are, by size. `held`: slabs that can't be emptied, for chunks in
    them are to stay.
    """

    def __init__(
        self, room: SharedRoom, wanted: Mapping[int, int], held: Set[int] = frozenset()
    ) -> None:
        self.keys: dict[Key, None] = {}
        self._room, self._wanted = room, wanted
        # Where one size alone is wanted, of its slots all are, in whatever slab.
        self._only = next(iter(wanted)) if len(wanted) == 1 else None
        self._emptied = set(held)  # or are, then
        self._num_left = Counter[int]()  # by slab: chunks that are to leave
        self._num_whole = room._slots.num_whole
        self._coldest = [iter(slabs) for slabs in room._idle]
        self._num_free = [room._slots.num_begun(size) for size in range(len(room._sizes))]
        # Sizes of which chunks lie in slabs that can't be given: where all are used by transfers.
        idle = [len(slabs) for slabs in room._idle]
        for slab in held:
            idle[room._slots.size_of[slab]] -= not room._pins_in[slab]
        used = room.used_by_size()
        self._spent = {size for size, count in enumerate(used) if count and not idle[size]}

    @property
    def short(self) -> int:
        """How many slabs are lacking; no chunk that leaves is worth more than one."""
        return self._room._slabs_for(self._wanted, self._num_free) - self._num_whole

    def spared(self, kept: Set[Key]) -> Set[Key]:
        """What the policy must not name."""
        if not self._spent:
            return kept
        useless = {size for size in self._spent if self._num_spare(size) >= 0}
        return _Spared(self._room, kept, useless) if useless else kept

    def add(self, key: Key, named: Collection[Key]) -> None:
        """Let a chunk leave, one of those that the policy has named. Where more slots of its size
        are free then than are wanted, a slab of them may become whole."""
        if key in self.keys:
            return
        room = self._room
        slab = room._slab_of(key)
        size = room._slots.size_of[slab]
        self.keys[key] = None
        self._num_free[size] += 1
        if size == self._only:
            return
        self._num_left[slab] += 1
        if slab in room._idle[size] and self._num_left[slab] == len(room._keys_in[slab]):
            self._empty(slab, size, named)
        elif self._num_spare(size) >= 2 * room._sizes[size].per_slab:
            for coldest in self._coldest[size]:
                if coldest not in self._emptied:
                    self._empty(coldest, size, named)
                    return
            self._spent.add(size)

    def _num_spare(self, size: int) -> int:
        """Free slots of a size, in slabs that are cut by it, that nothing wanted takes."""
        return self._num_free[size] - self._wanted.get(size, 0)

    def _empty(self, slab: int, size: int, named: Collection[Key]) -> None:
        room = self._room
        self._emptied.add(slab)
        rest = [key for key in room._keys_in[slab] if key not in self.keys]
        self._num_free[size] -= room._sizes[size].per_slab - len(rest)
        self._num_whole += 1
        self.keys.update(dict.fromkeys(rest))
        if rest:
            room.policy.drop([key for key in rest if key not in named])


class _Spared(Set[Key]):
    """`kept`, and all chunks of some sizes."""

    def __init__(self, room: SharedRoom, kept: Set[Key], sizes: Set[int]) -> None:
        self._room, self._kept, self._sizes = room, kept, sizes

    def __contains__(self, key: object) -> bool:
        if key in self._kept:
            return True
        return key in self._room.slot_of and self._room._size_of(key) in self._sizes

    def __iter__(self) -> Iterator[Key]:
        return (key for key in self._room.slot_of if key in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)
