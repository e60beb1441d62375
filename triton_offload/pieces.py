"""Byte ranges of a segment: what a copy engine is asked to move."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from triton_offload.host_pool import HostPool
from triton_offload.kernels.table import PageRow
from triton_offload.layout import GroupRun
from triton_offload.specs import Ids

# Ordering rule 11: where a copy engine serves streams in turn, the engine's own small copy waits
# for one slice, 150 us at 55 GB/s.
SLICE_BYTES = 8 << 20

Pair = tuple[torch.Tensor, torch.Tensor]


def whole_chunks(
    run: GroupRun, pool: HostPool, staging: torch.Tensor, skip: tuple[int, ...] = ()
) -> Iterator[Pair]:
    """(slots, staging) rows of the run's chunks but `skip`, in copies of at most SLICE_BYTES.

    Adjacent slots leave in one copy; no copy crosses a piece of the pool that is pinned on its
    own.
    """
    for place, slot, count in _adjacent(run.slot_ids, pool.piece_slots, skip):
        for part in run.group.runs:
            there = pool.slots[
                slot : slot + count, part.slot_offset : part.slot_offset + part.num_bytes
            ]
            here = staging[
                place : place + count, part.packed_offset : part.packed_offset + part.num_bytes
            ]
            yield from _slices(there, here)


def num_copies(run: GroupRun, pool: HostPool, skip: tuple[int, ...] = ()) -> int:
    """How many copies `whole_chunks` would make, but for slices."""
    return sum(1 for _ in _adjacent(run.slot_ids, pool.piece_slots, skip)) * len(run.group.runs)


def chunk_batches(
    run: GroupRun, pool: HostPool, staging: torch.Tensor, skip: tuple[int, ...] = ()
) -> Iterator[tuple[Ids, Ids, Ids]]:
    """The same bytes as (slot addresses, staging addresses, sizes), in batches of at most
    SLICE_BYTES, which no slot may exceed."""
    places = np.delete(np.arange(len(run.slot_ids)), list(skip))
    parts = run.group.runs
    slots = pool.slots.data_ptr() + run.slot_ids[places] * pool.slots.stride(0)
    here = staging.data_ptr() + places * staging.stride(0)
    within = np.array([[p.slot_offset, p.packed_offset, p.num_bytes] for p in parts])
    slot_addresses = (slots[:, None] + within[:, 0]).ravel()
    addresses = (here[:, None] + within[:, 1]).ravel()
    sizes = np.tile(within[:, 2], len(places))
    ends = np.cumsum(sizes)
    begin = 0
    while begin < len(sizes):
        done = ends[begin] - sizes[begin]
        end = int(np.searchsorted(ends, done + SLICE_BYTES, side="right"))
        yield slot_addresses[begin:end], addresses[begin:end], sizes[begin:end]
        begin = end


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
    """(page address, slot address, bytes) of every range that is contiguous on both sides."""
    table = run.group.table
    span = table.blocks_per_chunk
    place = run.first + np.arange(len(run.block_ids))
    chunk, position = np.divmod(place, span)
    slot = pool.slots.data_ptr() + run.slot_ids[chunk] * pool.slots.stride(0)
    # A block that follows its predecessor on the device and in the chunk may join its range.
    follows = np.zeros(len(place), dtype=np.bool_)
    follows[1:] = (np.diff(run.block_ids) == 1) & (position[1:] != 0)
    starts = np.flatnonzero(~follows)
    lengths = np.diff(np.append(starts, len(place)))
    pages: list[Ids] = []
    slots: list[Ids] = []
    sizes: list[Ids] = []
    for page in table.pages:
        joined = page.block_stride == page.page_bytes == page.pitch
        at = starts if joined else np.arange(len(place))
        pages.append(page.view.data_ptr() + run.block_ids[at] * page.block_stride)
        slots.append(slot[at] + page.offset + position[at] * page.pitch)
        sizes.append((lengths if joined else np.ones_like(at)) * page.page_bytes)
    return np.concatenate(pages), np.concatenate(slots), np.concatenate(sizes)


def _adjacent(
    slot_ids: Ids, piece_slots: int, skip: tuple[int, ...]
) -> Iterator[tuple[int, int, int]]:
    """(index of the first, its slot, count) of the runs of adjacent slots within one piece."""
    if len(slot_ids) == 1:
        if not skip:
            yield 0, int(slot_ids[0]), 1
        return
    breaks = np.ones(len(slot_ids) + 1, dtype=np.bool_)
    breaks[1:-1] = (np.diff(slot_ids) != 1) | (slot_ids[1:] % piece_slots == 0)
    for chunk in skip:
        breaks[chunk : chunk + 2] = True
    edges = np.flatnonzero(breaks).tolist()
    for begin, end in itertools.pairwise(edges):
        if begin not in skip:
            yield begin, int(slot_ids[begin]), end - begin


def _slices(a: torch.Tensor, b: torch.Tensor) -> Iterator[Pair]:
    if a.numel() <= SLICE_BYTES:  # two splits cost its caller more than the rest of the copy
        yield a, b
        return
    rows = max(1, SLICE_BYTES // a.shape[1])
    for x, y in zip(torch.split(a, rows), torch.split(b, rows), strict=True):
        yield from zip(
            torch.split(x, SLICE_BYTES, dim=1), torch.split(y, SLICE_BYTES, dim=1), strict=True
        )
