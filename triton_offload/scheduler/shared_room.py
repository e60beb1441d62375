"""Chunks of several sizes in one pool: which of them leave for which."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set

from triton_offload.scheduler.order import Key
from triton_offload.scheduler.policies import PolicyChoice
from triton_offload.scheduler.room import Room
from triton_offload.scheduler.shared_slabs import SharedSlabs
from triton_offload.slabs import Slabs


class SharedRoom(Room):
    """One policy orders all chunks, whatever their size, and what it names leaves next.

    A chunk of the size that is needed leaves its slot. With one of another size all that lies in
    its slab leaves, and the slab is cut anew. So no chunk stays for its size: of two sizes whose
    chunks are used alike, each keeps the bytes that are brought to it while a chunk stays, and what
    is used no more leaves, whose it may be. Where a transfer uses anything in a slab, it is no
    other size's: the next chunk leaves.

    Costs O(1) per key, what leaves included.
    """

    def __init__(self, slabs: Slabs, policy: PolicyChoice) -> None:
        super().__init__(slabs.most_chunks, policy)
        self._slab_bytes, self._sizes = slabs.slab_bytes, slabs.sizes
        self._slots = SharedSlabs(slabs)
        self._num_pinned_of = [0] * len(slabs.sizes)
        self._keys_in: list[dict[Key, None]] = [{} for _ in range(slabs.num_slabs)]
        self._pins_in = [0] * slabs.num_slabs
        self._stuck: list[set[int]] = [set() for _ in slabs.sizes]  # slabs with pins, by size
        # Of these the policy has passed over idle chunks, and looks at them when they are released.
        self._passed: list[set[int]] = [set() for _ in slabs.sizes]

    @property
    def wasted_bytes(self) -> int:
        behind = (self._slab_bytes % cut.num_bytes for cut in self._sizes)
        return sum(self._slots.num_cut(size) * each for size, each in enumerate(behind))

    def used_by_size(self) -> list[int]:
        return [self._slots.num_used(size) for size in range(len(self._sizes))]

    def make(
        self, num_new: int, size: int, kept: Set[Key], num_idle: int, busy: Sequence[Set[Key]]
    ) -> Sequence[Key] | None:
        short = num_new - self._slots.num_free(size)
        if short <= 0:
            return ()
        if short > self._most_gained(size) - num_idle:
            return None
        for slab in list(self._passed[size]):
            self._release(slab, size, busy)
        # Nothing leaves before all is chosen: a policy of a user's may raise in between.
        leaving: dict[Key, None] = {}
        per_slab = self._sizes[size].per_slab
        busy = (*busy, _InStuckSlabs(self, size))
        while short > 0:
            named = dict.fromkeys(self.policy.evict(max(1, short // per_slab), kept, busy))
            for key in named:
                slab = self._slab_of(key)
                if self._slots.size_of[slab] == size:
                    leaving[key] = None
                    short -= 1
                elif key not in leaving:
                    keys = self._keys_in[slab]
                    self.policy.drop([other for other in keys if other not in named])
                    leaving.update(keys)
                    short -= per_slab
        self._slots.put(self._forget(leaving))
        return list(leaving)

    def _most_gained(self, size: int) -> int:
        """The slots of a size that there would be if all idle chunks left."""
        others = [other for other in range(len(self._sizes)) if other != size]
        slabs = sum(self._slots.num_cut(other) - len(self._stuck[other]) for other in others)
        idle = self._slots.num_used(size) - self._num_pinned_of[size]
        return idle + slabs * self._sizes[size].per_slab

    def place(self, keys: Sequence[Key], size: int) -> list[int]:
        slots = self._slots.take(len(keys), size)
        for key, slot in zip(keys, slots, strict=True):
            self.slot_of[key] = slot
            self._keys_in[self._slots.slab_of(slot)][key] = None
        self.pin(keys)
        return slots

    def take_back(self, keys: Sequence[Key]) -> None:
        self.free_pinned(self._forget(keys))

    def _forget(self, keys: Iterable[Key]) -> list[int]:
        """Returns the slots of these chunks, which are nobody's now."""
        for key in keys:
            del self._keys_in[self._slab_of(key)][key]
        return list(map(self.slot_of.pop, keys))

    def pin(self, keys: Sequence[Key]) -> None:
        self.num_pinned += len(keys)
        for key in keys:
            slab = self._slab_of(key)
            size = self._slots.size_of[slab]
            self._pins_in[slab] += 1
            self._num_pinned_of[size] += 1
            self._stuck[size].add(slab)

    def unpin(self, keys: Sequence[Key]) -> None:
        self._unpin([self.slot_of[key] for key in keys])

    def free_pinned(self, slots: Sequence[int]) -> None:
        self._unpin(slots)
        self._slots.put(slots)

    def _unpin(self, slots: Sequence[int]) -> None:
        self.num_pinned -= len(slots)
        for slot in slots:
            slab = self._slots.slab_of(slot)
            size = self._slots.size_of[slab]
            self._pins_in[slab] -= 1
            self._num_pinned_of[size] -= 1
            if not self._pins_in[slab]:
                self._stuck[size].remove(slab)
                if slab in self._passed[size]:
                    self._release(slab, size, ())

    def reset(self, busy: Set[Key]) -> None:
        idle = (slot for key, slot in self.slot_of.items() if key not in busy)
        self._slots.put(sorted(idle, reverse=True))
        self.slot_of.clear()
        for keys in self._keys_in:
            keys.clear()
        for slabs in self._passed:
            slabs.clear()

    def _slab_of(self, key: Key) -> int:
        return self._slots.slab_of(self.slot_of[key])

    def _release(self, slab: int, size: int, busy: Sequence[Set[Key]]) -> None:
        """Have the policy look at the chunks that it has passed over in a slab."""
        self._passed[size].remove(slab)
        keys = self._keys_in[slab]
        self.policy.release([key for key in keys if not any(key in each for each in busy)])

    def _check(self, busy: Set[Key], orphans: Set[int]) -> None:
        assert self.num_pinned == len(busy) + len(orphans) == sum(self._num_pinned_of)
        self._slots._check([*self.slot_of.values(), *orphans])
        pins = [0] * len(self._pins_in)
        for slot in [*(self.slot_of[key] for key in busy), *orphans]:
            pins[self._slots.slab_of(slot)] += 1
        assert pins == self._pins_in
        stuck = {(self._slots.size_of[slab], slab) for slab, count in enumerate(pins) if count}
        assert stuck == {(size, slab) for size, slabs in enumerate(self._stuck) for slab in slabs}
        for slab, keys in enumerate(self._keys_in):
            assert all(self._slab_of(key) == slab for key in keys)
        assert sum(map(len, self._keys_in)) == len(self.slot_of)
        passed = [slab for slabs in self._passed for slab in slabs]
        assert all(passed <= stuck for passed, stuck in zip(self._passed, self._stuck, strict=True))
        aside = {key for slab in passed for key in self._keys_in[slab]}
        self.policy._check(self.slot_of.keys(), busy | aside)


class _InStuckSlabs(Set[Key]):
    """The chunks in slabs of other sizes in which a transfer uses one."""

    def __init__(self, room: SharedRoom, size: int) -> None:
        self._room, self._size = room, size

    def __contains__(self, key: object) -> bool:
        room = self._room
        slab = room._slab_of(key)  # type: ignore[arg-type]
        size = room._slots.size_of[slab]
        if size == self._size or slab not in room._stuck[size]:
            return False
        room._passed[size].add(slab)
        return True

    def __iter__(self) -> Iterator[Key]:
        for size, slabs in enumerate(self._room._stuck):
            if size != self._size:
                for slab in slabs:
                    self._room._passed[size].add(slab)
                    yield from self._room._keys_in[slab]

    def __len__(self) -> int:
        return sum(1 for _ in self)
