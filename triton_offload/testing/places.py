"""Which bytes an operation touches: tensors, pages and chunks as indices of the race checker."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from triton_offload.kernels import reference
from triton_offload.kernels.table import PageTable
from triton_offload.specs import Ids
from triton_offload.testing.races import Cells, Memory, RaceChecker, rows_of
from triton_offload.testing.schedule import Operation

#: pages and their places in the slots, as words (numpy indexes small arrays faster than torch)
Views = list[tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]]


@dataclass(slots=True, eq=False)
class IdMemory:
    """Ids that kernels read from host memory. The host writes them without telling anybody, so
    what differs from what was there when a kernel was queued last, it has written since.

    `readers`: (first, end, kernel) of those queued, but for what the host knew to be over.
    """

    array: Ids
    seen: Ids
    readers: list[tuple[int, int, Operation]] = field(default_factory=list)

    def changed(self, first: int, end: int) -> npt.NDArray[np.bool_] | None:
        """Where in [first, end) the host has written since it was asked last; None: nowhere."""
        now, seen = self.array[first:end], self.seen[first:end]
        differs: npt.NDArray[np.bool_] = now != seen
        if not np.count_nonzero(differs):
            return None
        seen[:] = now
        return differs


class Places:
    """Memory of the simulation by address. What nobody announced is pageable host memory."""

    def __init__(self, races: RaceChecker) -> None:
        self._races = races
        self._pages: dict[int, tuple[PageTable, npt.NDArray[np.int64]]] = {}
        self._in_chunk: dict[int, npt.NDArray[np.int64]] = {}
        self._views: dict[tuple[int, int, int], Views] = {}
        self._ids: dict[int, IdMemory] = {}  # by where it starts

    # -- memory --

    def add(self, buffer: torch.Tensor, name: str, *, on_device: bool) -> None:
        size = buffer.untyped_storage().nbytes()
        start = buffer.untyped_storage().data_ptr()
        self._races.add(start, size, name, on_device=on_device, pinned=on_device)

    def add_indices(self, indices: torch.Tensor, name: str) -> None:
        self._races.add(
            indices.data_ptr(), indices.nbytes, name, on_device=False, pinned=True, checked=False
        )
        array = indices.numpy()
        self._ids[indices.data_ptr()] = IdMemory(array, array.copy())

    def know(self, table: PageTable, slots: torch.Tensor) -> None:
        """The pages of a table lie on the device; slots that nobody made there, on the host."""
        for i, page in enumerate(table.pages):
            memory = self._races.find(page.view.untyped_storage().data_ptr())
            if memory is None:
                self.add(page.view, f"cache tensor {i}", on_device=True)
            else:
                memory.on_device = memory.pinned = True
        self._memory(slots)

    def pin(self, host: torch.Tensor, *, pinned: bool) -> None:
        self._memory(host).pinned = pinned

    def on_device(self, tensor: torch.Tensor) -> bool:
        return self._memory(tensor).on_device

    def address_on_device(self, address: int) -> bool:
        memory = self._races.find(address)
        return memory is not None and memory.on_device

    def address_pageable(self, address: int) -> bool:
        memory = self._races.find(address)
        return memory is not None and not (memory.on_device or memory.pinned)

    def pageable(self, tensor: torch.Tensor) -> bool:
        memory = self._memory(tensor)
        return not (memory.on_device or memory.pinned)

    # -- bytes --

    def of(self, tensor: torch.Tensor) -> Cells:
        """The bytes of a tensor of any dtype: contiguous, or uint8 rows."""
        memory = self._memory(tensor)
        if not memory.checked:  # of ids and sums, which the host reads and writes unseen
            return slice(0, 0)
        if tensor.dtype is not torch.uint8:
            first = memory.cells + tensor.data_ptr() - memory.start
            return slice(first, first + tensor.nbytes)
        return self._races.cells(tensor, memory)

    def pages(self, table: PageTable, block_ids: Ids) -> Cells:
        """The pages of these blocks in every tensor of the table."""
        known = self._pages.get(id(table))
        if known is None:
            blocks = np.arange(table.num_blocks)
            rows = [
                rows_of(self._start(page.view) + blocks * page.block_stride, page.page_bytes)
                for page in table.pages
            ]
            parts = [row.reshape(len(blocks), -1) for row in rows]
            known = self._pages[id(table)] = (table, np.concatenate(parts, axis=1))
        cells: Ids = known[1][block_ids].ravel()
        return cells

    def chunks(
        self, table: PageTable, slots: torch.Tensor, slot_ids: Ids, first: int, count: int
    ) -> Cells:
        """Where the pages of a run of blocks lie in its slots."""
        span = table.blocks_per_chunk
        within = self._in_chunk.get(id(table))
        if within is None:
            positions = np.arange(span)
            parts = [
                rows_of(page.offset + positions * page.pitch, page.page_bytes).reshape(span, -1)
                for page in table.pages
            ]
            within = self._in_chunk[id(table)] = np.concatenate(parts, axis=1)
        chunk, position = np.divmod(first + np.arange(count), span)
        starts = self._start(slots) + slot_ids[chunk] * slots.stride(0)
        cells: Ids = (starts[:, None] + within[position]).ravel()
        return cells

    def views(self, table: PageTable, slots: torch.Tensor) -> Views:
        """What the reference kernels move bytes through; made once."""
        key = id(table), slots.data_ptr(), len(slots)
        views = self._views.get(key)
        if views is None:
            words = reference.views_of(table, slots)
            views = self._views[key] = [(a.numpy(), b.numpy()) for a, b in words]
        return views

    def ranges(self, addresses: Ids, sizes: Ids) -> list[Cells]:
        ranges: list[Cells] = []
        for address, size in zip(addresses.tolist(), sizes.tolist(), strict=True):
            memory = self._races.find(address)
            if memory is None:
                raise ValueError(f"address: expected known memory, got {address:#x}")
            first = memory.cells + address - memory.start
            ranges.append(slice(first, first + size))
        return ranges

    def mover(self, dst: Ids, src: Ids, sizes: Ids, order: list[int]) -> Callable[[], None]:
        """Copies the ranges in that order."""

        def run() -> None:
            for i in order:
                ctypes.memmove(int(dst[i]), int(src[i]), int(sizes[i]))

        return run

    def ids_of(self, ids: torch.Tensor) -> tuple[IdMemory, int, int] | None:
        """The memory of `empty_indices` that ids lie in, and where; None for other memory."""
        memory = self._races.find(ids.data_ptr())
        if memory is None or (found := self._ids.get(memory.start)) is None:
            return None
        first = (ids.data_ptr() - memory.start) // 8
        return found, first, first + ids.shape[0]

    def text(self, tensor: torch.Tensor) -> str:
        memory = self._memory(tensor)
        first = tensor.data_ptr() - memory.start
        return f"{memory.name}[{first}:+{tensor.nbytes}]"

    def _start(self, tensor: torch.Tensor) -> int:
        memory = self._memory(tensor)
        return memory.cells + tensor.data_ptr() - memory.start

    def _memory(self, tensor: torch.Tensor) -> Memory:
        memory = self._races.find(tensor.data_ptr())
        if memory is None:
            self.add(tensor, "host memory", on_device=False)
            memory = self._races.find(tensor.data_ptr())
            assert memory is not None
        return memory
