"""Gather and scatter of pages in CPU memory, in one pass where the ids allow it.

Of few bytes, each tensor's are moved by one call of numpy, on views that are made once for a table
and the memory of its slots: to make a view in torch takes as long as to copy a page, and an indexed
copy five times as long.

Of many, torch's threads are faster. It has one fast indexed copy a direction: `index_select` with a
strided output (rows at random to rows in order) and `index_copy_` from a strided source (the other
way). Where the slots, or the blocks, are consecutive, one of them moves every page straight to its
place. Where neither is, a slice of rows that stays in the cache goes through a temporary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from math import gcd
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from triton_offload.kernels.table import PageRow, PageTable

# Rows at a time through a temporary, which then stays in the cache. Smaller ones are slower, for
# each call wakes torch's threads: of a plain copy's speed, on two cores of an EPYC, 0.3 was reached
# with 512 KiB (4 KiB pages), 0.5 with 1 MiB, 0.55 with 4 MiB. A memmove a page is slower still, at
# any size of page. Calls that need no temporary are not cut.
_SLICE_BYTES = 4 << 20

# Up to so many bytes a tensor, a page is not cut into words, and no thread of torch's is woken.
_SMALL_BYTES = 256 << 10

# A table meets the pool's slots and those of a few staging buffers.
_MAX_PLACES = 16

_WORDS = (
    (16, torch.complex128),
    (8, torch.int64),
    (4, torch.int32),
    (2, torch.int16),
)


def gather(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Pages to slots: `kernels.reference.gather_pages` on checked int64 ids, tuned.

    `check` is called between two tensors; what it raises ends the work there.
    """
    if _are_few(table, block_ids):
        for tensors, blocks, chunks in _views(table, block_ids, slots, slot_ids, first_block):
            for pages, places in tensors:
                check()
                places[chunks] = pages[blocks]
        return
    with torch.inference_mode():  # a view costs less there
        for rows, there, ids, to in _operands(table, block_ids, slots, slot_ids, first_block):
            check()
            _move(rows, ids, there, to)


def scatter(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Slots to pages: `kernels.reference.scatter_pages`, likewise."""
    if _are_few(table, block_ids):
        for tensors, blocks, chunks in _views(table, block_ids, slots, slot_ids, first_block):
            for pages, places in tensors:
                check()
                pages[blocks] = places[chunks]
        return
    with torch.inference_mode():
        for rows, there, ids, to in _operands(table, block_ids, slots, slot_ids, first_block):
            check()
            _move(there, to, rows, ids)


# -- few bytes --

_Numbers: TypeAlias = npt.NDArray[np.int64] | slice
_Views: TypeAlias = npt.NDArray[Any]  # of one page an element


_Tensors: TypeAlias = list[tuple[_Views, _Views]]  # pages and places of each


class _Plan:
    """The views of a table: its pages, and their places in each memory of slots that it has met,
    which they do not own. Those of tensors whose places have the same numbers are together, by how
    many places lie between two slots and between two positions (see `_rows_of`)."""

    def __init__(self, table: PageTable) -> None:
        self._pages = [page.view.numpy().view(f"V{page.page_bytes}")[:, 0] for page in table.pages]
        self._places: dict[tuple[int, int, int], dict[tuple[int, int], _Tensors]] = {}

    def tensors(self, table: PageTable, slots: torch.Tensor) -> dict[tuple[int, int], _Tensors]:
        memory = slots.data_ptr(), slots.shape[0], slots.stride(0)
        found = self._places.get(memory)
        if found is None:
            found = {}
            for page, pages in zip(table.pages, self._pages, strict=True):
                steps, places = _places_of(page, *memory, table.blocks_per_chunk)
                found.setdefault(steps, []).append((pages, places))
            if len(self._places) >= _MAX_PLACES:
                self._places.clear()
            self._places[memory] = found
        return found


_plans: WeakKeyDictionary[PageTable, _Plan] = WeakKeyDictionary()


def _are_few(table: PageTable, block_ids: torch.Tensor) -> bool:
    return len(block_ids) * table.bytes_per_block <= _SMALL_BYTES * len(table.pages)


def _views(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
) -> Iterator[tuple[_Tensors, _Numbers, _Numbers]]:
    """Views of tensors with the numbers of the pages and of the places that are to be moved."""
    plan = _plans.get(table)
    if plan is None:
        plan = _plans[table] = _Plan(table)
    blocks = _numbers(block_ids.numpy())
    slot: Any = slot_ids.numpy()
    position: Any = 0
    if table.blocks_per_chunk == 1:
        slot = slot[first_block : first_block + len(block_ids)]
    else:
        number = np.arange(first_block, first_block + len(block_ids))
        chunk, position = np.divmod(number, table.blocks_per_chunk)
        slot = slot[chunk]
    for (to_slot, to_position), tensors in plan.tensors(table, slots).items():
        yield tensors, blocks, _numbers(slot * to_slot + position * to_position)


def _places_of(
    page: PageRow, address: int, num_slots: int, to_slot: int, span: int
) -> tuple[tuple[int, int], _Views]:
    to_position = page.pitch if span > 1 else 0
    step = gcd(to_slot, to_position)
    num_rows = ((num_slots - 1) * to_slot + (span - 1) * to_position) // step + 1
    num_bytes = (num_rows - 1) * step + page.page_bytes
    memory: Any = (ctypes.c_char * num_bytes).from_address(address + page.offset)
    rows: _Views = np.ndarray((num_rows,), f"V{page.page_bytes}", memory, 0, (step,))
    return (to_slot // step, to_position // step), rows


def _numbers(ids: npt.NDArray[np.int64]) -> _Numbers:
    """Consecutive numbers as a slice, others as they are."""
    first, count = int(ids[0]), len(ids)
    if count == 1 or (ids[-1] - first == count - 1 and (ids[1:] - ids[:-1] == 1).all()):
        return slice(first, first + count)
    return ids


# -- many --

_Rows = torch.Tensor | slice
_Operands = Iterator[tuple[torch.Tensor, torch.Tensor, _Rows, _Rows]]


def _operands(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
) -> _Operands:
    """Pages and places as rows of words, with the row numbers on each side: one call per tensor.

    Of chunks of 32 pages of 4 KiB one call for each position reached 0.2 of a plain copy's speed,
    one for each chunk 0.3 to 0.5, this 0.5 to 0.65 (two cores of an EPYC).
    """
    blocks = _as_rows(block_ids)
    number = first_block + torch.arange(len(block_ids), device="cpu")
    slot = slot_ids[number // table.blocks_per_chunk]
    position = number % table.blocks_per_chunk
    numbered: dict[tuple[int, int], _Rows] = {}  # places of many tensors have the same numbers
    for page in table.pages:
        pages, places, steps = _rows_of(page, slots, table.blocks_per_chunk)
        if steps not in numbered:
            numbered[steps] = _as_rows(slot * steps[0] + position * steps[1])
        yield pages, places, blocks, numbered[steps]


def _as_rows(ids: torch.Tensor) -> _Rows:
    """Consecutive ids as a slice, others as they are."""
    first = int(ids[0])
    if len(ids) == 1 or bool((ids[1:] - ids[:-1] == 1).all()):
        return slice(first, first + len(ids))
    return ids.contiguous()


def _rows_of(
    page: PageRow, slots: torch.Tensor, span: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """The pages, the places of one tensor in the slots, and how many rows of places lie between
    two slots and between two positions.

    Rows of places begin at every place and, where a slot is no multiple of a pitch, between places
    too: such rows overlap, and are never named.
    """
    to_slot, to_position = int(slots.stride(0)), page.pitch
    step = gcd(to_slot, to_position) if span > 1 else to_slot
    offset = int(slots.storage_offset()) + page.offset
    num_rows = ((slots.shape[0] - 1) * to_slot + (span - 1) * to_position) // step + 1
    pages = page.view
    places = slots.as_strided((num_rows, page.page_bytes), (step, 1), offset)
    bits = page.page_bytes | step | offset | int(pages.storage_offset())
    if pages.shape[0] > 1:
        bits |= int(pages.stride(0))
    for size, dtype in _WORDS:
        if bits % size == 0:
            pages, places = _in_words(pages, dtype, size), _in_words(places, dtype, size)
            break
    return pages, places, (to_slot // step, to_position // step)


def _in_words(rows: torch.Tensor, dtype: torch.dtype, size: int) -> torch.Tensor:
    # A single row may have any stride, which `view` would refuse.
    return rows[0].view(dtype)[None] if rows.shape[0] == 1 else rows.view(dtype)


def _move(src: torch.Tensor, src_rows: _Rows, dst: torch.Tensor, dst_rows: _Rows) -> None:
    if isinstance(src_rows, slice):
        if isinstance(dst_rows, slice):
            dst[dst_rows].copy_(src[src_rows])
        else:
            dst.index_copy_(0, dst_rows, src[src_rows])
    elif isinstance(dst_rows, slice):
        torch.index_select(src, 0, src_rows, out=dst[dst_rows])
    else:
        step = max(1, _SLICE_BYTES // (src.shape[1] * src.element_size()))
        for ids, to in zip(torch.split(src_rows, step), torch.split(dst_rows, step), strict=True):
            dst.index_copy_(0, to, src.index_select(0, ids))
