"""Gather and scatter of pages in CPU memory by numpy and torch: what `host_pages` does where its C
code could not be compiled.

Each tensor's pages are moved by one call, on views that are made once for a table and the memory of
its slots: to make one takes as long as to copy a page.

Of few bytes numpy's calls are faster. Of many, torch's threads are. It has one fast indexed copy a
direction: `index_select` with a strided output (rows at random to rows in order) and `index_copy_`
from a strided source (the other way). Where the slots, or the blocks, are consecutive, one of them
moves every page straight to its place. Where neither is, a slice of rows that stays in the cache
goes through a temporary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from math import gcd
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from triton_offload.kernels.sums import Sums, sum_pages
from triton_offload.kernels.table import PageRow, PageTable

# Rows at a time through a temporary, which then stays in the cache. Smaller ones are slower, for
# each call wakes torch's threads: of a plain copy's speed, on two cores of an EPYC, 0.3 was reached
# with 512 KiB (4 KiB pages), 0.5 with 1 MiB, 0.55 with 4 MiB. A memmove a page is slower still, at
# any size of page. Calls that need no temporary are not cut.
_SLICE_BYTES = 4 << 20

# Up to so many bytes per tensor, numpy's calls are faster than torch's (two cores of a Xeon).
_SMALL_BYTES = 64 << 10

# Of these, pages from this size on are moved one by one: an indexed copy goes through a temporary.
_ONE_PAGE_BYTES = 4 << 10

# Of one tensor's pages, what is added up at once.
_SUMMED_BYTES = 1 << 20

# A table meets the pool's slots and those of a few staging buffers.
_MAX_PLACES = 16

_WORDS = (
    (16, np.complex128),
    (8, np.int64),
    (4, np.int32),
    (2, np.int16),
    (1, np.int8),
)


def move(
    gathers: bool,
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
    check: Callable[[], object],
    sums: torch.Tensor | None,
) -> None:
    """`host_pages.gather` or, without `gathers`, `host_pages.scatter`."""
    ids = block_ids, slots, slot_ids, first_block
    if _are_few(table, block_ids):
        for tensors, pairs in _pairs(table, *ids):
            _move_few(gathers, tensors, pairs)
    else:
        for tensors, blocks, places in _operands(table, *ids):
            _move_many(gathers, tensors, _row_numbers(blocks), _row_numbers(places), check)
    if sums is not None:
        _add_up(table, block_ids.numpy(), check, sums.numpy())


def _move_few(gathers: bool, tensors: list[_Tensor], pairs: list[tuple[_Index, _Index]]) -> None:
    for tensor in tensors:
        for block, place in pairs:
            if gathers:
                tensor.places[place] = tensor.pages[block]
            else:
                tensor.pages[block] = tensor.places[place]


def _move_many(
    gathers: bool, tensors: list[_Tensor], here: _Rows, there: _Rows, check: Callable[[], object]
) -> None:
    with torch.inference_mode():  # caches of an engine may be tensors of it
        for tensor in tensors:
            check()
            if gathers:
                _move_rows(tensor.page_words, here, tensor.place_words, there)
            else:
                _move_rows(tensor.place_words, there, tensor.page_words, here)


def _add_up(
    table: PageTable, block_ids: npt.NDArray[np.int64], check: Callable[[], object], sums: Sums
) -> None:
    """Of the pages, which both sides hold now: in slices, copies of which stay in the cache."""
    for page in table.pages:
        pages = page.view.numpy()
        step = max(1, _SUMMED_BYTES // page.page_bytes)
        check()
        for first in range(0, len(block_ids), step):
            part = slice(first, first + step)
            sums[part] += sum_pages(pages[block_ids[part]], page.first_row)


# -- views --

_Numbers: TypeAlias = npt.NDArray[np.int64] | slice
_Index: TypeAlias = _Numbers | int
_Views: TypeAlias = npt.NDArray[Any]


class _Tensor(NamedTuple):
    """A tensor's pages and their places in some slots: as arrays of one element a page, and as
    tensors of one row of words a page."""

    pages: _Views
    places: _Views
    page_words: torch.Tensor
    place_words: torch.Tensor


class _Plan:
    """The views of a table: its pages, and their places in each memory of slots that it has met,
    which they do not own. Those of tensors whose places have the same numbers are together, by how
    many places lie between two slots and between two positions (see `_places_of`)."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[int, int, int], dict[tuple[int, int], list[_Tensor]]] = {}

    def tensors(
        self, table: PageTable, slots: torch.Tensor
    ) -> dict[tuple[int, int], list[_Tensor]]:
        memory = slots.data_ptr(), slots.shape[0], slots.stride(0)
        found = self._tensors.get(memory)
        if found is None:
            found = {}
            for page in table.pages:
                steps, places = _places_of(page, *memory, table.blocks_per_chunk)
                found.setdefault(steps, []).append(_tensor(page.view.numpy(), places))
            if len(self._tensors) >= _MAX_PLACES:
                self._tensors.clear()
            self._tensors[memory] = found
        return found


_plans: WeakKeyDictionary[PageTable, _Plan] = WeakKeyDictionary()


def _plan_of(table: PageTable) -> _Plan:
    plan = _plans.get(table)
    if plan is None:
        plan = _plans[table] = _Plan()
    return plan


def _are_few(table: PageTable, block_ids: torch.Tensor) -> bool:
    return block_ids.shape[0] * table.bytes_per_block <= _SMALL_BYTES * len(table.pages)


def _pairs(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
) -> Iterator[tuple[list[_Tensor], list[tuple[_Index, _Index]]]]:
    """Tensors with what numpy is to move at once: indices of pages and of their places."""
    if table.bytes_per_block < _ONE_PAGE_BYTES * len(table.pages):
        for tensors, blocks, places in _operands(table, block_ids, slots, slot_ids, first_block):
            yield tensors, [(blocks, places)]
        return
    pages, slot, span = block_ids.tolist(), slot_ids.tolist(), table.blocks_per_chunk
    chunks = [divmod(number, span) for number in range(first_block, first_block + len(pages))]
    for (to_slot, to_position), tensors in _plan_of(table).tensors(table, slots).items():
        there = [slot[chunk] * to_slot + position * to_position for chunk, position in chunks]
        yield tensors, list(zip(pages, there, strict=True))


def _operands(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
) -> Iterator[tuple[list[_Tensor], _Numbers, _Numbers]]:
    """Tensors with the numbers of the pages and of the places that are to be moved.

    Of chunks of 32 pages of 4 KiB one call for each position reached 0.2 of a plain copy's speed,
    one for each chunk 0.3 to 0.5, one for all 0.5 to 0.65 (two cores of an EPYC).
    """
    ids = block_ids.numpy()
    slot: Any = slot_ids.numpy()
    position: Any = 0
    if table.blocks_per_chunk == 1:
        slot = slot[first_block : first_block + len(ids)]
    else:
        number = np.arange(first_block, first_block + len(ids))
        chunk, position = np.divmod(number, table.blocks_per_chunk)
        slot = slot[chunk]
    blocks = _numbers(ids)
    for (to_slot, to_position), tensors in _plan_of(table).tensors(table, slots).items():
        yield tensors, blocks, _numbers(slot * to_slot + position * to_position)


def _places_of(
    page: PageRow, address: int, num_slots: int, to_slot: int, span: int
) -> tuple[tuple[int, int], _Views]:
    """The places of one tensor in the slots, uint8 [places, page_bytes], and how many of them lie
    between two slots and between two positions.

    There is one at every place and, where a slot is no multiple of a pitch, between places too:
    such overlap, and are never named.
    """
    to_position = page.pitch if span > 1 else 0
    step = gcd(to_slot, to_position)
    num_rows = ((num_slots - 1) * to_slot + (span - 1) * to_position) // step + 1
    num_bytes = (num_rows - 1) * step + page.page_bytes
    memory: Any = (ctypes.c_char * num_bytes).from_address(address + page.offset)
    rows: _Views = np.ndarray((num_rows, page.page_bytes), np.uint8, memory, 0, (step, 1))
    return (to_slot // step, to_position // step), rows


def _tensor(pages: _Views, places: _Views) -> _Tensor:
    # Of a single row any stride will do, but not to torch.
    both = [rows if len(rows) > 1 else rows[0][None] for rows in (pages, places)]
    bits = pages.shape[1]
    for rows in both:
        bits |= rows.ctypes.data | rows.strides[0]
    word = next(word for size, word in _WORDS if bits % size == 0)
    whole = f"V{pages.shape[1]}"
    return _Tensor(
        pages.view(whole)[:, 0],
        places.view(whole)[:, 0],
        *(torch.from_numpy(rows.view(word)) for rows in both),
    )


def _numbers(ids: npt.NDArray[np.int64]) -> _Numbers:
    """Consecutive numbers as a slice, others as they are."""
    first, count = int(ids[0]), len(ids)
    if count == 1 or (ids[-1] - first == count - 1 and (ids[1:] - ids[:-1] == 1).all()):
        return slice(first, first + count)
    return ids


# -- many bytes --

_Rows: TypeAlias = torch.Tensor | slice


def _row_numbers(numbers: _Numbers) -> _Rows:
    return numbers if isinstance(numbers, slice) else torch.from_numpy(numbers)


def _move_rows(src: torch.Tensor, src_rows: _Rows, dst: torch.Tensor, dst_rows: _Rows) -> None:
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
