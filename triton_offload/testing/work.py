"""What simulated kernels do, and how work is told to a reader."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Literal, NamedTuple

import numpy as np
import torch

from triton_offload.kernels import reference
from triton_offload.kernels.sums import sum_pages
from triton_offload.kernels.table import PageTable
from triton_offload.specs import Ids
from triton_offload.testing.places import Views


def run_kernel(
    kind: Literal["gather", "scatter"],
    table: PageTable,
    block_ids: torch.Tensor,
    views: Views,
    slot_ids: torch.Tensor,
    first_block: int,
    sums: torch.Tensor | None = None,
) -> None:
    """Move the pages, by the reference kernels, and add them up as they pass. The ids are read now,
    and only now."""
    places = first_block + np.arange(len(block_ids))
    chunk, position = np.divmod(places, table.blocks_per_chunk)
    blocks, slot_of_block = block_ids.numpy(), slot_ids.numpy()[chunk]
    for pages, slot_pages in views:
        reference.move_words(pages, blocks, slot_pages, slot_of_block, position, kind)
    if sums is None:
        return
    for page, (pages, slot_pages) in zip(table.pages, views, strict=True):
        moved = pages[blocks] if kind == "scatter" else slot_pages[slot_of_block, position]
        sums.numpy()[:] += sum_pages(moved.view(np.uint8), page.first_row)


def flip_bit(memory: torch.Tensor, rng: Random) -> None:
    """Flip one bit of uint8 `[bytes]` or `[rows, bytes]`."""
    place = tuple(rng.randrange(size) for size in memory.shape)
    memory[place] ^= 1 << rng.randrange(8)


class Launch(NamedTuple):
    """What a kernel was given, for a reader."""

    blocks: Ids
    chunks: Ids
    slots: torch.Tensor

    def __str__(self) -> str:
        count = f"{self.slots.shape[0]} slots at {self.slots.data_ptr():#x}"
        return f"blocks {self.blocks.tolist()}, chunks {self.chunks.tolist()} of {count}"


class Pair(NamedTuple):
    """What a copy was given, for a reader."""

    text: Callable[[torch.Tensor], str]
    src: torch.Tensor
    dst: torch.Tensor

    def __str__(self) -> str:
        return f"{self.text(self.src)} to {self.text(self.dst)}"
