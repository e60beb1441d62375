"""Which slots are free in a pool whose slabs are shared by slots of several sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence, Set

from triton_offload.scheduler.free_slots import FreeSlots
from triton_offload.slabs import Slabs

_FREE = -1


class SharedSlabs:
    """Slabs that are cut by the size that needs one, and whole again when all of a slab is free.

    `size_of[slab]`: the size that it is cut by. `slab_of(slot)`. All is O(1) per slot.
    """

    def __init__(self, slabs: Slabs) -> None:
        self._slabs = slabs
        self._whole = FreeSlots(slabs.num_slabs)
        self.size_of = [_FREE] * slabs.num_slabs
        self._free_in: list[list[int]] = [[] for _ in self.size_of]  # by slab that is cut
        # By size: the slabs that have free slots, the next one last; how many these have; and how
        # many slabs are cut by it.
        self._open: list[OrderedDict[int, None]] = [OrderedDict() for _ in slabs.sizes]
        self._num_free = [0] * len(slabs.sizes)
        self._num_cut = [0] * len(slabs.sizes)

    @property
    def num_whole(self) -> int:
        """How many slabs are free, to be cut by any size."""
        return len(self._whole)

    def num_free(self, size: int) -> int:
        """How many slots of this size can be taken."""
        return self._num_free[size] + self.num_whole * self._slabs.sizes[size].per_slab

    def num_begun(self, size: int) -> int:
        """How many of them lie in slabs that are cut by it."""
        return self._num_free[size]

    def num_used(self, size: int) -> int:
        return self._num_cut[size] * self._slabs.sizes[size].per_slab - self._num_free[size]

    def num_cut(self, size: int) -> int:
        """How many slabs are cut by this size."""
        return self._num_cut[size]

    def slab_of(self, slot: int) -> int:
        for cut in reversed(self._slabs.sizes):
            if slot >= cut.first:
                return (slot - cut.first) // cut.per_slab
        raise AssertionError

    def take(self, count: int, size: int) -> list[int]:
        """`count` slots, in ascending order; the caller has made sure that there are as many."""
        short = count - self._num_free[size]
        if short > 0:
            self._cut(-(-short // self._slabs.sizes[size].per_slab), size)
        self._num_free[size] -= count
        slots: list[int] = []
        slabs = self._open[size]
        while count:
            slab = next(reversed(slabs))
            free = self._free_in[slab]
            taken = free[-count:]
            del free[-count:]
            if not free:
                del slabs[slab]
            slots += taken
            count -= len(taken)
        slots.sort()
        return slots

    def put(self, slots: Iterable[int]) -> None:
        """Takes slots back."""
        for slot in slots:
            slab = self.slab_of(slot)
            size, free = self.size_of[slab], self._free_in[slab]
            free.append(slot)
            self._open[size][slab] = None
            self._num_free[size] += 1
            if len(free) == self._slabs.sizes[size].per_slab:
                self._mend(slab, size)

    def _cut(self, count: int, size: int) -> None:
        """Cut so many more slabs by a size."""
        for slab in self._whole.take(count):
            self.size_of[slab] = size
            self._free_in[slab].extend(reversed(self._slabs.sizes[size].slots(slab)))
            self._open[size][slab] = None
            self._open[size].move_to_end(slab, last=False)  # what is begun comes first
        self._num_cut[size] += count
        self._num_free[size] += count * self._slabs.sizes[size].per_slab

    def _mend(self, slab: int, size: int) -> None:
        """All of a slab is free: it is whole again."""
        self._num_free[size] -= len(self._free_in[slab])
        self._num_cut[size] -= 1
        self._free_in[slab].clear()
        del self._open[size][slab]
        self.size_of[slab] = _FREE
        self._whole.put([slab])

    def _check(self, used: Sequence[int] | Set[int]) -> None:
        """Asserts that every byte is that of one slot that is used or free, or of a whole slab."""
        cut = [slab for slab, size in enumerate(self.size_of) if size != _FREE]
        self._whole._check(used=cut)
        slots = [*used, *(slot for free in self._free_in for slot in free)]
        expected = [
            slot for slab in cut for slot in self._slabs.sizes[self.size_of[slab]].slots(slab)
        ]
        assert sorted(slots) == sorted(expected), "a slot is lost, doubled or across others"
        for size, cut_by in enumerate(self._slabs.sizes):
            slabs = [slab for slab in cut if self.size_of[slab] == size]
            free = {slab: len(self._free_in[slab]) for slab in slabs if self._free_in[slab]}
            assert self._num_cut[size] == len(slabs)
            assert self._open[size].keys() == free.keys()
            assert self._num_free[size] == sum(free.values())
            assert all(count < cut_by.per_slab for count in free.values()), "a free slab is cut"
