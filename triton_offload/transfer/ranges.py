"""Byte ranges of a segment: what a copy engine is asked to move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from triton_offload.kernels.table import PageRow
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import Ids
from triton_offload.transfer.layout import GroupRun

# Ordering rule 11: where a copy engine serves streams in turn, the engine's own small copy waits
# for one slice, 150 us at 55 GB/s.
SLICE_BYTES = 8 << 20

# A lane has some 600 operations under way: two batches, and a segment after theirs.
_MOST_OPS_OF_A_BATCH = 256

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class ChunkRanges:
    """Chunks of a run in ranges of adjacent slots: the places of the first ones in the run, and
    how many chunks each has."""

    firsts: Ids
    counts: Ids

    @classmethod
    def of(cls, run: GroupRun, pool: HostPool, skip: tuple[int, ...] = ()) -> ChunkRanges:
        """Of the run's chunks but `skip`; no range crosses a piece of the pool that is pinned on
        its own."""
        slot_ids = run.slot_ids
        breaks = np.empty(len(slot_ids) + 1, dtype=np.bool_)
        breaks[0] = breaks[-1] = True
        breaks[1:-1] = (slot_ids[1:] - slot_ids[:-1] != 1) | (slot_ids[1:] % pool.piece_slots == 0)
        for chunk in skip:
            breaks[chunk : chunk + 2] = True
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
    slots = run.slot_ids[ranges.firsts].tolist()
    for place, slot, count in zip(
        ranges.firsts.tolist(), slots, ranges.counts.tolist(), strict=True
    ):
        for part in run.group.byte_ranges:
            there = pool.slots[
                slot : slot + count, part.slot_offset : part.slot_offset + part.num_bytes
            ]
            here = staging[
                place : place + count, part.packed_offset : part.packed_offset + part.num_bytes
            ]
            yield from _slices(there, here)


def chunk_batches(
    run: GroupRun, pool: HostPool, staging: torch.Tensor, skip: tuple[int, ...] = ()
) -> Iterator[tuple[Ids, Ids, Ids]]:
    """The run's chunks but `skip` as (slot addresses, staging addresses, sizes) of their byte
    ranges, in batches of whole chunks and at most SLICE_BYTES, which no slot may exceed."""
    places = np.arange(len(run.slot_ids))
    if skip:
        places = np.delete(places, skip)
    slots = pool.slots.data_ptr() + run.slot_ids[places] * pool.slots.stride(0)
    here = staging.data_ptr() + places * staging.stride(0)
    within = np.array(
        [[p.slot_offset, p.packed_offset, p.num_bytes] for p in run.group.byte_ranges]
    )
    sizes = np.broadcast_to(within[:, 2], (len(places), len(within)))
    step = SLICE_BYTES // int(within[:, 2].sum())
    for begin in range(0, len(places), step):
        chunks = slice(begin, begin + step)
        yield (
            (slots[chunks, None] + within[:, 0]).ravel(),
            (here[chunks, None] + within[:, 1]).ravel(),
            sizes[chunks].ravel(),
        )


def batch_ops(sizes: Ids) -> int:
    """How many operations a batch is to a lane's bound: as many as it has copies, but never so many
    that the next segment would have to wait until it is done."""
    return min(len(sizes), _MOST_OPS_OF_A_BATCH)


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
    slot = pool.slots.data_ptr() + run.slot_ids[chunk] * pool.slots.stride(0)
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


def _slices(a: torch.Tensor, b: torch.Tensor) -> Iterator[Pair]:
    # Plain slices: a call of `torch.split` takes its caller 6 us, a slice 1.5.
    num_rows, width = a.shape
    rows = max(1, SLICE_BYTES // width)
    if num_rows <= rows and width <= SLICE_BYTES:
        yield a, b
        return
    for row in range(0, num_rows, rows):
        x, y = a[row : row + rows], b[row : row + rows]
        if width <= SLICE_BYTES:
            yield x, y
        else:
            for begin in range(0, width, SLICE_BYTES):
                yield x[:, begin : begin + SLICE_BYTES], y[:, begin : begin + SLICE_BYTES]
