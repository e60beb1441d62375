"""Kernels that move pages between scattered cache blocks and the slots of chunks.

They are byte movers: they see addresses, strides and sizes, never dtypes. One pair serves both
ways of crossing to the host: slots in device memory (a staging buffer) and slots in mapped host
memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from . import compiling
from .arguments import IdArray
from .sums import MIX as _MIX
from .table import ROW_BYTES as _ROW_BYTES
from .table import Direction, Ids, PageTable, alignment_of, check_run, check_slots
from .tiling import (
    KernelConfig,
    KernelSpec,
    choose_config,
    cut_into_strips,
    ring_config,
    summing_config,
)

__all__ = [
    "KernelConfig",
    "PageTable",
    "choose_config",
    "gather_pages",
    "launch_gather",
    "launch_scatter",
    "prepare",
    "ring_config",
    "scatter_pages",
    "summing_config",
]

# As the kernels take them: constants, and what is signed like all else there.
ROW_BYTES = tl.constexpr(_ROW_BYTES)
MIX = tl.constexpr(_MIX - (1 << 64))

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
def _gather_kernel(  # type: ignore[no-untyped-def]
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
    block, slot, position = _locate(
        block_ids, slot_ids, group * PAGES, first_block, num_blocks, blocks_per_chunk, PAGES
    )
    if sums is not None:
        total = _no_sum(WORD_BYTES, PAGES, SPAN, PAGE_AXIS, FOLD)
    source, stride = _row(strips, strip, 0)
    elements = _elements(strips, strip, EXACT)
    for _ in range(tile, tl.minimum(tile + tiles_per_program, num_tiles)):
        live = group * PAGES + tl.arange(0, PAGES) < num_blocks
        mask = _mask(elements, live, WORD_BYTES, WORDS, SPAN, EXACT, PAGE_AXIS)
        cache = source + block * stride
        # .cg: bytes are read once, L1 has no use for them.
        at = _pointers(cache, WORD_BYTES, WORDS, SPAN, PAGE_AXIS)
        if FILL:  # of what is not there, zeros are added up
            words = tl.load(at, mask=mask, other=0, cache_modifier=".cg")
        else:
            words = tl.load(at, mask=mask, cache_modifier=".cg")
        # Only now, while the bytes are on their way: registers hold one side's addresses.
        target, pitch = _row(strips, strip, 3)
        place = slots + slot * stride_slot + target + position * pitch
        if sums is not None:
            row = _first_row(strips, num_strips, strip)
        # And what the next loads need, so that they wait for nothing but these stores.
        strip += 1
        if strip == num_strips:
            strip = 0
            group += 1
            block, slot, position = _locate(
                block_ids, slot_ids, group * PAGES, first_block, num_blocks, blocks_per_chunk, PAGES
            )
        source, stride = _row(strips, strip, 0)
        elements = _elements(strips, strip, EXACT)
        tl.store(_pointers(place, WORD_BYTES, WORDS, SPAN, PAGE_AXIS), words, mask=mask)
        if sums is not None:
            total += _weighted(words, row, WORD_BYTES, WORDS, SPAN, PAGE_AXIS, FOLD)
            if strip == 0:  # of the pages that were
                _add_to(sums, total, (group - 1) * PAGES, num_blocks, PAGES, PAGE_AXIS)
                total = _no_sum(WORD_BYTES, PAGES, SPAN, PAGE_AXIS, FOLD)
    if sums is not None:
        _add_to(sums, total, group * PAGES, num_blocks, PAGES, PAGE_AXIS)


@triton.jit  # type: ignore[untyped-decorator]
def _scatter_kernel(  # type: ignore[no-untyped-def]
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
    block, slot, position = _locate(
        block_ids, slot_ids, group * PAGES, first_block, num_blocks, blocks_per_chunk, PAGES
    )
    if sums is not None:
        total = _no_sum(WORD_BYTES, PAGES, SPAN, PAGE_AXIS, FOLD)
    source, pitch = _row(strips, strip, 3)
    elements = _elements(strips, strip, EXACT)
    for _ in range(tile, tl.minimum(tile + tiles_per_program, num_tiles)):
        live = group * PAGES + tl.arange(0, PAGES) < num_blocks
        mask = _mask(elements, live, WORD_BYTES, WORDS, SPAN, EXACT, PAGE_AXIS)
        place = slots + slot * stride_slot + source + position * pitch
        # .cg: bytes are read once, L1 has no use for them.
        at = _pointers(place, WORD_BYTES, WORDS, SPAN, PAGE_AXIS)
        if FILL:  # of what is not there, zeros are added up
            words = tl.load(at, mask=mask, other=0, cache_modifier=".cg")
        else:
            words = tl.load(at, mask=mask, cache_modifier=".cg")
        # Only now, while the bytes are on their way: registers hold one side's addresses.
        target, stride = _row(strips, strip, 0)
        cache = target + block * stride
        if sums is not None:
            row = _first_row(strips, num_strips, strip)
        # And what the next loads need, so that they wait for nothing but these stores.
        strip += 1
        if strip == num_strips:
            strip = 0
            group += 1
            block, slot, position = _locate(
                block_ids, slot_ids, group * PAGES, first_block, num_blocks, blocks_per_chunk, PAGES
            )
        source, pitch = _row(strips, strip, 3)
        elements = _elements(strips, strip, EXACT)
        tl.store(_pointers(cache, WORD_BYTES, WORDS, SPAN, PAGE_AXIS), words, mask=mask)
        if sums is not None:
            total += _weighted(words, row, WORD_BYTES, WORDS, SPAN, PAGE_AXIS, FOLD)
            if strip == 0:  # of the pages that were
                _add_to(sums, total, (group - 1) * PAGES, num_blocks, PAGES, PAGE_AXIS)
                total = _no_sum(WORD_BYTES, PAGES, SPAN, PAGE_AXIS, FOLD)
    if sums is not None:
        _add_to(sums, total, group * PAGES, num_blocks, PAGES, PAGE_AXIS)


@triton.jit
def _row(strips, strip, column):  # type: ignore[no-untyped-def]
    """An address and the bytes between pages: of a strip in the cache (0) or in a slot (3)."""
    row = strips.to(tl.pointer_type(tl.int64)) + strip * 5 + column
    return tl.load(row), tl.load(row + 1)


@triton.jit  # type: ignore[untyped-decorator]
def _elements(  # type: ignore[no-untyped-def]
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
def _locate(  # type: ignore[no-untyped-def]
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


# -- sums: see `sums` for what is added up --

# A thread adds up what it moves of its pages, over all their strips, and hands it on once: no
# thread waits for another.


@triton.jit  # type: ignore[untyped-decorator]
def _no_sum(  # type: ignore[no-untyped-def]
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
def _first_row(strips, num_strips, strip):  # type: ignore[no-untyped-def]
    """The number of the first row of a strip."""
    return tl.load(strips.to(tl.pointer_type(tl.int64)) + num_strips * 5 + strip)


@triton.jit  # type: ignore[untyped-decorator]
def _weighted(  # type: ignore[no-untyped-def]
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
    place = _words(WORDS // PAIR, SPAN // PAIR, PAGE_AXIS) * PAIR
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
def _add_to(  # type: ignore[no-untyped-def]
    sums,
    total,
    first_page,
    num_blocks,
    PAGES: tl.constexpr,  # noqa: N803
    PAGE_AXIS: tl.constexpr,  # noqa: N803
):
    page = first_page + tl.arange(0, PAGES)
    target = _over_pages(sums.to(tl.pointer_type(tl.int64)) + page, PAGE_AXIS)
    live = _over_pages(page < num_blocks, PAGE_AXIS)
    target, total = tl.broadcast(target, total)
    live, total = tl.broadcast(live, total)
    tl.atomic_add(target, total, mask=live, sem="relaxed")


# Tiles have three axes: spans of words, pages, and the words of a span. Warps are dealt to the
# words of a span, then to pages (PAGE_AXIS sees to it), so that a thread has few pages, and of each
# one address and many offsets.


@triton.jit  # type: ignore[untyped-decorator]
def _over_pages(values, PAGE_AXIS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    if PAGE_AXIS == 1:
        return values[None, :, None]
    else:
        return values[:, None, None]


@triton.jit  # type: ignore[untyped-decorator]
def _words(  # type: ignore[no-untyped-def]
    WORDS: tl.constexpr,  # noqa: N803
    SPAN: tl.constexpr,  # noqa: N803
    PAGE_AXIS: tl.constexpr,  # noqa: N803
):
    span = tl.arange(0, WORDS // SPAN) * SPAN
    lane = tl.arange(0, SPAN)[None, None, :]
    if PAGE_AXIS == 1:
        return span[:, None, None] + lane
    else:
        return span[None, :, None] + lane


@triton.jit  # type: ignore[untyped-decorator]
def _mask(  # type: ignore[no-untyped-def]
    elements,
    live,
    WORD_BYTES: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
    SPAN: tl.constexpr,  # noqa: N803
    EXACT: tl.constexpr,  # noqa: N803
    PAGE_AXIS: tl.constexpr,  # noqa: N803
):
    mask = _over_pages(live, PAGE_AXIS)
    if not EXACT:
        if WORD_BYTES == 16:
            # Even, and the compiler sees that it is: else the mask makes accesses narrower.
            elements = elements // 2 * 2
        mask = mask & (_words(WORDS, SPAN, PAGE_AXIS) < elements)
    return mask


@triton.jit  # type: ignore[untyped-decorator]
def _pointers(  # type: ignore[no-untyped-def]
    address,
    WORD_BYTES: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
    SPAN: tl.constexpr,  # noqa: N803
    PAGE_AXIS: tl.constexpr,  # noqa: N803
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
    strip = _over_pages(address, PAGE_AXIS).to(element)
    # The compiler can't see the alignment of what was read from a table.
    strip = tl.multiple_of(strip, (WORD_BYTES, WORD_BYTES, WORD_BYTES))
    return strip + _words(WORDS, SPAN, PAGE_AXIS)


def gather_pages(
    table: PageTable,
    block_ids: Ids,
    slots: torch.Tensor,
    slot_ids: Ids | None = None,
    first_block: int = 0,
    *,
    config: KernelConfig | None = None,
) -> None:
    """Copy the pages of a run of blocks into the slots of its chunks, on the device.

    ``block_ids[i]`` is block ``b = first_block + i`` of a run of chunks: with
    ``B = table.blocks_per_chunk`` its pages go to slot ``slot_ids[b // B]``, position ``b % B``.
    Every other byte of ``slots`` stays as it is. Queued on the current stream of ``table.device``;
    the caller keeps ``slots`` and the cache alive until it has run.

    Args:
        table: Where the pages lie.
        block_ids: ``[n]`` ids of blocks to read; may repeat. A list, a numpy array or an integer
            tensor: copied, and the caller's again on return. Ids in a tensor on the device are
            trusted, not checked, and read when the kernel runs: the caller leaves them as they
            are until then, or changes them by work on the same stream.
        slots: uint8 ``[num_slots, >= table.slot_bytes]``, rows at any stride; on the table's
            device, or pinned host memory that the device maps.
        slot_ids: ``[ceil((first_block + n) / B)]`` distinct slots, one for each chunk of the run;
            those of chunks before ``first_block`` are not looked at. None for 0, 1, ... Copied, or
            left alone on the device, as ``block_ids`` are.
        first_block: Where in its run of chunks the first block lies.
        config: None for ``choose_config``; ``ring_config`` gives another.

    Raises:
        ValueError: An id out of range, a slot named twice, a wrong number of slot ids, slots of
            another shape or on a device that can't be reached, or a table in host memory (unless
            Triton interprets).
    """
    _transfer(table, block_ids, slots, slot_ids, first_block, config, "gather")


def scatter_pages(
    table: PageTable,
    block_ids: Ids,
    slots: torch.Tensor,
    slot_ids: Ids | None = None,
    first_block: int = 0,
    *,
    config: KernelConfig | None = None,
) -> None:
    """Copy the pages of a run of blocks out of the slots of its chunks; see ``gather_pages``.

    Block ids must be distinct, slot ids may repeat. Every other byte of the cache stays as it is.
    """
    _transfer(table, block_ids, slots, slot_ids, first_block, config, "scatter")


def launch_gather(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
    config: KernelConfig,
    sums: torch.Tensor | None = None,
) -> None:
    """Queue ``gather_pages`` for ids that were checked before; nothing is checked here.

    Args:
        block_ids, slot_ids: Contiguous int64 tensors on the device or in mapped pinned host
            memory. The caller leaves them as they are until the launch has run.
        first_block: Position of the first block in its chunk, in ``[0, B)``.
        sums: int64 ``[n]`` on the device, or None. What the pages of block i add up to, as they
            pass, is added to ``sums[i]`` (see ``sums``).

    Raises:
        ValueError: ``sums`` beside a ring, which does not add up.
    """
    _launch("gather", table, block_ids, slots, slot_ids, first_block, config, sums)


def launch_scatter(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
    config: KernelConfig,
    sums: torch.Tensor | None = None,
) -> None:
    """Queue ``scatter_pages`` for ids that were checked before; see ``launch_gather``."""
    _launch("scatter", table, block_ids, slots, slot_ids, first_block, config, sums)


def prepare(
    table: PageTable,
    slots_alignment: int = 16,
    config: KernelConfig | None = None,
    *,
    sums: bool = False,
) -> None:
    """Do ahead of the first transfer what blocks the host: compile both kernels, load them, and
    put the addresses of ``table`` on its device.

    Args:
        slots_alignment: Largest of 16, 8, 4, 2, 1 that divides the address of the slots and the
            bytes between them. Slots of another alignment are prepared on their first launch.
        config: What the launches will use; None for both of ``choose_config``.
        sums: Prepare the kernels that add up.
    """
    _check_table(table)
    if slots_alignment not in (16, 8, 4, 2, 1):
        raise ValueError(f"slots_alignment: expected 16, 8, 4, 2 or 1, got {slots_alignment!r}")
    backend = compiling.backend_of(_gather_kernel, table.device)
    both = [choose_config(zero_copy=zero_copy, backend=backend) for zero_copy in (False, True)]
    for each in both if config is None else [config]:
        for plain, _ in _plan(table, slots_alignment, each):
            spec = replace(plain, sums=sums)
            for kernel in (kernel_of("gather", spec), kernel_of("scatter", spec)):
                if not compiling.is_interpreted(kernel):
                    compiling.load_kernel(kernel, spec, table.device)


def kernel_of(direction: Direction, spec: KernelSpec) -> Any:
    """The kernel that moves tiles of ``spec``."""
    if spec.stages > 1:
        # Gluon is loaded where it is asked for: not every Triton has it.
        from .ring import KERNELS

        return KERNELS[direction]
    return _gather_kernel if direction == "gather" else _scatter_kernel


def _transfer(
    table: PageTable,
    block_ids: Ids,
    slots: torch.Tensor,
    slot_ids: Ids | None,
    first_block: int,
    config: KernelConfig | None,
    direction: Direction,
) -> None:
    _check_table(table)
    check_slots(table, slots)
    zero_copy = slots.device != table.device
    if zero_copy and not (slots.device.type == "cpu" and slots.is_pinned()):
        raise ValueError(
            f"slots: expected a tensor on {table.device} or in pinned host memory, got one on "
            f"{slots.device}{'' if slots.device.type != 'cpu' else ' that is not pinned'}"
        )
    run = check_run(table, block_ids, slots.shape[0], slot_ids, first_block, direction=direction)
    if config is None:
        config = choose_config(
            zero_copy=zero_copy, backend=compiling.backend_of(_gather_kernel, table.device)
        )
    blocks = run.block_ids.to(table.device)
    chunk_slots = run.slot_ids.to(table.device)
    _launch(direction, table, blocks, slots, chunk_slots, run.first_block, config)


def _launch(
    direction: Direction,
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
    config: KernelConfig,
    sums: torch.Tensor | None = None,
) -> None:
    if sums is not None and config.stages > 1:
        raise ValueError(f"config: expected no ring beside sums, got {config}")
    num_blocks, first_block = block_ids.shape[0], int(first_block)
    if num_blocks == 0:
        return
    address = slots.data_ptr()
    # The stride of a single row takes part in no address.
    stride_slot = slots.stride(0) if slots.shape[0] > 1 else 0
    for spec, strips in _plan(table, alignment_of(address, stride_slot), config):
        num_strips = strips.shape[0]
        num_tiles = num_strips * -(-num_blocks // spec.pages)
        # The kernels count both in 32 bits, up to the last program's end, and the tiles that are
        # read ahead.
        end = first_block + num_blocks + (1 + spec.stages) * spec.pages
        if max(num_tiles + config.programs, end) >= 2**31:
            raise ValueError(
                f"block_ids: expected fewer than 2**31 blocks and tiles a launch, got "
                f"{num_blocks} blocks in {num_tiles} tiles"
            )
        tiles_per_program = -(-num_tiles // min(config.programs, num_tiles))
        arguments: tuple[int, ...] = (
            strips.data_ptr(),
            num_strips,
            block_ids.data_ptr(),
            num_blocks,
            address,
            stride_slot,
            slot_ids.data_ptr(),
            first_block,
            table.blocks_per_chunk,
            tiles_per_program,
        )
        if sums is not None:
            arguments += (sums.data_ptr(),)
            spec = replace(spec, sums=True)
        programs = -(-num_tiles // tiles_per_program)
        compiling.launch(kernel_of(direction, spec), spec, table.device, programs, arguments)


def _plan(
    table: PageTable, slots_alignment: int, config: KernelConfig
) -> list[tuple[KernelSpec, torch.Tensor]]:
    """Kernels of a transfer and their strips on the device; made once, kept with the table."""
    key = slots_alignment, config.warps, config.tile_bytes, config.stages
    plan = table.launch_plans.get(key)
    if plan is None:
        with torch.inference_mode(False):  # other threads will use it, outside of it
            plan = [
                (spec, _on_device(strips, rows, table.device))
                for spec, strips, rows in cut_into_strips(table, slots_alignment, config)
            ]
        table.launch_plans[key] = plan
    return plan


def _on_device(strips: IdArray, rows: IdArray, device: torch.device) -> torch.Tensor:
    """int64 ``[num_strips, 5]``, with the rows behind it in the same memory."""
    both = torch.from_numpy(np.concatenate([strips.ravel(), rows])).to(device)
    return both[: strips.size].view(strips.shape)


def _check_table(table: PageTable) -> None:
    if table.device.type != "cuda" and not compiling.is_interpreted(_gather_kernel):
        raise ValueError(
            f"table: expected tensors on a GPU, got tensors on {table.device}; pages in host "
            f"memory are moved by triton_offload.kernels.reference"
        )
