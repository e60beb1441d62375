"""What kernels add up of the pages that they move: see `sums` for the formula."""

from __future__ import annotations

import triton
import triton.language as tl

from .sums import MIX as _MIX
from .table import ROW_BYTES as _ROW_BYTES
from .tiles import over_pages

# As the kernels take them: constants, and what is signed like all else there.
ROW_BYTES = tl.constexpr(_ROW_BYTES)
MIX = tl.constexpr(_MIX - (1 << 64))

# A thread adds up what it moves of its pages, over all their strips, and hands it on once: no
# thread waits for another. Its words of one row are added before they are multiplied, for that
# takes a card as long as three additions.


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
    return tl.load(strips.to(tl.pointer_type(tl.int64)) + num_strips * 5 + strip).to(tl.int32)


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
    """What a thread has of each row of a page, times the row's multiplier, added up over the rows.
    Words narrower than 8 bytes count as the first of theirs: `add_to` moves them."""
    ELEMENT: tl.constexpr = 8 if WORD_BYTES > 8 else WORD_BYTES  # noqa: N806
    PAGES: tl.constexpr = words.shape[PAGE_AXIS]  # noqa: N806
    SPANS: tl.constexpr = WORDS // SPAN // FOLD  # noqa: N806
    # A strip is one row, a part of one, or begins with one; so is a thread's part of it.
    PART: tl.constexpr = SPANS * SPAN * ELEMENT  # noqa: N806
    ROWS: tl.constexpr = PART // ROW_BYTES if PART > ROW_BYTES else 1  # noqa: N806
    values = words.to(tl.int64)
    if ELEMENT < 8:
        values &= (1 << 8 * ELEMENT) - 1
    if WORD_BYTES > 8:  # two words of an access, and so of one row
        first, second = tl.split(
            tl.reshape(values, (values.shape[0], values.shape[1], SPAN // 2, 2))
        )
        values = first + second
    LANES: tl.constexpr = values.shape[2]  # noqa: N806
    if PAGE_AXIS == 1:
        values = tl.sum(tl.reshape(values, (ROWS, SPANS // ROWS, FOLD, PAGES, LANES)), 1)
    else:
        values = tl.sum(tl.reshape(values, (PAGES, ROWS, SPANS // ROWS, FOLD, LANES)), 2)
    number = (row + 1 + tl.arange(0, FOLD) * PART // ROW_BYTES).to(tl.int64) * MIX
    further = tl.arange(0, ROWS).to(tl.int64) * MIX
    if PAGE_AXIS == 1:
        mixed = number[None, :, None, None] + further[:, None, None, None]
    else:
        mixed = number[None, None, :, None] + further[None, :, None, None]
    values *= mixed ^ ((mixed >> 32) & 0xFFFFFFFF) | 1
    if PAGE_AXIS == 1:
        return tl.sum(values, 0)
    else:
        return tl.sum(values, 1)


@triton.jit  # type: ignore[untyped-decorator]
def add_to(  # type: ignore[no-untyped-def]
    sums,
    total,
    first_page,
    num_blocks,
    WORD_BYTES: tl.constexpr,  # noqa: N803
    PAGES: tl.constexpr,  # noqa: N803
    PAGE_AXIS: tl.constexpr,  # noqa: N803
):
    if WORD_BYTES < 8:  # to their places among 8 bytes
        place = tl.arange(0, total.shape[2]).to(tl.int64) * WORD_BYTES % 8 * 8
        total = total << place[None, None, :]
    page = first_page + tl.arange(0, PAGES)
    target = over_pages(sums.to(tl.pointer_type(tl.int64)) + page, PAGE_AXIS)
    live = over_pages(page < num_blocks, PAGE_AXIS)
    target, total = tl.broadcast(target, total)
    live, total = tl.broadcast(live, total)
    tl.atomic_add(target, total, mask=live, sem="relaxed")
