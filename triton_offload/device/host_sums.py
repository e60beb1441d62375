"""Gather and scatter of pages in CPU memory that add the pages up as they pass.

A slice of a tensor's pages is moved, and what lies in order of it (the slots, or where these do
not, the pages) is added up before the next slice comes. Adding up 256 KiB from the cache runs at
40 GB/s of one thread (Xeon at 2.5 GHz); what a copy has just moved reaches 10 to 15, for copies of
long rows leave little of it there. So a transfer takes 1.4 times as long or more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from triton_offload.device import host_pages
from triton_offload.kernels.sums import Sums, weigh
from triton_offload.kernels.table import ROW_BYTES, PageTable, num_rows

# Pages that are moved before they are added up. Smaller slices cost more calls than they save.
_SLICE_BYTES = 1 << 20

_ROW_WORDS = ROW_BYTES // 8


def move(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
    check: Callable[[], object],
    *,
    sums: torch.Tensor,
    gathers: bool,
) -> None:
    """`host_pages.gather` or, without `gathers`, `host_pages.scatter`; what the pages of block i
    add up to (see `kernels.sums`) is added to `sums[i]`, int64 `[len(block_ids)]`."""
    starts = [0, *itertools.accumulate(num_rows(page.page_bytes) for page in table.pages)]
    row_sums = np.empty((len(block_ids), starts[-1]), np.int64)
    few = host_pages.are_few(table, block_ids)
    operands = host_pages.operands(table, block_ids, slots, slot_ids, first_block)
    for tensors, blocks, places in operands:
        for tensor in tensors:
            check()
            out = row_sums[:, starts[tensor.number] : starts[tensor.number + 1]]
            step = len(out) if few else max(1, _SLICE_BYTES // tensor.page_rows.shape[1])
            for first in range(0, len(out), step):
                part = _part(blocks, first, step), _part(places, first, step)
                _move(tensor, *part, few=few, gathers=gathers)
                _add_up(_in_order(tensor, *part), out[first : first + step], few=few)
    total = sums.numpy()
    for begin, end, first_row in _runs_of_rows(table, starts):
        total += weigh(row_sums[:, begin:end], first_row)


def _runs_of_rows(table: PageTable, starts: list[int]) -> list[tuple[int, int, int]]:
    """Rows `[begin, end)` of a table whose numbers follow each other, and the first's number. Of
    most tables those are all; of a part of a cache's tensors there may be gaps."""
    runs: list[tuple[int, int, int]] = []
    for page, (begin, end) in zip(table.pages, itertools.pairwise(starts), strict=True):
        if runs and page.first_row - runs[-1][2] == begin - runs[-1][0]:
            runs[-1] = (runs[-1][0], end, runs[-1][2])
        else:
            runs.append((begin, end, page.first_row))
    return runs


def _move(
    tensor: host_pages.Tensor,
    blocks: host_pages.Numbers,
    places: host_pages.Numbers,
    *,
    few: bool,
    gathers: bool,
) -> None:
    if few and gathers:
        tensor.places[places] = tensor.pages[blocks]
    elif few:
        tensor.pages[blocks] = tensor.places[places]
    else:
        ends = [
            (tensor.page_words, host_pages.row_numbers(blocks)),
            (tensor.place_words, host_pages.row_numbers(places)),
        ]
        source, target = ends if gathers else reversed(ends)
        with torch.inference_mode():  # caches of an engine may be tensors of it
            host_pages.move_rows(*source, *target)


def _in_order(
    tensor: host_pages.Tensor, blocks: host_pages.Numbers, places: host_pages.Numbers
) -> npt.NDArray[Any]:
    """The pages that were moved, as bytes `[n, page_bytes]`: a view where they lie in order."""
    in_cache = isinstance(blocks, slice) and not isinstance(places, slice)
    return tensor.page_rows[blocks] if in_cache else tensor.place_rows[places]


def _add_up(pages: npt.NDArray[Any], out: Sums, *, few: bool) -> None:
    """Each row of each page, into int64 `[n, rows]`."""
    page_bytes = pages.shape[1]
    if (page_bytes | pages.strides[0] | pages.ctypes.data) % 8:  # words must not lie askew
        words = np.zeros((len(pages), -(-page_bytes // 8) * 8), np.uint8)
        words[:, :page_bytes] = pages
        pages = words
    words = pages.view(np.int64)
    whole = words.shape[1] // _ROW_WORDS
    rows = words[:, : whole * _ROW_WORDS].reshape(len(words), whole, _ROW_WORDS)
    if few or not whole:
        np.add.reduce(rows, axis=2, out=out[:, :whole])
    else:  # torch's threads
        torch.sum(torch.from_numpy(rows), 2, out=torch.from_numpy(out[:, :whole]))
    if words.shape[1] % _ROW_WORDS:
        np.add.reduce(words[:, whole * _ROW_WORDS :], axis=1, out=out[:, whole])


def _part(numbers: host_pages.Numbers, first: int, count: int) -> host_pages.Numbers:
    if isinstance(numbers, slice):
        first += numbers.start
        return slice(first, min(first + count, numbers.stop))
    return numbers[first : first + count]
