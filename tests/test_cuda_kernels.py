"""On a GPU: gather and scatter of generated tables move these bytes and no other.

Each case comes from a seed, and is checked against a few lines of Python over whole storages, so
that a byte moved to the wrong place, or one too many, shows wherever it lies. Needs torch, triton
and pytest alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from triton_offload.kernels import pages
from triton_offload.kernels.table import PageTable
from triton_offload.kernels.tiling import KernelConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CASES = 200
NUM_BLOCKS, NUM_SLOTS = 24, 26
# Each launch is compiled for a word and a width of strip: few of them, so that a minute is enough.
PAGE_BYTES = (24, 128, 1152, 4096)
SHIFTS = (0, 0, 0, 8, 1)
# Small tiles and an odd number of programs: the cases take several tiles, strips and programs.
SMALL = KernelConfig(warps=1, tile_bytes=1024, programs=3)
CONFIGS = (SMALL, None)  # None: as the kernels choose for these slots


@dataclass(frozen=True)
class Tensor:
    """A page, the bytes after each, and the bytes before the first."""

    page_bytes: int
    gap: int
    start: int

    @property
    def stride(self) -> int:
        return self.page_bytes + self.gap


@dataclass(frozen=True)
class Case:
    direction: str
    tensors: tuple[Tensor, ...]
    blocks_per_chunk: int
    first_block: int
    block_ids: tuple[int, ...]
    slot_ids: tuple[int, ...]
    slot_gap: int
    slot_start: int
    mapped: bool
    config: KernelConfig | None

    @property
    def slot_bytes(self) -> int:
        return self.blocks_per_chunk * sum(tensor.page_bytes for tensor in self.tensors)

    @property
    def slot_stride(self) -> int:
        return self.slot_bytes + self.slot_gap


def generate(seed: int) -> Case:
    rng = random.Random(seed)
    shift = rng.choice(SHIFTS)
    tensors = tuple(
        Tensor(rng.choice(PAGE_BYTES), rng.choice((0, shift)), rng.choice((0, shift)))
        for _ in range(rng.randint(1, 4))
    )
    blocks_per_chunk = rng.randint(1, 4)
    first_block = rng.randrange(blocks_per_chunk)
    count = rng.randint(1, NUM_BLOCKS)
    num_chunks = -(-(first_block + count) // blocks_per_chunk)
    return Case(
        direction=rng.choice(("gather", "scatter")),
        tensors=tensors,
        blocks_per_chunk=blocks_per_chunk,
        first_block=first_block,
        block_ids=tuple(rng.sample(range(NUM_BLOCKS), count)),
        slot_ids=tuple(rng.sample(range(NUM_SLOTS), num_chunks)),
        slot_gap=rng.choice((0, 0, shift)),
        slot_start=rng.choice((0, 0, shift)),
        mapped=rng.random() < 0.5,
        config=rng.choice(CONFIGS),
    )


def noise(num_bytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes + 64,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("seed", range(CASES))
def test_generated_tables_move_these_bytes_and_no_other(seed: int) -> None:
    case = generate(seed)
    caches = [
        noise(tensor.start + NUM_BLOCKS * tensor.stride, number)
        for number, tensor in enumerate(case.tensors)
    ]
    pool = noise(case.slot_start + NUM_SLOTS * case.slot_stride, 99)
    on_card = [cache.cuda() for cache in caches]
    slots_memory = pool.pin_memory() if case.mapped else pool.cuda()

    expected = [cache.clone() for cache in caches]
    expected_pool = pool.clone()
    for number, block in enumerate(case.block_ids):
        chunk, place = divmod(case.first_block + number, case.blocks_per_chunk)
        in_slot = case.slot_start + case.slot_ids[chunk] * case.slot_stride
        for tensor, cache in zip(case.tensors, expected, strict=True):
            in_cache = tensor.start + block * tensor.stride
            page = slice(in_cache, in_cache + tensor.page_bytes)
            begin = in_slot + place * tensor.page_bytes
            piece = slice(begin, begin + tensor.page_bytes)
            if case.direction == "gather":
                expected_pool[piece] = cache[page]
            else:
                cache[page] = expected_pool[piece]
            in_slot += case.blocks_per_chunk * tensor.page_bytes

    views = [
        cache.as_strided((NUM_BLOCKS, tensor.page_bytes), (tensor.stride, 1), tensor.start)
        for cache, tensor in zip(on_card, case.tensors, strict=True)
    ]
    shape, strides = (NUM_SLOTS, case.slot_bytes), (case.slot_stride, 1)
    slots = slots_memory.as_strided(shape, strides, case.slot_start)
    move = {"gather": pages.gather_pages, "scatter": pages.scatter_pages}[case.direction]
    move(
        PageTable(views, case.blocks_per_chunk),
        list(case.block_ids),
        slots,
        list(case.slot_ids),
        case.first_block,
        config=case.config,
    )
    torch.cuda.synchronize()
    assert torch.equal(slots_memory.cpu(), expected_pool)
    for cache, wanted in zip(on_card, expected, strict=True):
        assert torch.equal(cache.cpu(), wanted)
