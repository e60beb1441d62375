"""Gather and scatter of pages in CPU memory: one pass of host_pages.c, which adds up what passes.

Where that could not be compiled, numpy and torch do the same (`host_torch`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import torch

from triton_offload.device import host_torch, native
from triton_offload.kernels.table import ROW_BYTES, PageRow, PageTable

# What one call of C moves, some 15 ms of one thread: between two, work that is to be dropped ends.
_CALL_BYTES = 64 << 20

# What is worth a thread more. To start and to join it takes 0.03 to 0.05 ms, as long as to copy a
# quarter of this (two cores of a Xeon at 2.5 GHz).
_THREAD_BYTES = 1 << 20

# What a thread takes at once: some 0.05 ms, so that all end together. Longer pages are cut.
_TAKE_BYTES = 256 << 10

_Check = Callable[[], object]


def gather(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
    check: _Check = lambda: None,
    sums: torch.Tensor | None = None,
) -> None:
    """Pages to slots: `kernels.reference.gather_pages` on checked int64 ids, tuned.

    `check` is called between parts of many bytes; what it raises ends the work there. What the
    pages of block i add up to (see `kernels.sums`) is added to `sums[i]`, int64 `[blocks]`.
    """
    _move(True, table, block_ids, slots, slot_ids, first_block, check, sums)


def scatter(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
    check: _Check = lambda: None,
    sums: torch.Tensor | None = None,
) -> None:
    """Slots to pages: `kernels.reference.scatter_pages`, likewise."""
    _move(False, table, block_ids, slots, slot_ids, first_block, check, sums)


class _Tensor(ctypes.Structure):
    """`struct tensor` of host_pages.c."""

    _fields_ = (
        ("pages", ctypes.c_void_p),
        ("block_stride", ctypes.c_int64),
        ("page_bytes", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("pitch", ctypes.c_int64),
        ("first_row", ctypes.c_int64),
    )


class _Parts(ctypes.Structure):
    """`struct move` of host_pages.c."""

    _fields_ = (
        ("tensors", ctypes.c_void_p),
        ("num_tensors", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("slot_stride", ctypes.c_int64),
        ("num_slots", ctypes.c_int64),
        ("slot_ids", ctypes.c_void_p),
        ("num_slot_ids", ctypes.c_int64),
        ("blocks_per_chunk", ctypes.c_int64),
        ("first_block", ctypes.c_int64),
        ("block_ids", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("sums", ctypes.c_void_p),
        ("gathers", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
        ("step", ctypes.c_int64),
    )


# Of each table its tensors, as C has them: made once, for that takes as long as to copy a page.
_tensors: WeakKeyDictionary[PageTable, ctypes.Array[_Tensor]] = WeakKeyDictionary()


def _tensors_of(table: PageTable) -> ctypes.Array[_Tensor]:
    tensors = _tensors.get(table)
    if tensors is None:
        made = [piece for page in table.pages for piece in _cut(page)]
        tensors = _tensors[table] = (_Tensor * len(made))(*made)
    return tensors


def _cut(page: PageRow) -> Iterator[_Tensor]:
    """Pieces of the pages of a tensor, each as if it were one."""
    for begin in range(0, page.page_bytes, _TAKE_BYTES):
        yield _Tensor(
            page.view.data_ptr() + begin,
            page.block_stride,
            min(_TAKE_BYTES, page.page_bytes - begin),
            page.offset + begin,
            page.pitch,
            page.first_row + begin // ROW_BYTES,
        )


def _move(
    gathers: bool,
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
    check: _Check,
    sums: torch.Tensor | None,
) -> None:
    move_pages = native.load().move_pages
    if move_pages is None:
        host_torch.move(gathers, table, block_ids, slots, slot_ids, first_block, check, sums)
        return
    tensors = _tensors_of(table)
    total, span = block_ids.shape[0], table.bytes_per_block
    count = max(1, _CALL_BYTES // span)
    threads = min(torch.get_num_threads(), 1 + total * span // _THREAD_BYTES)
    step = max(1, _TAKE_BYTES * len(tensors) // span)
    for first in range(0, total, count):
        check()
        parts = _Parts(
            ctypes.addressof(tensors),
            len(tensors),
            table.num_blocks,
            slots.data_ptr(),
            slots.stride(0),
            slots.shape[0],
            slot_ids.data_ptr(),
            slot_ids.shape[0],
            table.blocks_per_chunk,
            first_block + first,
            block_ids.data_ptr() + 8 * first,
            min(count, total - first),
            None if sums is None else sums.data_ptr() + 8 * first,
            gathers,
            threads,
            step,
        )
        if move_pages(ctypes.addressof(parts)):
            raise IndexError("ids of blocks or slots are out of range")
