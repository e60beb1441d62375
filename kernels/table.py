"""Where the pages of a set of cache tensors lie, in the cache and in the slot of a chunk."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Ids: TypeAlias = Sequence[int] | npt.NDArray[np.integer] | torch.Tensor
IdArray: TypeAlias = npt.NDArray[np.int64]
Direction: TypeAlias = Literal["gather", "scatter"]


@dataclass(frozen=True, eq=False)
class PageRow:
    """The pages of one cache tensor. All sizes are bytes."""

    view: torch.Tensor
    """uint8 ``[num_blocks, page_bytes]``, strided, over the memory of the user's tensor."""
    page_bytes: int
    """Bytes of a page that carry data."""
    pitch: int
    """Bytes between two consecutive pages in a slot (``>= page_bytes``)."""
    offset: int
    """Where in a slot the first page of this tensor lies."""
    block_stride: int
    """Bytes between two consecutive pages in the cache."""

    @property
    def alignment(self) -> int:
        """Largest of 16, 8, 4, 2, 1 that divides every address of a page, its size, and its
        places in a slot relative to the slot's start."""
        parts = self.view.data_ptr(), self.block_stride, self.page_bytes, self.pitch, self.offset
        return alignment_of(*parts)


@dataclass(frozen=True)
class ByteRun:
    """A range of a slot that a table's pages fill without a gap between tensors. Bytes."""

    slot_offset: int
    packed_offset: int
    """Where the same bytes lie in a slot of ``table.packed()``."""
    num_bytes: int


class PageTable:
    """Places of the pages of several cache tensors: in the cache, and in the slot of a chunk.

    With ``B = blocks_per_chunk``, page ``s`` of tensor ``t`` lies in a slot at byte
    ``offsets[t] + s * pitch[t]``, where ``offsets[t] = B * sum(pitch[:t])`` and the pitch is the
    tensor's page size: tensor by tensor, in each the blocks of the chunk in order.

    The table holds views of the caller's tensors and keeps their memory alive; it owns no other
    memory than a small table of addresses on ``device``.

    Args:
        tensors: Cache tensors ``[num_blocks, ...]`` on one device. Any dtype; dims after the first
            contiguous; any block stride of at least a page, so views into one storage are fine.
            Page sizes, dtypes and strides may differ between tensors.
        blocks_per_chunk: Blocks in a chunk, at least 1.

    Raises:
        ValueError: Names the argument, what was expected and what was given.
    """

    pages: tuple[PageRow, ...]
    blocks_per_chunk: int
    slot_bytes: int
    """Bytes of a slot; a row of a slot buffer has at least as many."""
    num_blocks: int
    """Number of valid block ids: the smallest over the tensors."""
    device: torch.device

    def __init__(self, tensors: Sequence[torch.Tensor], blocks_per_chunk: int = 1) -> None:
        blocks_per_chunk = operator.index(blocks_per_chunk)
        if blocks_per_chunk < 1:
            raise ValueError(f"blocks_per_chunk: expected at least 1, got {blocks_per_chunk}")
        if len(tensors) == 0:
            raise ValueError("tensors: expected at least one tensor, got none")
        rows = []
        offset = 0
        for index, tensor in enumerate(tensors):
            if tensor.device != tensors[0].device:
                raise ValueError(
                    f"tensors[{index}]: expected a tensor on {tensors[0].device}, as tensors[0], "
                    f"got one on {tensor.device}"
                )
            view = _byte_view(tensor, f"tensors[{index}]")
            page_bytes = view.shape[1]
            rows.append(PageRow(view, page_bytes, page_bytes, offset, view.stride(0)))
            offset += blocks_per_chunk * page_bytes
        self._fill(tuple(rows), blocks_per_chunk, offset)

    def _fill(self, pages: tuple[PageRow, ...], blocks_per_chunk: int, slot_bytes: int) -> None:
        self.pages = pages
        self.blocks_per_chunk = blocks_per_chunk
        self.slot_bytes = slot_bytes
        self.num_blocks = min(row.view.shape[0] for row in pages)
        self.device = pages[0].view.device
        self.offsets = tuple(row.offset for row in pages)
        self.bytes_per_block = sum(row.page_bytes for row in pages)
        self.runs = _merge_runs(pages, blocks_per_chunk)
        # What the launchers keep on the device for this table, by how a launch is cut up.
        self.launch_plans: dict[tuple[int, int, int], Any] = {}

    def _derived(self, pages: tuple[PageRow, ...], slot_bytes: int) -> PageTable:
        table = PageTable.__new__(PageTable)
        table._fill(pages, self.blocks_per_chunk, slot_bytes)
        return table

    def group(self, refs: Sequence[tuple[int, int]]) -> PageTable:
        """The table of one KV cache group: some of the tensors, in the same slot format.

        Args:
            refs: ``(tensor index, page bytes)`` of each of the group's tensors. Only the first
                ``page bytes`` of a page move, at most the tensor's own. Several groups may name
                the same tensor.

        Returns:
            A table with the offsets, pitches and ``slot_bytes`` of this one.

        Raises:
            ValueError: ``refs`` is empty, or an index or a size is out of range.
        """
        if len(refs) == 0:
            raise ValueError("refs: expected at least one tensor, got none")
        rows = []
        for position, (index, page_bytes) in enumerate(refs):
            if not 0 <= index < len(self.pages):
                raise ValueError(
                    f"refs[{position}]: expected a tensor index in [0, {len(self.pages)}), "
                    f"got {index}"
                )
            row = self.pages[index]
            if not 1 <= page_bytes <= row.page_bytes:
                raise ValueError(
                    f"refs[{position}]: expected page bytes in [1, {row.page_bytes}] for tensor "
                    f"{index}, got {page_bytes}"
                )
            rows.append(replace(row, view=row.view[:, :page_bytes], page_bytes=page_bytes))
        return self._derived(tuple(rows), self.slot_bytes)

    def packed(self) -> PageTable:
        """The same pages in a slot without the parts that belong to other tensors.

        A row's offset becomes ``B * sum(pitch)`` over the rows before it in the slot, and
        ``slot_bytes`` their sum over all rows. Rows of one tensor share their place, as they do
        in the full slot.
        """
        starts = [run.slot_offset for run in self.runs]
        rows = []
        for row in self.pages:
            run = self.runs[int(np.searchsorted(starts, row.offset, side="right")) - 1]
            rows.append(replace(row, offset=row.offset - run.slot_offset + run.packed_offset))
        return self._derived(tuple(rows), sum(run.num_bytes for run in self.runs))

    def __repr__(self) -> str:
        return (
            f"PageTable({len(self.pages)} tensors on {self.device}, {self.num_blocks} blocks, "
            f"blocks_per_chunk={self.blocks_per_chunk}, slot_bytes={self.slot_bytes})"
        )


@dataclass(frozen=True, eq=False)
class BlockRun:
    """Ids of a run of blocks that passed ``check_run``, from the first chunk that holds one.

    Block ``block_ids[i]`` lies in slot ``slot_ids[(first_block + i) // B]`` at position
    ``(first_block + i) % B``.
    """

    block_ids: torch.Tensor
    """int64 ``[num_blocks]``, on the host, or on the device where the caller's lay there."""
    slot_ids: torch.Tensor
    """int64 ``[num_chunks]``, likewise."""
    first_block: int
    """Position of the first block in its chunk, in ``[0, B)``."""


def check_run(
    table: PageTable,
    block_ids: Ids,
    num_slots: int,
    slot_ids: Ids | None = None,
    first_block: int = 0,
    *,
    direction: Direction,
) -> BlockRun:
    """Check the ids of a run of blocks, and bring them into one form.

    Args:
        block_ids: ``[n]`` block ids; a list, a numpy array or an integer tensor. Tensors on a
            device are trusted: looking at them would make the host wait for it.
        num_slots: Slots of the buffer on the other side.
        slot_ids: ``[ceil((first_block + n) / B)]`` slot ids, one for each chunk of the run; those
            of chunks before ``first_block`` are not looked at. None for 0, 1, ...
        first_block: Index of ``block_ids[0]`` in its run of chunks.
        direction: ``gather`` writes slots (slot ids must be distinct), ``scatter`` writes blocks.

    Raises:
        ValueError: An id out of range, a destination named twice, or a wrong number of slot ids.
        TypeError: Ids that are not integers.
    """
    blocks_per_chunk = table.blocks_per_chunk
    first_block = operator.index(first_block)
    if first_block < 0:
        raise ValueError(f"first_block: expected at least 0, got {first_block}")
    skipped, position = divmod(first_block, blocks_per_chunk)
    blocks = _as_ids(block_ids, "block_ids")
    if isinstance(blocks, np.ndarray):
        check_ids("block_ids", blocks, table.num_blocks, distinct=direction == "scatter")
    n = blocks.shape[0]
    num_chunks = -(-(first_block + n) // blocks_per_chunk) if n else 0
    if slot_ids is None:
        slots: IdArray | torch.Tensor = np.arange(skipped, max(skipped, num_chunks), dtype=np.int64)
        if num_chunks > num_slots:
            raise ValueError(
                f"slots: expected at least {num_chunks} slots for {n} blocks from block "
                f"{first_block} on, got {num_slots}"
            )
    else:
        slots = _as_ids(slot_ids, "slot_ids")
        if slots.shape[0] != num_chunks:
            raise ValueError(
                f"slot_ids: expected {num_chunks} ids for {n} blocks from block {first_block} on "
                f"in chunks of {blocks_per_chunk}, got {slots.shape[0]}"
            )
        slots = slots[skipped:]
        if isinstance(slots, np.ndarray):
            check_ids("slot_ids", slots, num_slots, distinct=direction == "gather")
    return BlockRun(_as_tensor(blocks), _as_tensor(slots), position)


def check_ids(name: str, ids: IdArray, limit: int, *, distinct: bool) -> None:
    """Raise ValueError unless all ``ids`` (int64 ``[n]``) lie in ``[0, limit)``, and where
    ``distinct`` is set, each at most once. 8,192 ids take some 0.02 ms."""
    if ids.size == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limit:
        raise ValueError(
            f"{name}: expected ids in [0, {limit}), got {low if low < 0 else high} at index "
            f"{int(ids.argmin() if low < 0 else ids.argmax())}"
        )
    if not distinct or ids.size == 1:
        return
    span = high - low + 1
    if span <= 64 * ids.size:
        seen = np.zeros(span, dtype=np.bool_)
        seen[ids - low] = True
        repeated = int(np.count_nonzero(seen)) != ids.size
    else:  # a few ids far apart: sorting them is less than clearing a bitmap of all between
        ordered = np.sort(ids)
        repeated = bool((ordered[1:] == ordered[:-1]).any())
    if repeated:
        values, counts = np.unique(ids, return_counts=True)
        value = int(values[counts > 1][0])
        raise ValueError(
            f"{name}: expected each destination once, got {value} {int(counts.max())} times"
        )


def check_slots(table: PageTable, slots: torch.Tensor) -> None:
    """Raise ValueError unless ``slots`` is uint8 ``[num_slots, >= table.slot_bytes]`` with
    contiguous, non-overlapping rows. Its device is the caller's to check."""
    if slots.dtype != torch.uint8 or slots.dim() != 2:
        raise ValueError(
            f"slots: expected uint8 [num_slots, >= {table.slot_bytes}], got {slots.dtype} "
            f"{list(slots.shape)}"
        )
    if slots.shape[1] < table.slot_bytes:
        raise ValueError(
            f"slots: expected rows of at least {table.slot_bytes} bytes, got {slots.shape[1]}"
        )
    if slots.stride(1) != 1 or (slots.shape[0] > 1 and slots.stride(0) < table.slot_bytes):
        raise ValueError(
            f"slots: expected contiguous bytes in rows that do not overlap, got strides "
            f"{slots.stride()} for shape {list(slots.shape)}"
        )


def alignment_of(*parts: int) -> int:
    """Largest of 16, 8, 4, 2, 1 that divides every address or size given."""
    bits = 16
    for part in parts:
        bits |= part
    return bits & -bits


def _byte_view(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """uint8 ``[num_blocks, page_bytes]`` over the memory of ``tensor``."""
    shape, strides = tensor.shape, tensor.stride()
    if tensor.dim() == 0 or tensor.numel() == 0:
        raise ValueError(f"{name}: expected [num_blocks, ...] with no empty dim, got {list(shape)}")
    page_elements = 1
    for size, stride in zip(reversed(shape[1:]), reversed(strides[1:]), strict=True):
        if size != 1 and stride != page_elements:
            raise ValueError(
                f"{name}: expected contiguous dims after the first, got strides {strides} for "
                f"shape {list(shape)}"
            )
        page_elements *= size
    item = tensor.element_size()
    page_bytes = page_elements * item
    # The stride of a dim of size 1 means nothing, and torch does not keep it.
    block_stride = strides[0] * item if shape[0] > 1 else page_bytes
    if block_stride < page_bytes:
        raise ValueError(
            f"{name}: expected a block stride of at least a page ({page_bytes} bytes), got "
            f"{block_stride} bytes"
        )
    # Tensor.view(torch.uint8) refuses some dtypes; a view of the storage serves all of them.
    view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return view.set_(
        tensor.untyped_storage(),
        tensor.storage_offset() * item,
        (shape[0], page_bytes),
        (block_stride, 1),
    )


def _merge_runs(pages: tuple[PageRow, ...], blocks_per_chunk: int) -> tuple[ByteRun, ...]:
    """Extents ``[offset, offset + B * pitch)`` of the rows in slot order, adjacent ones merged."""
    extents: list[list[int]] = []
    for start, end in sorted((r.offset, r.offset + blocks_per_chunk * r.pitch) for r in pages):
        if extents and start <= extents[-1][1]:
            extents[-1][1] = max(extents[-1][1], end)
        else:
            extents.append([start, end])
    runs = []
    packed_offset = 0
    for start, end in extents:
        runs.append(ByteRun(start, packed_offset, end - start))
        packed_offset += end - start
    return tuple(runs)


def _as_ids(ids: Ids, name: str) -> IdArray | torch.Tensor:
    """int64 ``[n]``: an array for ids on the host, the tensor itself for ids on a device."""
    if isinstance(ids, torch.Tensor):
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"{name}: expected integers [n], got {ids.dtype} {list(ids.shape)}")
        if ids.device.type != "cpu":
            return ids.to(torch.int64).contiguous()
        array: npt.NDArray[np.integer] = ids.numpy()
    else:
        array = np.asarray(ids)
        if array.size == 0:
            array = array.astype(np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TypeError(f"{name}: expected integers [n], got {array.dtype} {array.shape}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _as_tensor(ids: IdArray | torch.Tensor) -> torch.Tensor:
    if isinstance(ids, torch.Tensor):
        return ids
    # torch warns of arrays that it could write to by mistake; a read-only one is copied.
    return torch.from_numpy(ids if ids.flags.writeable else ids.copy())
