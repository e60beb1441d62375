"""What a call names: the ids of a run of blocks, and the slots of its chunks. All of it checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .arguments import IdArray, as_ids, as_integer
from .table import PageTable

Ids: TypeAlias = Sequence[int] | npt.NDArray[np.integer] | torch.Tensor
Direction: TypeAlias = Literal["gather", "scatter"]

_FEW_IDS = 32


@dataclass(frozen=True, eq=False)
class BlockRun:
    """Ids of a run of blocks that passed ``check_run``, from the first chunk that holds one.

    Block ``block_ids[i]`` lies in slot ``slot_ids[(first_block + i) // B]`` at position
    ``(first_block + i) % B``.
    """

    block_ids: torch.Tensor
    """int64 ``[num_blocks]``: a copy on the host, or on the device where the caller's lay there;
    those are still the caller's where they were int64 and contiguous."""
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
        block_ids: ``[n]`` block ids; a list, a numpy array or an integer tensor, all copied.
            Tensors on a device are neither looked at nor copied: the host would wait for it.
        num_slots: Slots of the buffer on the other side.
        slot_ids: ``[ceil((first_block + n) / B)]`` slot ids, one for each chunk of the run; those
            of chunks before ``first_block`` are not looked at. None for 0, 1, ...
        first_block: Index of ``block_ids[0]`` in its run of chunks.
        direction: ``gather`` writes slots (slot ids must be distinct), ``scatter`` writes blocks.

    Raises:
        ValueError: An id out of range, a destination named twice, a wrong number of slot ids, or
            ids that are not integers.
    """
    blocks_per_chunk = table.blocks_per_chunk
    first_block = as_integer("first_block", first_block)
    skipped, position = divmod(first_block, blocks_per_chunk)
    blocks = _host_or_device_ids("block_ids", block_ids)
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
        slots = _host_or_device_ids("slot_ids", slot_ids)
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
    if ids.size <= _FEW_IDS:  # a call of numpy takes longer than all of this
        few = ids.tolist()
        within = not few or (min(few) >= 0 and max(few) < limit)
        if within and not (distinct and len(set(few)) < len(few)):
            return
    # As unsigned numbers, ids below 0 are the highest. (`max` is half a microsecond more.)
    high = int(np.maximum.reduce(ids.view(np.uint64)))
    if high >= limit:
        low = int(ids.min())
        raise ValueError(
            f"{name}: expected ids in [0, {limit}), got {low if low < 0 else high} at index "
            f"{int(ids.argmin() if low < 0 else ids.argmax())}"
        )
    if not distinct or ids.size == 1:
        return
    most = 64 * ids.size
    low = 0 if high < most else int(ids.min())
    span = high - low + 1
    if span <= most:
        seen = np.zeros(span, dtype=np.bool_)
        seen[ids - low if low else ids] = True
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
    if not isinstance(slots, torch.Tensor):
        raise ValueError(f"slots: expected a torch.Tensor, got {type(slots).__name__}")
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


def _host_or_device_ids(name: str, ids: Ids) -> IdArray | torch.Tensor:
    """int64 ``[n]``: a copy of ids on the host, the caller's own on a device."""
    if not isinstance(ids, torch.Tensor) or ids.device.type == "cpu":
        return as_ids(name, ids)
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(
            f"{name}: expected a one-dimensional tensor of integers, got {ids.dtype} "
            f"{list(ids.shape)}"
        )
    return ids.to(torch.int64).contiguous()


def _as_tensor(ids: IdArray | torch.Tensor) -> torch.Tensor:
    # torch has no read-only tensors, and warns of arrays that are.
    return ids if isinstance(ids, torch.Tensor) else torch.from_numpy(ids.copy())
