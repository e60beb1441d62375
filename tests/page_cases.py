"""Cases of gather and scatter, and what every byte must be after them.

Each is checked against a few lines of Python over whole storages, so that a byte moved to the wrong
place, or one too many, shows wherever it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from triton_offload.kernels.table import PageTable
from triton_offload.kernels.tiling import KernelConfig

# Small tiles and an odd number of programs: the cases take several tiles, strips and programs.
SMALL = KernelConfig(warps=1, tile_bytes=1024, programs=3)


@dataclass(frozen=True)
class Tensor:
    page_bytes: int
    gap: int = 0
    """Bytes between a page and the next."""
    start: int = 0
    """Bytes before the first page, from a 64-byte boundary."""


@dataclass(frozen=True)
class Case:
    tensors: tuple[Tensor, ...]
    block_ids: tuple[int, ...]
    blocks_per_chunk: int = 1
    first_block: int = 0
    slot_ids: tuple[int, ...] | None = None
    num_blocks: int = 7
    num_slots: int = 6
    slot_gap: int = 0
    slot_start: int = 0


CASES = {
    "whole chunks": Case((Tensor(64), Tensor(32)), (3, 1, 0, 6), 2),
    "partial first chunk": Case((Tensor(64), Tensor(32)), (3, 1, 0, 6, 2), 4, 3),
    "partial last chunk": Case((Tensor(48),), (3, 1, 0, 6, 2), 3, 0),
    "one block inside a chunk": Case((Tensor(64), Tensor(16)), (5,), 3, 1),
    "a run that starts chunks later": Case((Tensor(64),), (5, 4, 0), 2, 5, (1, 1, 4, 1)),
    "the first slots by default": Case((Tensor(64),), (5, 4, 0), 2, 5),
    "slots apart and out of order": Case((Tensor(64, 64),), (3, 1, 0, 6, 2), 2, 1, (5, 0, 2)),
    "zero blocks": Case((Tensor(64),), (), 2, 1, ()),
    "alignment 8": Case((Tensor(64, 8), Tensor(64, 0, 8)), (3, 1, 0), 1, 0, None),
    "alignment 4": Case((Tensor(64, 4), Tensor(36)), (3, 1, 0), 2),
    "alignment 2": Case((Tensor(64, 2), Tensor(64, 0, 2)), (3, 1, 0), 2),
    "alignment 1": Case((Tensor(64, 1), Tensor(33)), (3, 1, 0), 2),
    "a different alignment each": Case(
        (Tensor(64), Tensor(24), Tensor(4), Tensor(6), Tensor(1), Tensor(32)), (3, 1, 0), 4, 1
    ),
    "a page whose place in the slot is aligned to less": Case(
        (Tensor(24), Tensor(64)), (3, 1, 0), slot_gap=8
    ),
    "slots off by one byte": Case((Tensor(64),), (3, 1, 0), slot_start=1),
    "a single slot": Case((Tensor(64), Tensor(32)), (3, 1), 2, num_slots=1, slot_gap=1),
    "a slot that is no multiple of a pitch": Case((Tensor(64), Tensor(48)), (3, 1, 0, 2, 5), 3, 1),
    "slots 4 bytes apart": Case((Tensor(64),), (3, 1, 0), slot_gap=4),
    "pages of an odd size": Case((Tensor(577, 3),), (3, 1, 0, 2), 2, 1),
    "pages of several strips": Case((Tensor(1152), Tensor(2048), Tensor(4112)), (3, 1, 0, 2), 3),
    "pages of one byte": Case((Tensor(1, 1),), (3, 1, 0, 2), 3, 2),
}

Move: TypeAlias = Callable[..., object]


def noise(num_bytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (num_bytes + 64,), dtype=torch.uint8, generator=generator)
    assert data.data_ptr() % 64 == 0
    return data


def check(case: Case, direction: str, move: Move, config: KernelConfig | None = SMALL) -> None:
    """Let ``move(direction, table, block_ids, slots, slot_ids, first_block, config=config)`` move a
    case, and compare every byte of every storage, and what lies between and behind the pages."""
    strides = [t.page_bytes + t.gap for t in case.tensors]
    caches = [
        noise(t.start + case.num_blocks * stride, seed)
        for seed, (t, stride) in enumerate(zip(case.tensors, strides, strict=True))
    ]
    views = [
        cache.as_strided((case.num_blocks, t.page_bytes), (stride, 1), t.start)
        for cache, t, stride in zip(caches, case.tensors, strides, strict=True)
    ]
    slot_bytes = case.blocks_per_chunk * sum(t.page_bytes for t in case.tensors)
    stride_slot = slot_bytes + case.slot_gap
    pool = noise(case.slot_start + case.num_slots * stride_slot, 99)
    slots = pool.as_strided((case.num_slots, slot_bytes), (stride_slot, 1), case.slot_start)

    expected = [cache.numpy().copy() for cache in caches]
    expected_pool = pool.numpy().copy()
    for i, block in enumerate(case.block_ids):
        chunk, place = divmod(case.first_block + i, case.blocks_per_chunk)
        slot = chunk if case.slot_ids is None else case.slot_ids[chunk]
        in_slot = case.slot_start + slot * stride_slot
        for t, stride, cache in zip(case.tensors, strides, expected, strict=True):
            in_cache = t.start + block * stride
            page = slice(in_cache, in_cache + t.page_bytes)
            begin = in_slot + place * t.page_bytes
            piece = slice(begin, begin + t.page_bytes)
            if direction == "gather":
                expected_pool[piece] = cache[page]
            else:
                cache[page] = expected_pool[piece]
            in_slot += case.blocks_per_chunk * t.page_bytes

    table = PageTable(views, case.blocks_per_chunk)
    ids = None if case.slot_ids is None else list(case.slot_ids)
    move(direction, table, list(case.block_ids), slots, ids, case.first_block, config=config)
    assert torch.equal(pool, torch.from_numpy(expected_pool))
    for storage, wanted in zip(caches, expected, strict=True):
        assert torch.equal(storage, torch.from_numpy(wanted))
