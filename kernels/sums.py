"""Sums of pages, by which bytes that have changed are known again.

A page is cut into rows of ``ROW_BYTES`` bytes, the last of which may be shorter, and a row into
little-endian words of 8 bytes (bytes that are missing from a last word are zeros). The sum of a
block is

    sum over all rows of all its pages of    multiplier(number of the row) * (sum of its words)

modulo 2**64. Rows are numbered through the pages of a cache (``PageRow.first_row``): the same for
all tables of its pages, wherever these lie, so that what some of its tensors and the others add to
a sum is the sum of all.

* Multipliers are odd, so that whatever changes within one word changes the sum: a flipped bit, a
  byte, a stale word. They differ from row to row, so that rows, pages and tensors that changed
  places are noticed, and zeros or another chunk's bytes in place of a row, but for one time in
  2**63 where bytes are random.
* Words that changed places within a row are not noticed, nor are two flips in one row that cancel
  each other. That is the price of one addition for 8 bytes, all that a CPU has time for.
* It is addition, so that parts of a block may be summed in any order, on their way, and by words of
  any width: a word of ``k`` bytes counts 256**(its place modulo 8).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .table import ROW_BYTES, PageTable, num_rows

__all__ = ["multipliers", "slot_sums", "sum_pages"]

#: 2**64 over the golden ratio, odd; the kernels have it too
MIX = 0x9E3779B97F4A7C15

Sums = npt.NDArray[np.int64]


def multipliers(first: int, count: int) -> Sums:
    """int64 ``[count]``, all odd: those of the rows from ``first`` on, modulo 2**64."""
    mixed = np.arange(first + 1, first + 1 + count, dtype=np.uint64) * np.uint64(MIX)
    mixed ^= mixed >> np.uint64(32)
    return (mixed | np.uint64(1)).view(np.int64)


def sum_pages(pages: npt.NDArray[Any], first_row: int) -> Sums:
    """int64 ``[n]``: what each of some pages, uint8 ``[n, page_bytes]``, adds to its block's sum.

    Written to be read: what the kernels and the host's sums are checked against.
    """
    count, page_bytes = pages.shape
    rows = num_rows(page_bytes)
    padded = np.zeros((count, rows * ROW_BYTES), np.uint8)
    padded[:, :page_bytes] = pages
    words = padded.view("<i8").reshape(count, rows, ROW_BYTES // 8)
    return weigh(words.sum(axis=2, dtype=np.int64), first_row)


def slot_sums(table: PageTable, slot: npt.NDArray[np.uint8]) -> Sums:
    """int64 ``[blocks_per_chunk]``: the sum of each block in a slot, uint8 ``[slot_bytes]``."""
    sums = np.zeros(table.blocks_per_chunk, np.int64)
    for row in table.pages:
        for position in range(table.blocks_per_chunk):
            begin = row.offset + position * row.pitch
            page = slot[None, begin : begin + row.page_bytes]
            sums[position : position + 1] += sum_pages(page, row.first_row)  # scalars would warn
    return sums


def weigh(row_sums: Sums, first_row: int) -> Sums:
    """int64 ``[n]``: sums of rows, int64 ``[n, rows]``, times their multipliers, added up."""
    # Integers of numpy wrap around without a word, as they are to.
    return np.asarray(row_sums @ multipliers(first_row, row_sums.shape[1]), dtype=np.int64)
