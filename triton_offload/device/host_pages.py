"""Gather and scatter of pages in CPU memory, in one pass where the ids allow it.

torch has one fast indexed copy a direction: `index_select` with a strided output (rows at random
to rows in order) and `index_copy_` from a strided source (the other way). Where the slots, or the
blocks, are consecutive, one of them moves every page straight to its place. Where neither is, a
slice of rows that stays in the cache goes through a temporary.
"""

from __future__ import annotations

import ctypes

import torch

from triton_offload.kernels.table import PageTable

# Rows at a time through a temporary, which then stays in the cache. Calls that need none are not
# cut: whole ones reached 0.55-0.65 (4 KiB pages) and 1.0 (64 KiB) of a plain copy's speed on two
# cores of an EPYC, cut to 480 KiB 0.5 and 0.8.
_SLICE_BYTES = 1 << 20

# From here on a memmove a page beats two passes: its call costs 0.5 us, a page of 64 KiB 5 us.
_BIG_PAGE_BYTES = 32 << 10

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
) -> None:
    """Pages to slots: `kernels.reference.gather_pages` on checked int64 ids, tuned."""
    for pages, places, blocks, chunks in _operands(table, block_ids, slots, slot_ids, first_block):
        _move(pages, blocks, places, chunks)


def scatter(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
) -> None:
    """Slots to pages: `kernels.reference.scatter_pages`, likewise."""
    for pages, places, blocks, chunks in _operands(table, block_ids, slots, slot_ids, first_block):
        _move(places, chunks, pages, blocks)


_Rows = torch.Tensor | slice
_Operands = list[tuple[torch.Tensor, torch.Tensor, _Rows, _Rows]]


def _operands(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
) -> _Operands:
    """Pages and places as rows of words, with the row numbers on each side.

    The blocks of a run that share a position in their chunks are one indexed copy a tensor.
    """
    span = table.blocks_per_chunk
    first = first_block % span
    operands: _Operands = []
    for position in range(span):
        start = (position - first) % span  # the run's first block at this position
        if start >= len(block_ids):
            continue
        blocks = _as_rows(block_ids[start::span])
        first_chunk = (first + start) // span
        chunks = _as_rows(
            slot_ids[first_chunk : first_chunk + -(-(len(block_ids) - start) // span)]
        )
        for page in table.pages:
            offset = page.offset + position * page.pitch
            places = slots[:, offset : offset + page.page_bytes]
            operands.append((*_widest(page.view, places), blocks, chunks))
    return operands


def _as_rows(ids: torch.Tensor) -> _Rows:
    """Consecutive ids as a slice, others as they are."""
    first = int(ids[0])
    if len(ids) == 1 or bool((ids[1:] - ids[:-1] == 1).all()):
        return slice(first, first + len(ids))
    return ids.contiguous()


def _widest(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as rows of the widest word that their strides, offsets and width allow."""
    bits = int(a.shape[1])
    for x in (a, b):
        bits |= int(x.storage_offset())
        if x.shape[0] > 1:
            bits |= int(x.stride(0))
    for size, dtype in _WORDS:
        if bits % size == 0:
            return _view(a, dtype, size), _view(b, dtype, size)
    return a, b


def _view(rows: torch.Tensor, dtype: torch.dtype, size: int) -> torch.Tensor:
    # A single row may have any stride, which `view` would refuse.
    if rows.shape[0] == 1:
        return rows[0].view(dtype)[None]
    assert rows.stride(0) % size == 0
    return rows.view(dtype)


def _move(src: torch.Tensor, src_rows: _Rows, dst: torch.Tensor, dst_rows: _Rows) -> None:
    if isinstance(src_rows, slice):
        if isinstance(dst_rows, slice):
            dst[dst_rows].copy_(src[src_rows])
        else:
            dst.index_copy_(0, dst_rows, src[src_rows])
    elif isinstance(dst_rows, slice):
        torch.index_select(src, 0, src_rows, out=dst[dst_rows])
    elif src.shape[1] * src.element_size() >= _BIG_PAGE_BYTES:
        _move_big_rows(src, src_rows, dst, dst_rows)
    else:
        step = max(1, _SLICE_BYTES // (src.shape[1] * src.element_size()))
        for ids, to in zip(torch.split(src_rows, step), torch.split(dst_rows, step), strict=True):
            dst.index_copy_(0, to, src.index_select(0, ids))


def _move_big_rows(
    src: torch.Tensor, src_rows: torch.Tensor, dst: torch.Tensor, dst_rows: torch.Tensor
) -> None:
    item = src.element_size()
    sources = (src.data_ptr() + src_rows * (src.stride(0) * item)).tolist()
    targets = (dst.data_ptr() + dst_rows * (dst.stride(0) * item)).tolist()
    for target, source in zip(targets, sources, strict=True):
        ctypes.memmove(target, source, src.shape[1] * item)
