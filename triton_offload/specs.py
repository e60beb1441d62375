"""What the scheduler side tells the worker side: ids and sizes, no tensors and no torch.

The names are those of vLLM's offloading design and keep its meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


def as_ids(name: str, ids: Sequence[int] | npt.NDArray[np.integer]) -> Ids:
    """`ids` as a one-dimensional int64 array; raises ValueError that names the argument."""
    array = np.asarray(ids)
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: expected a one-dimensional sequence of integers, "
            f"got shape {array.shape} of {array.dtype}"
        )
    return np.ascontiguousarray(array, dtype=np.int64)


class Direction(Enum):
    """Which way a job moves bytes."""

    STORE = "store"  # device to host
    LOAD = "load"  # host to device


class LoadStoreSpec:
    """Where one end of a transfer lies. A medium of your own subclasses this."""


@dataclass(frozen=True, slots=True)
class GPULoadStoreSpec(LoadStoreSpec):
    """Blocks of device memory, in the order of their groups.

    `block_ids`: int64 [num_blocks]; group g owns the next `group_sizes[g]` of them, and they are
    consecutive blocks of one request. `block_indices[g]` is the place of the group's first block
    in that request, counted in blocks: modulo `blocks_per_chunk` it says where in its first
    chunk the run begins.
    """

    block_ids: Ids
    group_sizes: tuple[int, ...]
    block_indices: tuple[int, ...]

    def __init__(
        self,
        block_ids: Sequence[int] | npt.NDArray[np.integer],
        group_sizes: Sequence[int] | None = None,
        block_indices: Sequence[int] | None = None,
    ) -> None:
        ids = as_ids("block_ids", block_ids)
        sizes = (len(ids),) if group_sizes is None else tuple(int(n) for n in group_sizes)
        indices = (0,) * len(sizes) if block_indices is None else tuple(map(int, block_indices))
        if any(n < 0 for n in sizes) or sum(sizes) != len(ids):
            raise ValueError(
                f"group_sizes: expected non-negative sizes with the sum {len(ids)}, got {sizes}"
            )
        if len(indices) != len(sizes) or any(i < 0 for i in indices):
            raise ValueError(
                f"block_indices: expected {len(sizes)} non-negative indices, got {indices}"
            )
        object.__setattr__(self, "block_ids", ids)
        object.__setattr__(self, "group_sizes", sizes)
        object.__setattr__(self, "block_indices", indices)


@dataclass(frozen=True, slots=True)
class CPULoadStoreSpec(LoadStoreSpec):
    """Slots of the host pool, one per chunk, in the order of the groups' chunks.

    `fresh`: bool [num_chunks] or None. A store clears what a fresh slot held before; of a slot
    that is not fresh (None: no slot is) it writes its own pages and keeps the rest. Loads ignore
    it.
    """

    slot_ids: Ids
    fresh: npt.NDArray[np.bool_] | None

    def __init__(
        self,
        slot_ids: Sequence[int] | npt.NDArray[np.integer],
        fresh: bool | Sequence[bool] | npt.NDArray[np.bool_] | None = None,
    ) -> None:
        ids = as_ids("slot_ids", slot_ids)
        flags: npt.NDArray[np.bool_] | None = None
        if isinstance(fresh, bool):
            flags = np.full(len(ids), fresh)
        elif fresh is not None:
            flags = np.asarray(fresh, dtype=np.bool_)
            if flags.shape != ids.shape:
                raise ValueError(f"fresh: expected {len(ids)} flags, got shape {flags.shape}")
        object.__setattr__(self, "slot_ids", ids)
        object.__setattr__(self, "fresh", flags)


class TransferStatus(Enum):
    """How a job ended."""

    SUCCESS = "success"  # every byte landed
    FAILED = "failed"
    CANCELLED = "cancelled"  # before any of it had started


@dataclass(frozen=True, slots=True)
class TransferResult:
    """The one report of a job.

    `num_bytes`: page bytes moved (0 unless it succeeded). `seconds`: from the start of the
    transfer to its end where the device tells it, else 0.0. `error`: why it failed.
    """

    job_id: int
    status: TransferStatus
    num_bytes: int = 0
    seconds: float = 0.0
    error: BaseException | None = field(default=None, compare=False)

    @property
    def success(self) -> bool:
        return self.status is TransferStatus.SUCCESS
