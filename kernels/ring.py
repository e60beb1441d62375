"""The page kernels as a ring in shared memory: many bytes in flight with few registers.

The plain kernels hold the bytes of a tile in registers from load to store. Here they cross shared
memory: a CTA has `STAGES` tiles under way at once, copied by `cp.async`, and stores the oldest one
as the youngest one begins. That takes a fraction of the registers and of the threads, so that the
model's kernels find room beside it, and shared memory in their place.

For NVIDIA from sm_80 on, and for words of 16 bytes alone: the arguments, the table of strips and
the numbering of tiles are those of the plain kernels (see `pages`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Triton 3.9 calls it by another name, and keeps the old one to say so.
_load_async = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)

# Columns of a row of the table of strips; the bytes between pages come after each.
_CACHE = gl.constexpr(0)
_ELEMENTS = gl.constexpr(2)
_SLOT = gl.constexpr(3)


@gluon.jit  # type: ignore[untyped-decorator]
def gather_ring(  # type: ignore[no-untyped-def]
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
    PAGES: gl.constexpr,  # noqa: N803
    WORDS: gl.constexpr,  # noqa: N803
    EXACT: gl.constexpr,  # noqa: N803
    WARPS: gl.constexpr,  # noqa: N803
    STAGES: gl.constexpr,  # noqa: N803
):
    at = strips, block_ids, num_blocks, slots, stride_slot, slot_ids, first_block, blocks_per_chunk
    LAYOUT: gl.constexpr = _layout(PAGES, WORDS, WARPS)  # noqa: N806
    _move(at, num_strips, tiles_per_program, _CACHE, _SLOT, PAGES, WORDS, EXACT, STAGES, LAYOUT)


@gluon.jit  # type: ignore[untyped-decorator]
def scatter_ring(  # type: ignore[no-untyped-def]
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
    PAGES: gl.constexpr,  # noqa: N803
    WORDS: gl.constexpr,  # noqa: N803
    EXACT: gl.constexpr,  # noqa: N803
    WARPS: gl.constexpr,  # noqa: N803
    STAGES: gl.constexpr,  # noqa: N803
):
    at = strips, block_ids, num_blocks, slots, stride_slot, slot_ids, first_block, blocks_per_chunk
    LAYOUT: gl.constexpr = _layout(PAGES, WORDS, WARPS)  # noqa: N806
    _move(at, num_strips, tiles_per_program, _SLOT, _CACHE, PAGES, WORDS, EXACT, STAGES, LAYOUT)


@gluon.constexpr_function
def _layout(PAGES, WORDS, WARPS):  # type: ignore[no-untyped-def]  # noqa: N803
    """Threads over a tile [PAGES, WORDS], two words each: a page's move a line at once or more."""
    threads = min(WORDS // 2, max(8, WARPS * 32 // PAGES))
    lanes, warps = min(32, threads), max(1, threads // 32)
    return gl.BlockedLayout([1, 2], [32 // lanes, lanes], [WARPS // warps, warps], [1, 0])


@gluon.jit  # type: ignore[untyped-decorator]
def _move(  # type: ignore[no-untyped-def]
    at,
    num_strips,
    tiles_per_program,
    FROM: gl.constexpr,  # noqa: N803
    TO: gl.constexpr,  # noqa: N803
    PAGES: gl.constexpr,  # noqa: N803
    WORDS: gl.constexpr,  # noqa: N803
    EXACT: gl.constexpr,  # noqa: N803
    STAGES: gl.constexpr,  # noqa: N803
    LAYOUT: gl.constexpr,  # noqa: N803
):
    num_tiles = num_strips * gl.cdiv(at[2], PAGES)
    tile = gl.program_id(0) * tiles_per_program
    count = gl.minimum(tiles_per_program, num_tiles - tile)
    ring = gl.allocate_shared_memory(
        gl.int64, [STAGES, PAGES, WORDS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )

    # Two places in the order of tiles: where copies begin, and STAGES - 1 tiles behind where they
    # are stored.
    group = tile // num_strips
    strip = tile % num_strips
    base, index = _locate(at, group, FROM, PAGES, LAYOUT)
    from_group, from_strip, from_base, from_index = group, strip, base, index
    source, elements = _row(at, strip, base, index, FROM, EXACT)
    base, index = _locate(at, group, TO, PAGES, LAYOUT)
    for i in range(count + STAGES - 1):
        words, mask = _words(at, from_group, elements, PAGES, WORDS, EXACT, LAYOUT)
        # Behind the last tile there is nothing to copy, and an empty group to count.
        mask = mask & (i < count)
        _load_async(ring.index(i % STAGES), _pointers(source) + words, mask=mask)
        async_copy.commit_group()
        # Where the next copy begins is read while others are under way.
        from_strip += 1
        if from_strip == num_strips:
            from_strip = 0
            from_group += 1
            from_base, from_index = _locate(at, from_group, FROM, PAGES, LAYOUT)
        source, elements = _row(at, from_strip, from_base, from_index, FROM, EXACT)
        if i >= STAGES - 1:
            target, stored = _row(at, strip, base, index, TO, EXACT)
            words, mask = _words(at, group, stored, PAGES, WORDS, EXACT, LAYOUT)
            async_copy.wait_group(STAGES - 1)
            # Its stage is the next to be filled, which waits until all have read it.
            tile_bytes = ring.index((i + 1) % STAGES).load(LAYOUT)
            gl.store(_pointers(target) + words, tile_bytes, mask=mask)
            strip += 1
            if strip == num_strips:
                strip = 0
                group += 1
                base, index = _locate(at, group, TO, PAGES, LAYOUT)


@gluon.jit  # type: ignore[untyped-decorator]
def _locate(  # type: ignore[no-untyped-def]
    at,
    group,
    SIDE: gl.constexpr,  # noqa: N803
    PAGES: gl.constexpr,  # noqa: N803
    LAYOUT: gl.constexpr,  # noqa: N803
):
    """Where the pages of a group lie: an address, and how many pages from there; [PAGES]."""
    _, block_ids, num_blocks, slots, stride_slot, slot_ids, first_block, blocks_per_chunk = at
    page = group * PAGES + gl.arange(0, PAGES, layout=gl.SliceLayout(1, LAYOUT))
    live = page < num_blocks
    if SIDE == _CACHE:
        block = gl.load(block_ids.to(gl.pointer_type(gl.int64)) + page, mask=live, other=0)
        return gl.zeros_like(block), block
    else:
        run = first_block + page
        slot_id = slot_ids.to(gl.pointer_type(gl.int64)) + run // blocks_per_chunk
        slot = gl.load(slot_id, mask=live, other=0)
        return slots + slot * stride_slot, (run % blocks_per_chunk).to(gl.int64)


@gluon.jit  # type: ignore[untyped-decorator]
def _row(  # type: ignore[no-untyped-def]
    at,
    strip,
    base,
    index,
    SIDE: gl.constexpr,  # noqa: N803
    EXACT: gl.constexpr,  # noqa: N803
):
    """Addresses of a strip of the pages at ``base`` and ``index``, and its elements."""
    row = at[0].to(gl.pointer_type(gl.int64)) + strip * 5
    elements = gl.to_tensor(0).to(gl.int64)
    if not EXACT:
        elements = gl.load(row + _ELEMENTS)
    return base + gl.load(row + SIDE) + index * gl.load(row + SIDE + 1), elements


@gluon.jit  # type: ignore[untyped-decorator]
def _words(  # type: ignore[no-untyped-def]
    at,
    group,
    elements,
    PAGES: gl.constexpr,  # noqa: N803
    WORDS: gl.constexpr,  # noqa: N803
    EXACT: gl.constexpr,  # noqa: N803
    LAYOUT: gl.constexpr,  # noqa: N803
):
    """The words of a tile [1, WORDS], and which of them there are [PAGES, WORDS or 1]."""
    page = group * PAGES + gl.arange(0, PAGES, layout=gl.SliceLayout(1, LAYOUT))
    words = gl.arange(0, WORDS, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    mask = (page < at[2])[:, None]
    if not EXACT:
        # Even, and the compiler sees that it is: else the mask makes copies narrower.
        mask = mask & (words < elements // 2 * 2)
    return words, mask


@gluon.jit
def _pointers(address):  # type: ignore[no-untyped-def]
    """Pointers [PAGES, 1] to addresses, whose alignment the compiler can't see."""
    return gl.multiple_of(address[:, None].to(gl.pointer_type(gl.int64)), (16, 16))


KERNELS = {"gather": gather_ring, "scatter": scatter_ring}
