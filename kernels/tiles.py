"""A tile of pages, as kernels see it: its axes, and where its words lie."""

from __future__ import annotations

import triton
import triton.language as tl

# Tiles have three axes: spans of words, pages, and the words of a span. Warps are dealt to the
# words of a span, then to pages (PAGE_AXIS sees to it), so that a thread has few pages, and of each
# one address and many offsets.


@triton.jit  # type: ignore[untyped-decorator]
def over_pages(values, PAGE_AXIS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    if PAGE_AXIS == 1:
        return values[None, :, None]
    else:
        return values[:, None, None]


@triton.jit  # type: ignore[untyped-decorator]
def word_numbers(  # type: ignore[no-untyped-def]
    WORDS: tl.constexpr,  # noqa: N803
    SPAN: tl.constexpr,  # noqa: N803
    PAGE_AXIS: tl.constexpr,  # noqa: N803
    FOLD: tl.constexpr,  # noqa: N803
):
    """Where the words of a tile lie in their strips. FOLD warps share a page, and what each has of
    it lies together: so a thread's words are of few rows (see `adding`)."""
    span = tl.arange(0, WORDS // SPAN)
    if FOLD > 1:
        span = span % FOLD * (WORDS // SPAN // FOLD) + span // FOLD
    span *= SPAN
    lane = tl.arange(0, SPAN)[None, None, :]
    if PAGE_AXIS == 1:
        return span[:, None, None] + lane
    else:
        return span[None, :, None] + lane


@triton.jit  # type: ignore[untyped-decorator]
def tile_mask(  # type: ignore[no-untyped-def]
    elements,
    live,
    WORD_BYTES: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
    SPAN: tl.constexpr,  # noqa: N803
    EXACT: tl.constexpr,  # noqa: N803
    PAGE_AXIS: tl.constexpr,  # noqa: N803
    FOLD: tl.constexpr,  # noqa: N803
):
    mask = over_pages(live, PAGE_AXIS)
    if not EXACT:
        if WORD_BYTES == 16:
            # Even, and the compiler sees that it is: else the mask makes accesses narrower.
            elements = elements // 2 * 2
        mask = mask & (word_numbers(WORDS, SPAN, PAGE_AXIS, FOLD) < elements)
    return mask


@triton.jit  # type: ignore[untyped-decorator]
def pointers(  # type: ignore[no-untyped-def]
    address,
    WORD_BYTES: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
    SPAN: tl.constexpr,  # noqa: N803
    PAGE_AXIS: tl.constexpr,  # noqa: N803
    FOLD: tl.constexpr,  # noqa: N803
):
    """Pointers to the words of a tile, of the strips' addresses int64 [PAGES]."""
    if WORD_BYTES >= 8:
        element = tl.pointer_type(tl.int64)
    elif WORD_BYTES == 4:
        element = tl.pointer_type(tl.int32)
    elif WORD_BYTES == 2:
        element = tl.pointer_type(tl.int16)
    else:
        element = tl.pointer_type(tl.int8)
    strip = over_pages(address, PAGE_AXIS).to(element)
    # The compiler can't see the alignment of what was read from a table.
    strip = tl.multiple_of(strip, (WORD_BYTES, WORD_BYTES, WORD_BYTES))
    return strip + word_numbers(WORDS, SPAN, PAGE_AXIS, FOLD)
