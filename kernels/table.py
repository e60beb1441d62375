"""Where the pages of a set of cache tensors lie, in the cache and in the slot of a chunk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .arguments import as_integer, shown

#: of a page, what is added up together: two accesses of a warp, and long enough that a CPU adds up
#: at the speed of its cache (see ``sums``)
ROW_BYTES = 1024


def num_rows(page_bytes: int) -> int:
    """Rows of a page."""
    return -(-page_bytes // ROW_BYTES)


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
    first_row: int = 0
    """The number of its page's first row, where bytes are added up (see ``sums``)."""
    is_fragment: bool = False
    """Whether what lies between two of its pages in a slot is not its own: other fragments of the
    same pages, or those of others."""

    @property
    def alignment(self) -> int:
        """Largest of 16, 8, 4, 2, 1 that divides every address of a page, its size, and its
        places in a slot relative to the slot's start."""
        parts = self.view.data_ptr(), self.block_stride, self.page_bytes, self.pitch, self.offset
        return alignment_of(*parts)


@dataclass(frozen=True)
class ByteRange:
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
    memory than a small table of addresses on ``device``. Lists that it was made of are the
    caller's again.

    Args:
        tensors: Cache tensors ``[num_blocks, ...]`` on one device, CPU or GPU: a list, or a dict
            by name. Any dtype; dims after the first contiguous; any block stride of at least a
            page, so views into one storage are fine. Page sizes, dtypes and strides may differ
            between tensors. A tensor ``[2, num_blocks, ...]`` with K and V in one is two of
            them, ``[*tensor]``.
        blocks_per_chunk: Blocks in a chunk, at least 1.
        name: What errors call ``tensors``.

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

    def __init__(
        self,
        tensors: Iterable[torch.Tensor] | Mapping[str, torch.Tensor],
        blocks_per_chunk: int = 1,
        *,
        name: str = "tensors",
    ) -> None:
        blocks_per_chunk = as_integer("blocks_per_chunk", blocks_per_chunk, 1)
        named = _named_tensors(name, tensors)
        rows = []
        offset = first_row = 0
        for label, tensor in named:
            view = _byte_view(tensor, label)
            page_bytes = view.shape[1]
            rows.append(PageRow(view, page_bytes, page_bytes, offset, view.stride(0), first_row))
            offset += blocks_per_chunk * page_bytes
            first_row += num_rows(page_bytes)
        self._fill(tuple(rows), blocks_per_chunk, offset)

    def _fill(self, pages: tuple[PageRow, ...], blocks_per_chunk: int, slot_bytes: int) -> None:
        self.pages = pages
        self.blocks_per_chunk = blocks_per_chunk
        self.slot_bytes = slot_bytes
        self.num_blocks = min(row.view.shape[0] for row in pages)
        self.device = pages[0].view.device
        self.offsets = tuple(row.offset for row in pages)
        self.bytes_per_block = sum(row.page_bytes for row in pages)
        self.byte_ranges = merged_ranges(pages, blocks_per_chunk)
        # What the launchers keep on the device for this table, by how a launch is cut up.
        self.launch_plans: dict[tuple[int, int, int, int], Any] = {}

    def derived(self, pages: tuple[PageRow, ...], slot_bytes: int) -> PageTable:
        """A table of these rows, which are of tensors of this one and lie within a slot."""
        table = PageTable.__new__(PageTable)
        table._fill(pages, self.blocks_per_chunk, slot_bytes)
        return table

    def group(self, refs: Sequence[tuple[int, int]], *, name: str = "refs") -> PageTable:
        """The table of one KV cache group: some of the tensors, in the same slot format.

        Args:
            refs: ``(tensor index, page bytes)`` of each of the group's tensors. Only the first
                ``page bytes`` of a page move, at most the tensor's own. Several groups may name
                the same tensor.
            name: What errors call ``refs``.

        Returns:
            A table with the offsets, pitches and ``slot_bytes`` of this one.

        Raises:
            ValueError: ``refs`` is empty, or an index or a size is out of range.
        """
        if len(refs) == 0:
            raise ValueError(f"{name}: expected at least one tensor, got none")
        rows = []
        for position, ref in enumerate(refs):
            label = f"{name}[{position}]"
            try:
                index, page_bytes = ref
            except (TypeError, ValueError):
                raise ValueError(
                    f"{label}: expected (tensor index, page bytes), got {shown(ref)}"
                ) from None
            index, page_bytes = as_integer(label, index), as_integer(label, page_bytes)
            if index >= len(self.pages):
                raise ValueError(
                    f"{label}: expected a tensor index in [0, {len(self.pages)}), got {index}"
                )
            row = self.pages[index]
            if not 1 <= page_bytes <= row.page_bytes:
                raise ValueError(
                    f"{label}: expected page bytes in [1, {row.page_bytes}] for tensor "
                    f"{index}, got {page_bytes}"
                )
            # In inference mode a view is as fit for use outside of it as its base is.
            rows.append(replace(row, view=row.view[:, :page_bytes], page_bytes=page_bytes))
        return self.derived(tuple(rows), self.slot_bytes)

    def packed(self) -> PageTable:
        """The same pages in a slot without the parts that belong to other tensors.

        A row's offset becomes ``B * sum(pitch)`` over the rows before it in the slot, and
        ``slot_bytes`` their sum over all rows. Rows of one tensor share their place, as they do
        in the full slot. Of fragments the pitch, too, becomes what the table's own take of it.
        """
        starts = [part.slot_offset for part in self.byte_ranges]

        def packed(offset: int) -> int:
            part = self.byte_ranges[int(np.searchsorted(starts, offset, side="right")) - 1]
            return offset - part.slot_offset + part.packed_offset

        rows = []
        for row in self.pages:
            offset, pitch = packed(row.offset), row.pitch
            if row.is_fragment and self.blocks_per_chunk > 1:
                pitch = packed(row.offset + row.pitch) - offset
            rows.append(replace(row, offset=offset, pitch=pitch))
        return self.derived(tuple(rows), sum(part.num_bytes for part in self.byte_ranges))

    def __repr__(self) -> str:
        return (
            f"PageTable({len(self.pages)} tensors on {self.device}, {self.num_blocks} blocks, "
            f"blocks_per_chunk={self.blocks_per_chunk}, slot_bytes={self.slot_bytes})"
        )


def alignment_of(*parts: int) -> int:
    """Largest of 16, 8, 4, 2, 1 that divides every address or size given."""
    bits = 16
    for part in parts:
        bits |= part
    return bits & -bits


def _label(key: object) -> str:
    """A name in full, however long."""
    return repr(key) if isinstance(key, str) else shown(key)


def _named_tensors(
    name: str, tensors: Iterable[torch.Tensor] | Mapping[str, torch.Tensor]
) -> list[tuple[str, torch.Tensor]]:
    """Each tensor with what errors call it; all strided, on one device of a kind that is known."""
    if isinstance(tensors, torch.Tensor) or not isinstance(tensors, Iterable):
        got = "one tensor" if isinstance(tensors, torch.Tensor) else type(tensors).__name__
        raise ValueError(f"{name}: expected a list or dict of tensors, got {got}")
    items = tensors.items() if isinstance(tensors, Mapping) else enumerate(tensors)
    named = [(f"{name}[{_label(key)}]", tensor) for key, tensor in items]
    if not named:
        raise ValueError(f"{name}: expected at least one tensor, got none")
    for label, tensor in named:
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{label}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device.type not in ("cpu", "cuda"):  # torch calls ROCm "cuda" too
            raise ValueError(
                f"{label}: expected a tensor on cpu or cuda, got one on {tensor.device}"
            )
        if tensor.layout is not torch.strided:
            raise ValueError(f"{label}: expected a strided tensor, got {tensor.layout}")
        first_label, first = named[0]
        if tensor.device != first.device:
            raise ValueError(
                f"{label}: expected a tensor on {first.device}, as {first_label}, got one on "
                f"{tensor.device}"
            )
    return named


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
    # Tensor.view(torch.uint8) refuses some dtypes; a view of the storage serves all of them. It is
    # written to by any thread, and what is made in inference mode could not be outside of it.
    with torch.inference_mode(False):
        view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        return view.set_(
            tensor.untyped_storage(),
            tensor.storage_offset() * item,
            (shape[0], page_bytes),
            (block_stride, 1),
        )


def merged_ranges(pages: Iterable[PageRow], blocks_per_chunk: int) -> tuple[ByteRange, ...]:
    """The extents of the rows in slot order, adjacent ones merged: ``[offset, offset + B * pitch)``
    or, of a fragment, its pages alone."""
    extents: list[list[int]] = []
    for start, end in sorted(each for row in pages for each in _extents(row, blocks_per_chunk)):
        if extents and start <= extents[-1][1]:
            extents[-1][1] = max(extents[-1][1], end)
        else:
            extents.append([start, end])
    ranges = []
    packed_offset = 0
    for start, end in extents:
        ranges.append(ByteRange(start, packed_offset, end - start))
        packed_offset += end - start
    return tuple(ranges)


def _extents(row: PageRow, blocks_per_chunk: int) -> list[tuple[int, int]]:
    if not row.is_fragment:
        return [(row.offset, row.offset + blocks_per_chunk * row.pitch)]
    starts = [row.offset + position * row.pitch for position in range(blocks_per_chunk)]
    return [(start, start + row.page_bytes) for start in starts]
