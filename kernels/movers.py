"""The two kernels that move tiles of pages, from the cache to slots and back.

They are byte movers: they see addresses, strides and sizes, never dtypes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .adding import add_to, first_row, no_sum, weighted
from .tiles import pointers, tile_mask

# The two kernels move the same tiles in opposite directions.
#
#   strips     int64 [num_strips, 5]: address of the strip in block 0, bytes between blocks,
#              elements, offset in the slot, bytes between pages in the slot; behind them all
#              int64 [num_strips], the number of the first row of each (see `sums`)
#   block_ids  int64 [num_blocks]
#   slot_ids   int64 [ceil((first_block + num_blocks) / blocks_per_chunk)]
#   sums       int64 [num_blocks]: what the pages of a block add up to is added; None: nothing is
#
# A strip is the part of at most WORDS elements of every page of one tensor; a tile is that part of
# PAGES pages. Tiles are numbered with the strips of the same pages together, and a program takes
# tiles_per_program of them in a row, so that ids are read once per PAGES blocks: they may lie in
# host memory, a round trip away. While the bytes of a tile are on their way, a program reads where
# the next tile lies. The tile after the last one has no page, and a row of the table all the same.


@triton.jit  # type: ignore[untyped-decorator]
def gather_kernel(  # type: ignore[no-untyped-def]
    strips,
    num_strips,
    block_ids,
    num_blocks,
    slots,
    stride_slot,
    slot_ids,
    first_block,
    blocks_per_chunk,
    tiles_per_program,
    sums,
    WORD_BYTES: tl.constexpr,  # noqa: N803
    PAGES: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
    SPAN: tl.constexpr,  # noqa: N803
    EXACT: tl.constexpr,  # noqa: N803
    PAGE_AXIS: tl.constexpr,  # noqa: N803
    FOLD: tl.constexpr,  # noqa: N803
):
    # Of pages that are not there, as they are of an exact strip, nothing is handed on.
    FILL: tl.constexpr = sums is not None and not EXACT  # noqa: N806
    num_tiles = num_strips * tl.cdiv(num_blocks, PAGES)
    tile = tl.program_id(0) * tiles_per_program
    group = tile // num_strips
    strip = tile % num_strips
    block, slot, position = locate(
        block_ids, slot_ids, group * PAGES, first_block, num_blocks, blocks_per_chunk, PAGES
    )
    if sums is not None:
        total = no_sum(WORD_BYTES, PAGES, SPAN, PAGE_AXIS, FOLD)
    source, stride = places(strips, strip, 0)
    elements = num_elements(strips, strip, EXACT)
    for _ in range(tile, tl.minimum(tile + tiles_per_program, num_tiles)):
        live = group * PAGES + tl.arange(0, PAGES) < num_blocks
        mask = tile_mask(elements, live, WORD_BYTES, WORDS, SPAN, EXACT, PAGE_AXIS, FOLD)
        cache = source + block * stride
        # .cg: bytes are read once, L1 has no use for them.
        at = pointers(cache, WORD_BYTES, WORDS, SPAN, PAGE_AXIS, FOLD)
        if FILL:  # of what is not there, zeros are added up
            words = tl.load(at, mask=mask, other=0, cache_modifier=".cg")
        else:
            words = tl.load(at, mask=mask, cache_modifier=".cg")
        # Only now, while the bytes are on their way: registers hold one side's addresses.
        target, pitch = places(strips, strip, 3)
        place = slots + slot * stride_slot + target + position * pitch
        if sums is not None:
            row = first_row(strips, num_strips, strip)
        # And what the next loads need, so that they wait for nothing but these stores.
        strip += 1
        if strip == num_strips:
            strip = 0
            group += 1
            block, slot, position = locate(
                block_ids, slot_ids, group * PAGES, first_block, num_blocks, blocks_per_chunk, PAGES
            )
        source, stride = places(strips, strip, 0)
        elements = num_elements(strips, strip, EXACT)
        tl.store(pointers(place, WORD_BYTES, WORDS, SPAN, PAGE_AXIS, FOLD), words, mask=mask)
        if sums is not None:
            total += weighted(words, row, WORD_BYTES, WORDS, SPAN, PAGE_AXIS, FOLD)
            if strip == 0:  # of the pages that were
                add_to(sums, total, (group - 1) * PAGES, num_blocks, WORD_BYTES, PAGES, PAGE_AXIS)
                total = no_sum(WORD_BYTES, PAGES, SPAN, PAGE_AXIS, FOLD)
    if sums is not None:
        add_to(sums, total, group * PAGES, num_blocks, WORD_BYTES, PAGES, PAGE_AXIS)


@triton.jit  # type: ignore[untyped-decorator]
def scatter_kernel(  # type: ignore[no-untyped-def]
    strips,
    num_strips,
    block_ids,
    num_blocks,
    slots,
    stride_slot,
    slot_ids,
    first_block,
    blocks_per_chunk,
    tiles_per_program,
    sums,
    WORD_BYTES: tl.constexpr,  # noqa: N803
    PAGES: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
    SPAN: tl.constexpr,  # noqa: N803
    EXACT: tl.constexpr,  # noqa: N803
    PAGE_AXIS: tl.constexpr,  # noqa: N803
    FOLD: tl.constexpr,  # noqa: N803
):
    # Of pages that are not there, as they are of an exact strip, nothing is handed on.
    FILL: tl.constexpr = sums is not None and not EXACT  # noqa: N806
    num_tiles = num_strips * tl.cdiv(num_blocks, PAGES)
    tile = tl.program_id(0) * tiles_per_program
    group = tile // num_strips
    strip = tile % num_strips
    block, slot, position = locate(
        block_ids, slot_ids, group * PAGES, first_block, num_blocks, blocks_per_chunk, PAGES
    )
    if sums is not None:
        total = no_sum(WORD_BYTES, PAGES, SPAN, PAGE_AXIS, FOLD)
    source, pitch = places(strips, strip, 3)
    elements = num_elements(strips, strip, EXACT)
    for _ in range(tile, tl.minimum(tile + tiles_per_program, num_tiles)):
        live = group * PAGES + tl.arange(0, PAGES) < num_blocks
        mask = tile_mask(elements, live, WORD_BYTES, WORDS, SPAN, EXACT, PAGE_AXIS, FOLD)
        place = slots + slot * stride_slot + source + position * pitch
        # .cg: bytes are read once, L1 has no use for them.
        at = pointers(place, WORD_BYTES, WORDS, SPAN, PAGE_AXIS, FOLD)
        if FILL:  # of what is not there, zeros are added up
            words = tl.load(at, mask=mask, other=0, cache_modifier=".cg")
        else:
            words = tl.load(at, mask=mask, cache_modifier=".cg")
        # Only now, while the bytes are on their way: registers hold one side's addresses.
        target, stride = places(strips, strip, 0)
        cache = target + block * stride
        if sums is not None:
            row = first_row(strips, num_strips, strip)
        # And what the next loads need, so that they wait for nothing but these stores.
        strip += 1
        if strip == num_strips:
            strip = 0
            group += 1
            block, slot, position = locate(
                block_ids, slot_ids, group * PAGES, first_block, num_blocks, blocks_per_chunk, PAGES
            )
        source, pitch = places(strips, strip, 3)
        elements = num_elements(strips, strip, EXACT)
        tl.store(pointers(cache, WORD_BYTES, WORDS, SPAN, PAGE_AXIS, FOLD), words, mask=mask)
        if sums is not None:
            total += weighted(words, row, WORD_BYTES, WORDS, SPAN, PAGE_AXIS, FOLD)
            if strip == 0:  # of the pages that were
                add_to(sums, total, (group - 1) * PAGES, num_blocks, WORD_BYTES, PAGES, PAGE_AXIS)
                total = no_sum(WORD_BYTES, PAGES, SPAN, PAGE_AXIS, FOLD)
    if sums is not None:
        add_to(sums, total, group * PAGES, num_blocks, WORD_BYTES, PAGES, PAGE_AXIS)


@triton.jit
def places(strips, strip, column):  # type: ignore[no-untyped-def]
    """An address and the bytes between pages: of a strip in the cache (0) or in a slot (3)."""
    row = strips.to(tl.pointer_type(tl.int64)) + strip * 5 + column
    return tl.load(row), tl.load(row + 1)


@triton.jit  # type: ignore[untyped-decorator]
def num_elements(  # type: ignore[no-untyped-def]
    strips,
    strip,
    EXACT: tl.constexpr,  # noqa: N803
):
    """Elements of a strip; 0 where all have WORDS and nobody asks."""
    elements = tl.full((), 0, tl.int64)
    if not EXACT:
        elements = tl.load(strips.to(tl.pointer_type(tl.int64)) + strip * 5 + 2)
    return elements


@triton.jit  # type: ignore[untyped-decorator]
def locate(  # type: ignore[no-untyped-def]
    block_ids,
    slot_ids,
    first_page,
    first_block,
    num_blocks,
    blocks_per_chunk,
    PAGES: tl.constexpr,  # noqa: N803
):
    """Block id, slot id, and position in the chunk: [PAGES]."""
    page = first_page + tl.arange(0, PAGES)
    live = page < num_blocks
    run = first_block + page
    block = tl.load(block_ids.to(tl.pointer_type(tl.int64)) + page, mask=live, other=0)
    slot_id = slot_ids.to(tl.pointer_type(tl.int64)) + run // blocks_per_chunk
    slot = tl.load(slot_id, mask=live, other=0)
    return block, slot, run % blocks_per_chunk
