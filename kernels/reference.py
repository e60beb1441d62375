"""Gathering and scattering pages in plain torch: what the kernels are checked against.

Exact for every alignment, on any device. It is written to be read; it is not tuned.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from .block_run import Direction, Ids, check_run, check_slots
from .table import PageRow, PageTable, alignment_of

Array: TypeAlias = Any

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def gather_pages(
    table: PageTable,
    block_ids: Ids,
    slots: torch.Tensor,
    slot_ids: Ids | None = None,
    first_block: int = 0,
) -> None:
    """Copy the pages of a run of blocks into the slots of its chunks.

    ``block_ids[i]`` is block ``b = first_block + i`` of a run of chunks: with
    ``B = table.blocks_per_chunk`` its pages go to slot ``slot_ids[b // B]``, position ``b % B``.
    Every other byte of ``slots`` stays as it is.

    Args:
        table: Where the pages lie.
        block_ids: ``[n]`` ids of blocks to read; may repeat. List, numpy array or integer tensor:
            the caller's again on return, but for a tensor on the device (see the kernels').
        slots: uint8 ``[num_slots, >= table.slot_bytes]`` on the table's device, rows at any
            stride.
        slot_ids: ``[ceil((first_block + n) / B)]`` distinct slots, one for each chunk of the run;
            those of chunks before ``first_block`` are not looked at. None for 0, 1, ...
        first_block: Where in its run of chunks the first block lies.

    Raises:
        ValueError: An id out of range, a slot named twice, a wrong number of slot ids, or slots
            of another shape.
    """
    _transfer(table, block_ids, slots, slot_ids, first_block, "gather")


def scatter_pages(
    table: PageTable,
    block_ids: Ids,
    slots: torch.Tensor,
    slot_ids: Ids | None = None,
    first_block: int = 0,
) -> None:
    """Copy the pages of a run of blocks out of the slots of its chunks; see ``gather_pages``.

    Block ids must be distinct, slot ids may repeat. Every other byte of the cache stays as it is.
    """
    _transfer(table, block_ids, slots, slot_ids, first_block, "scatter")


def _transfer(
    table: PageTable,
    block_ids: Ids,
    slots: torch.Tensor,
    slot_ids: Ids | None,
    first_block: int,
    direction: Direction,
) -> None:
    check_slots(table, slots)
    if slots.device != table.device:
        raise ValueError(f"slots: expected a tensor on {table.device}, got one on {slots.device}")
    run = check_run(table, block_ids, slots.shape[0], slot_ids, first_block, direction=direction)
    if run.block_ids.shape[0] == 0:
        return
    blocks = run.block_ids.to(table.device)
    chunk_slots = run.slot_ids.to(table.device)
    places = run.first_block + torch.arange(blocks.shape[0], device=table.device)
    slot_of_block = chunk_slots[places // table.blocks_per_chunk]
    position_of_block = places % table.blocks_per_chunk
    for pages, slot_pages in views_of(table, slots):
        move_words(pages, blocks, slot_pages, slot_of_block, position_of_block, direction)


def views_of(table: PageTable, slots: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each tensor of the table its pages ``[num_blocks, words]`` and their places in the slots
    ``[num_slots, B, words]``, both as integers as wide as their alignment allows."""
    return [_in_widest_words(row, slots, table.blocks_per_chunk) for row in table.pages]


def move_words(
    pages: Array,
    blocks: Array,
    slot_pages: Array,
    slot_of_block: Array,
    position_of_block: Array,
    direction: Direction,
) -> None:
    """Move the pages of one tensor (see ``views_of``). Tensors all, or numpy arrays all."""
    if direction == "gather":
        slot_pages[slot_of_block, position_of_block] = pages[blocks]
    else:
        pages[blocks] = slot_pages[slot_of_block, position_of_block]


def _in_widest_words(
    row: PageRow, slots: torch.Tensor, blocks_per_chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    slot_pages = slots.as_strided(
        (slots.shape[0], blocks_per_chunk, row.page_bytes),
        (slots.stride(0), row.pitch, 1),
        slots.storage_offset() + row.offset,
    )
    word = 8
    for tensor in (row.view, slot_pages):
        # Strides of dims of size 1 take part in no address.
        strides = [
            int(stride)
            for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
            if size > 1
        ]
        parts = tensor.data_ptr(), int(tensor.storage_offset()), row.page_bytes, *strides
        word = min(word, alignment_of(*parts))
    return _as_words(row.view, word), _as_words(slot_pages, word)


def _as_words(tensor: torch.Tensor, word: int) -> torch.Tensor:
    """uint8 ``[..., bytes]`` as integers ``[..., bytes / word]``, over the same memory."""
    # Tensor.view(dtype) refuses strides that don't divide, even of dims of size 1.
    return torch.empty(0, dtype=_WORDS[word], device=tensor.device).set_(
        tensor.untyped_storage(),
        tensor.storage_offset() // word,
        (*tensor.shape[:-1], tensor.shape[-1] // word),
        (*(stride // word for stride in tensor.stride()[:-1]), 1),
    )
