"""What the slots of the pool hold, and what of it a store must clear or keep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from triton_offload.slabs import Slabs
from triton_offload.transfer.last_jobs import Cuts
from triton_offload.transfer.layout import CacheLayout, GroupLayout, GroupRun

# What a slot holds beside a group's chunk, counted from the end of a list with one entry per group:
# zeros, as a pool begins, and bytes that nobody answers for: of several groups (only stores that
# keep bytes leave that), or what a failed store or another writer left.
_ZEROS, _MIXED = -1, -2


class SlotMarks(NamedTuple):
    """What a store must know of its slots; chunks are counted within the segment.

    `kept`: chunks whose slot keeps bytes that a copy of the whole chunk would overwrite, since the
    chunk is partial or its pages are padded. `unfilled`: partial chunks of fresh
    slots. `stale`: chunks whose fresh slot holds bytes that the store would not overwrite.
    """

    kept: tuple[int, ...] = ()
    unfilled: tuple[int, ...] = ()
    stale: tuple[int, ...] = ()


class SlotContents:
    """Whose chunk each slot holds, by what was queued so far. Its user holds the lock.

    `other_writers`: there are others who write to slots, so that nobody knows, ever.
    """

    def __init__(self, layout: CacheLayout, slabs: Slabs, *, other_writers: bool = False) -> None:
        # The group whose chunk each slot holds, or one of the two above.
        self._holder = np.full(slabs.num_slots, _MIXED if other_writers else _ZEROS, dtype=np.int64)
        self._knows = not other_writers
        self._cuts = Cuts(slabs)
        # [group, holder]: whether a store of a whole chunk of the group leaves a byte of what the
        # slot held; the last two columns are those of _MIXED and _ZEROS.
        edges = np.array([[not _fills(group, layout), False] for group in layout.groups])
        self._leaves = np.hstack([layout.leaves_stale, edges])
        #: by group: whether one leaves none, whatever the slot held
        self._covers = [not leaves.any() for leaves in self._leaves]

    def store(self, run: GroupRun) -> SlotMarks:
        """A store of this run is queued now: what it must clear. From here on its slots hold it."""
        group, partial = run.group.index, run.partial_chunks()
        for old, new in self._cuts.use(run.group.size, run.slot_ids):
            unused = (self._holder[old] == _ZEROS).all()
            self._holder[new] = _ZEROS if unused else _MIXED
        if not partial and self._covers[group]:
            self._hold(run, group)  # the common store: whole chunks, each all of its slot
            return SlotMarks()
        holder = self._holder[run.slot_ids]
        stale = self._leaves[group][holder]
        fresh = np.zeros(len(holder), dtype=np.bool_) if run.fresh is None else run.fresh
        alone = fresh | (holder == _ZEROS) | (holder == group)
        self._hold(run, np.where(alone, group, _MIXED))
        return SlotMarks(
            kept=_places(~fresh)
            if run.group.has_gaps
            else tuple(chunk for chunk in partial if not fresh[chunk]),
            unfilled=tuple(chunk for chunk in partial if fresh[chunk]),
            stale=_places(fresh & stale),
        )

    def _hold(self, run: GroupRun, holder: npt.ArrayLike) -> None:
        if self._knows:
            self._holder[run.slot_ids] = holder

    def doubt(self, runs: Iterable[GroupRun]) -> None:
        """A store of these runs failed: who knows what it wrote, or did not clear."""
        for run in runs:
            self._holder[run.slot_ids] = _MIXED

    def _check(self) -> None:
        assert ((self._holder >= _MIXED) & (self._holder < len(self._leaves))).all()


def _fills(group: GroupLayout, layout: CacheLayout) -> bool:
    """Whether a whole chunk of the group is all that the layout has of its slot."""
    if layout.own_ranges is None:
        return group.fills_slot
    covered = sum(part.num_bytes for part in group.byte_ranges)
    return covered == sum(size for _, size in layout.own_ranges) and not group.has_gaps


def _places(flags: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(flags.nonzero()[0].tolist())
