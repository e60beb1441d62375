"""Byte ranges of a segment: what a copy engine is asked to move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from triton_offload.kernels.table import PageRow
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import Ids
from triton_offload.transfer.layout import GroupRun

# Ordering rule 11: where a copy engine serves streams in turn, the engine's own small copy waits
# for one slice, 150 us at 55 GB/s.
SLICE_BYTES = 8 << 20

Pair = tuple[torch.Tensor, torch.Tensor]


class ChunkRanges(NamedTuple):
    """Chunks of a run in ranges of adjacent slots: the places of the first ones in the run, and
    how many chunks each has."""

    firsts: Ids
    counts: Ids

    @classmethod
    def of(cls, run: GroupRun, pool: HostPool, skip: tuple[int, ...] = ()) -> ChunkRanges:
        """Of the run's chunks but `skip`; no range crosses a piece of the pool that is pinned on
        its own."""
        rows, size = run.rows, pool.slabs.sizes[run.group.size]
        breaks = np.empty(len(rows) + 1, dtype=np.bool_)
        breaks[0] = breaks[-1] = True
        np.not_equal(rows[1:] - rows[:-1], size.step, out=breaks[1:-1])
        for chunk in skip:
            breaks[chunk : chunk + 2] = True
        edges = breaks.nonzero()[0]
        # Asked of ranges first: the remainders of all slots take as long as all the rest here.
        if pool.piece_slots < pool.num_slots and len(edges) <= len(rows):
            piece_rows = pool.piece_slots * size.rows_per_slab
            begins = rows[edges[:-1]] % piece_rows
            if np.count_nonzero(begins + (edges[1:] - edges[:-1]) * size.step > piece_rows):
                breaks[1:-1] |= rows[1:] % piece_rows == 0
                edges = breaks.nonzero()[0]
        firsts, counts = edges[:-1], edges[1:] - edges[:-1]
        if skip:
            kept = ~np.isin(firsts, skip)
            firsts, counts = firsts[kept], counts[kept]
        return cls(firsts, counts)


def whole_chunks(
    run: GroupRun, pool: HostPool, staging: torch.Tensor, ranges: ChunkRanges
) -> Iterator[Pair]:
    """(slots, staging) rows of the ranges, in copies of at most SLICE_BYTES."""
    step = pool.slabs.sizes[run.group.size].step
    slots = pool.slots_of(run.group.size)
    columns = [
        (
            _columns(slots, part.slot_offset, part.num_bytes),
            _columns(staging, part.packed_offset, part.num_bytes),
        )
        for part in run.group.byte_ranges
    ]
    rows = run.rows[ranges.firsts].tolist()
    for place, row, count in zip(ranges.firsts.tolist(), rows, ranges.counts.tolist(), strict=True):
        for there, here in columns:
            yield from _slices(there, row, here, place, count, step)


def chunk_batches(
    run: GroupRun, pool: HostPool, staging: torch.Tensor, skip: tuple[int, ...] = ()
) -> Iterator[tuple[Ids, Ids, Ids]]:
    """The run's chunks but `skip` as (slot addresses, staging addresses, sizes) of their byte
    ranges, in batches of whole chunks and at most SLICE_BYTES, which no slot may exceed."""
    slots = _addresses_of(run, pool)
    base, pitch = staging.data_ptr(), staging.stride(0)
    here = np.arange(base, base + len(slots) * pitch, pitch)
    if skip:
        slots, here = np.delete(slots, skip), np.delete(here, skip)
    slot_offsets, packed_offsets, num_bytes = run.group.range_columns
    slots, here = slots[:, None] + slot_offsets, here[:, None] + packed_offsets
    sizes = np.full(slots.shape, num_bytes)
    step = SLICE_BYTES // sum(part.num_bytes for part in run.group.byte_ranges)
    for begin in range(0, len(slots), step):
        chunks = slice(begin, begin + step)
        yield slots[chunks].ravel(), here[chunks].ravel(), sizes[chunks].ravel()


def positions(slot: torch.Tensor, page: PageRow, begin: int, end: int) -> torch.Tensor:
    """The pages at positions [begin, end) of one slot (uint8 [slot_bytes]), a row each."""
    return slot[page.offset :].as_strided(
        (end - begin, page.page_bytes),
        (page.pitch, 1),
        slot.storage_offset() + page.offset + begin * page.pitch,
    )


def zeros_over(slot: torch.Tensor, zeros: torch.Tensor) -> Iterator[Pair]:
    """(part of the slot, as many zeros) until the slot is covered."""
    for part in torch.split(slot, len(zeros)):
        yield part, zeros[: len(part)]


def addresses(run: GroupRun, pool: HostPool) -> tuple[Ids, Ids, Ids]:
    """(page address, slot address, bytes) of every range that is contiguous on both sides.

    A range is a page, or, of tensors whose pages lie without a gap on both sides, the pages of
    blocks that follow each other in the cache and in one chunk:

        block ids   4  5  6 | 7  9      two blocks per chunk, the run begins at its second place
        position    1  0  1 | 0  1
        ranges     [4][5  6][7][9]      of a tensor without gaps; else one for each block
    """
    span = run.group.table.blocks_per_chunk
    chunk, position = np.divmod(run.first + np.arange(len(run.block_ids)), span)
    slot = _addresses_of(run, pool)[chunk]
    firsts, counts = _followers(run.block_ids, position)
    _, stride, page_bytes, _, pitch = run.group.columns
    gapless = (stride == page_bytes) & (page_bytes == pitch)
    every = np.arange(len(run.block_ids))
    ranges: list[tuple[Ids, Ids, Ids]] = []
    # (these tensors, the blocks that their ranges begin with, the blocks that each range has)
    for tensors, at, count in ((gapless, firsts, counts), (~gapless, every, np.ones_like(every))):
        # A row for each tensor: numpy is asked once, not once for each of 80.
        address, stride, page_bytes, offset, pitch = run.group.columns[:, tensors, None]
        pages = address + run.block_ids[at] * stride
        slots = slot[at] + offset + position[at] * pitch
        ranges.append((pages, slots, count * page_bytes))
    pages, slots, sizes = (
        np.concatenate([rows.ravel() for rows in both]) for both in zip(*ranges, strict=True)
    )
    return pages, slots, sizes


def _followers(block_ids: Ids, position: Ids) -> tuple[Ids, Ids]:
    """Blocks in series that follow each other in the cache and within a chunk: the places of the
    first of each, and how many it has. `position`: of each block in its chunk."""
    follows = np.zeros(len(block_ids), dtype=np.bool_)
    follows[1:] = (np.diff(block_ids) == 1) & (position[1:] != 0)
    firsts = np.flatnonzero(~follows)
    return firsts, np.diff(np.append(firsts, len(block_ids)))


def _addresses_of(run: GroupRun, pool: HostPool) -> Ids:
    """Of the run's slots."""
    slots = pool.slots_of(run.group.size)
    return slots.data_ptr() + run.rows * slots.stride(0)


def _columns(rows: torch.Tensor, offset: int, num_bytes: int) -> torch.Tensor:
    return rows if num_bytes == rows.shape[1] else rows[:, offset : offset + num_bytes]


def _slices(
    there: torch.Tensor, first: int, here: torch.Tensor, place: int, num_rows: int, step: int = 1
) -> Iterator[Pair]:
    """So many rows from `first` on, each `step` after the one before, and from `place` on, in
    slices."""
    # Each is cut out at once: a view of a view takes its caller twice the time.
    width = here.shape[1]
    rows = max(1, SLICE_BYTES // width)
    for row in range(0, num_rows, rows):
        end = min(row + rows, num_rows)
        # One more than a multiple of the step: none of what follows need be there.
        x = there[first + row * step : first + (end - 1) * step + 1 : step]
        y = here[place + row : place + end]
        if width <= SLICE_BYTES:
            yield x, y
        else:
            for begin in range(0, width, SLICE_BYTES):
                yield x[:, begin : begin + SLICE_BYTES], y[:, begin : begin + SLICE_BYTES]
