"""Who used a slot last: what ordering rule 6 asks, across slots of several sizes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from triton_offload.slabs import Slabs
from triton_offload.specs import Ids


class Cuts:
    """By which size each slab is cut, by the slots that were used last. Its user holds the lock."""

    def __init__(self, slabs: Slabs) -> None:
        self._slabs = slabs
        self._size_of = np.zeros(slabs.num_slabs, dtype=np.int64)

    def use(self, size: int, slot_ids: Ids) -> list[tuple[slice, slice]]:
        """Slots of this size are used now: those of each slab that was cut by another before, as
        (old slots, new slots)."""
        if len(self._slabs.sizes) == 1:
            return []
        new = self._slabs.sizes[size]
        slabs = (slot_ids - new.first) // new.per_slab
        recut = []
        for slab in np.unique(slabs[self._size_of[slabs] != size]).tolist():
            old = self._slabs.sizes[self._size_of[slab]].slots(slab)
            slots = new.slots(slab)
            recut.append((slice(old.start, old.stop), slice(slots.start, slots.stop)))
            self._size_of[slab] = size
        return recut


class LastJobs:
    """The last job of each lane on each slot, by the lane's count of jobs; 0: none.

    A lane's jobs end in order, so that its last one on any of some slots stands for all. For the
    same reason the last one on any slot of a slab stands for all of it, when that is cut anew.
    Costs O(slots that are named), and O(slots of a slab) for each that is cut anew.
    """

    def __init__(self, lanes: Iterable[str], slabs: Slabs) -> None:
        self._slabs = slabs
        self._cuts = Cuts(slabs)
        self._last = {name: np.zeros(slabs.num_slots, dtype=np.int64) for name in lanes}

    def use(self, slot_ids: Ids) -> None:
        """These slots are asked for, or noted, next."""
        if len(self._slabs.sizes) == 1:
            return
        sizes = self._slabs.sizes_of(slot_ids)
        for size in np.unique(sizes).tolist():
            for old, new in self._cuts.use(size, slot_ids[sizes == size]):
                for last in self._last.values():
                    last[new] = last[old].max()

    def on(self, lane: str, slot_ids: Ids) -> int:
        """The last job of a lane on any of these slots, of which there is one at least."""
        return int(self._last[lane][slot_ids].max())

    def note(self, lane: str, slot_ids: Ids, sequence: int) -> None:
        """A job of the lane uses these slots, behind all that were noted before."""
        self._last[lane][slot_ids] = sequence

    def _check(self, lane: str, sequence: int) -> None:
        """Asserts that no job is noted that the lane has not had."""
        assert (self._last[lane] <= sequence).all()
