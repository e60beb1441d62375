"""What kernels add up of the pages that they move: see `sums` for the formula."""

from __future__ import annotations

import triton
import triton.language as tl

from .sums import MIX as _MIX
from .table import ROW_BYTES as _ROW_BYTES
from .tiles import over_pages, word_numbers

# As the kernels take them: constants, and what is signed like all else there.
ROW_BYTES = tl.constexpr(_ROW_BYTES)
MIX = tl.constexpr(_MIX - (1 << 64))

# A thread adds up what it moves of its pages, over all their strips, and hands it on once: no
# thread waits for another.


@triton.jit  # type: ignore[untyped-decorator]
def no_sum(  # type: ignore[no-untyped-def]
    WORD_BYTES: tl.constexpr,  # noqa: N803
    PAGES: tl.constexpr,  # noqa: N803
    SPAN: tl.constexpr,  # noqa: N803
    PAGE_AXIS: tl.constexpr,  # noqa: N803
    FOLD: tl.constexpr,  # noqa: N803
):
    LANES: tl.constexpr = SPAN // 2 if WORD_BYTES == 16 else SPAN  # noqa: N806
    if PAGE_AXIS == 1:
        return tl.zeros((FOLD, PAGES, LANES), tl.int64)
    else:
        return tl.zeros((PAGES, FOLD, LANES), tl.int64)


@triton.jit
def first_row(strips, num_strips, strip):  # type: ignore[no-untyped-def]
    """The number of the first row of a strip."""
    return tl.load(strips.to(tl.pointer_type(tl.int64)) + num_strips * 5 + strip)


@triton.jit  # type: ignore[untyped-decorator]
def weighted(  # type: ignore[no-untyped-def]
    words,
    row,
    WORD_BYTES: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
    SPAN: tl.constexpr,  # noqa: N803
    PAGE_AXIS: tl.constexpr,  # noqa: N803
    FOLD: tl.constexpr,  # noqa: N803
):
    """Each word of a tile times the multiplier of its row, added up over what a thread has of each
    page."""
    ELEMENT: tl.constexpr = 8 if WORD_BYTES > 8 else WORD_BYTES  # noqa: N806
    PAIR: tl.constexpr = WORD_BYTES // ELEMENT  # noqa: N806
    PAGES: tl.constexpr = words.shape[PAGE_AXIS]  # noqa: N806
    SPANS: tl.constexpr = WORDS // SPAN // FOLD  # noqa: N806
    place = word_numbers(WORDS // PAIR, SPAN // PAIR, PAGE_AXIS) * PAIR
    values = words.to(tl.int64)
    if ELEMENT < 8:
        values = (values & ((1 << 8 * ELEMENT) - 1)) << (place * ELEMENT % 8 * 8).to(tl.int64)
    if PAIR == 2:  # of one access, and so of one row
        first, second = tl.split(
            tl.reshape(values, (values.shape[0], values.shape[1], SPAN // 2, 2))
        )
        values = first + second
    # A strip is one row, a part of one, or begins with one.
    number = row + 1
    if WORDS * ELEMENT > ROW_BYTES:
        number += place * ELEMENT // ROW_BYTES
    mixed = number * MIX
    values *= mixed ^ ((mixed >> 32) & 0xFFFFFFFF) | 1
    if PAGE_AXIS == 1:
        return tl.sum(tl.reshape(values, (SPANS, FOLD, PAGES, SPAN // PAIR)), 0)
    else:
        return tl.sum(tl.reshape(values, (PAGES, SPANS, FOLD, SPAN // PAIR)), 1)


@triton.jit  # type: ignore[untyped-decorator]
def add_to(  # type: ignore[no-untyped-def]
    sums,
    total,
    first_page,
    num_blocks,
    PAGES: tl.constexpr,  # noqa: N803
    PAGE_AXIS: tl.constexpr,  # noqa: N803
):
    page = first_page + tl.arange(0, PAGES)
    target = over_pages(sums.to(tl.pointer_type(tl.int64)) + page, PAGE_AXIS)
    live = over_pages(page < num_blocks, PAGE_AXIS)
    target, total = tl.broadcast(target, total)
    live, total = tl.broadcast(live, total)
    tl.atomic_add(target, total, mask=live, sem="relaxed")
