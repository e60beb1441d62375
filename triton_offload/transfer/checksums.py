"""What was stored, proved when it is loaded: a sum per block of each slot, in host memory.

The sums themselves are made where the bytes pass (`kernels.sums` says of what). A job's are kept,
or compared, when it ends, in the order of the jobs on its slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from triton_offload.kernels.sums import Sums, slot_sums
from triton_offload.pool.host_pool import HostPool
from triton_offload.slabs import Slabs
from triton_offload.specs import Ids
from triton_offload.transfer.last_jobs import Cuts
from triton_offload.transfer.layout import CacheLayout, GroupRun

#: a run, and what each of its blocks adds up to: int64 [blocks]
RunSums = tuple[GroupRun, Sums]

_UNKNOWN = -1


class Checksums:
    """The sums of the blocks of a pool. Who calls has the slots that he names to himself: the lock
    of the pipeline, or a job that has not ended."""

    def __init__(self, layout: CacheLayout, slabs: Slabs) -> None:
        self._groups = layout.groups
        shape = (slabs.num_slots, layout.blocks_per_chunk)
        self._cuts = Cuts(slabs)
        self._sums = np.zeros(shape, dtype=np.int64)
        # The group whose pages were added up: a slot may hold blocks of several, or of none known.
        self._group = np.full(shape, _UNKNOWN, dtype=np.int32)

    def store(self, runs: Iterable[GroupRun], sums: Iterable[RunSums]) -> None:
        """A store of `runs` has ended; `sums`: of those parts of it that were added up. Of the
        others nothing is known any more, nor of what a fresh slot held before."""
        for run in runs:
            self._cut(run.group.size, run.slot_ids)
            if run.fresh is not None:
                self._group[run.slot_ids[run.fresh]] = _UNKNOWN
            self._group[_places(run)] = _UNKNOWN
        for run, found in sums:
            places = _places(run)
            self._sums[places] = found
            self._group[places] = run.group.index

    def take_in(
        self, pool: HostPool, slot_ids: Sequence[int], blocks: Sequence[int], group: int
    ) -> None:
        """A medium of the user's has written blocks of these slots, a bitmask for each: they are
        added up here and now, in a second pass over them."""
        table, size = self._groups[group].table, self._groups[group].size
        ids = np.array(slot_ids, dtype=np.int64)
        self._cut(size, ids)
        rows = pool.slabs.sizes[size].rows(ids)
        slots = pool.slots_of(size).numpy()
        for slot, row, mask in zip(slot_ids, rows.tolist(), blocks, strict=True):
            written = [s for s in range(table.blocks_per_chunk) if mask >> s & 1]
            self._sums[slot, written] = slot_sums(table, slots[row])[written]
            self._group[slot, written] = group

    def _cut(self, size: int, slot_ids: Ids) -> None:
        """Slots of this size are written: what their slabs held as others is not known."""
        for _, new in self._cuts.use(size, slot_ids):
            self._group[new] = _UNKNOWN

    def wrong_slots(self, sums: Iterable[RunSums]) -> tuple[int, ...]:
        """The slots of a load that does not bring what was stored, each once. Of a load by layers
        each block passes in several parts, which add up to what was stored."""
        of_group: dict[int, list[tuple[Ids, Sums]]] = {}
        span = self._sums.shape[1]
        for run, found in sums:
            slots, positions = _places(run)
            of_group.setdefault(run.group.index, []).append((slots * span + positions, found))
        wrong: dict[int, None] = {}
        for group, parts in of_group.items():
            blocks, total = parts[0] if len(parts) == 1 else _added_up(parts)
            known = self._group.ravel()[blocks] == group
            differs = known & (self._sums.ravel()[blocks] != total)
            wrong.update(dict.fromkeys((blocks[differs] // span).tolist()))
        return tuple(wrong)

    def of_slot(self, slot_id: int, group: int) -> dict[int, int]:
        """The sums that are known of a group's blocks there, by their position."""
        (known,) = np.nonzero(self._group[slot_id] == group)
        return dict(zip(known.tolist(), self._sums[slot_id, known].tolist(), strict=True))


def _added_up(parts: list[tuple[Ids, Sums]]) -> tuple[Ids, Sums]:
    """The blocks of some parts, each once, and what all of them have of it."""
    blocks, which = np.unique(np.concatenate([b for b, _ in parts]), return_inverse=True)
    total = np.zeros(len(blocks), dtype=np.int64)
    np.add.at(total, which, np.concatenate([found for _, found in parts]))
    return blocks, total


def _places(run: GroupRun) -> tuple[Ids, Ids]:
    """The slot and the position in it of each block of a run."""
    blocks = run.first + np.arange(len(run.block_ids))
    chunk, position = np.divmod(blocks, run.group.table.blocks_per_chunk)
    return run.slot_ids[chunk], position
