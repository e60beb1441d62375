"""What the scheduler side tells the worker side: ids and sizes, no tensors and no torch.

The names are those of vLLM's offloading design and keep its meaning.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from triton_offload.kernels.arguments import IdArray as Ids
from triton_offload.kernels.arguments import as_ids, as_integer, unwritable

__all__ = [
    "CPULoadStoreSpec",
    "Direction",
    "GPULoadStoreSpec",
    "Ids",
    "LoadStoreSpec",
    "TransferResult",
    "TransferStatus",
    "as_ids",
]


_INTEGERS = frozenset({int})


class Direction(Enum):
    """Which way a job moves bytes."""

    STORE = "store"  # device (or, of an import, a medium of the user's) to host
    LOAD = "load"  # host to device (or, of an export, to such a medium)

    # A member is itself alone. The hash of an enum is worked out from its name, in Python, and
    # members are keys of what every job looks up.
    __hash__ = object.__hash__


class LoadStoreSpec:
    """Where one end of a transfer lies. A medium of your own subclasses this."""


@dataclass(frozen=True, slots=True, eq=False)
class GPULoadStoreSpec(LoadStoreSpec):
    """Blocks of device memory, in the order of their groups.

    `block_ids`: int64 [num_blocks]; group g owns the next `group_sizes[g]` of them, and they are
    consecutive blocks of one request. `block_indices[g]` is the place of the group's first block
    in that request, counted in blocks: modulo `blocks_per_chunk` it says where in its first
    chunk the run begins.

    The ids are the spec's own copy, which nobody can write to: a spec may be handed on, and kept,
    by anybody.
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
        sizes = (len(ids),) if group_sizes is None else _counts("group_sizes", group_sizes)
        indices = (
            (0,) * len(sizes) if block_indices is None else _counts("block_indices", block_indices)
        )
        if sum(sizes) != len(ids):
            raise ValueError(f"group_sizes: expected the sum {len(ids)}, got {sizes}")
        if len(indices) != len(sizes):
            raise ValueError(
                f"block_indices: expected {len(sizes)}, one for each group, got {indices}"
            )
        object.__setattr__(self, "block_ids", ids)
        object.__setattr__(self, "group_sizes", sizes)
        object.__setattr__(self, "block_indices", indices)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        # A copy of an array can be written to: copies of a spec, in other processes too, are made.
        return type(self), (self.block_ids, self.group_sizes, self.block_indices)


@dataclass(frozen=True, slots=True, eq=False)
class CPULoadStoreSpec(LoadStoreSpec):
    """Slots of the host pool, one per chunk, in the order of the groups' chunks.

    `fresh`: bool [num_chunks] or None. A store clears what a fresh slot held before; of a slot
    that is not fresh (None: no slot is) it writes its own pages and keeps the rest. Loads ignore
    it. Ids and flags are the spec's own copies, as in `GPULoadStoreSpec`.
    """

    slot_ids: Ids
    fresh: npt.NDArray[np.bool_] | None

    def __init__(
        self,
        slot_ids: Sequence[int] | npt.NDArray[np.integer],
        fresh: bool | Sequence[bool] | npt.NDArray[np.bool_] | None = None,
    ) -> None:
        ids = as_ids("slot_ids", slot_ids)
        object.__setattr__(self, "slot_ids", ids)
        object.__setattr__(self, "fresh", None if fresh is None else _flags(fresh, len(ids)))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.slot_ids, self.fresh)


def _counts(name: str, counts: Iterable[int]) -> tuple[int, ...]:
    # Every job comes by here with few that are right, and names are put together of wrong ones.
    if type(counts) in (tuple, list) and _INTEGERS.issuperset(map(type, counts)):
        if min(counts, default=0) >= 0:
            return tuple(counts)
    elif not isinstance(counts, Iterable):
        raise ValueError(f"{name}: expected a sequence of integers, got {counts!r}")
    return tuple(as_integer(f"{name}[{i}]", n) for i, n in enumerate(counts))


def _flags(
    fresh: bool | Sequence[bool] | npt.NDArray[np.bool_], count: int
) -> npt.NDArray[np.bool_]:
    """bool [count], which nobody can write to."""
    if isinstance(fresh, bool | np.bool_):
        return np.ndarray(count, np.bool_, (b"\1" if fresh else b"\0") * count)
    try:
        flags = np.asarray(fresh)
    except (TypeError, ValueError) as error:
        raise ValueError(f"fresh: expected {count} flags, got {reprlib.repr(fresh)}") from error
    if flags.shape != (count,) or (count and flags.dtype != np.bool_):
        raise ValueError(f"fresh: expected {count} flags, got shape {flags.shape} of {flags.dtype}")
    return unwritable(flags.astype(np.bool_, copy=False))


class TransferStatus(Enum):
    """How a job ended."""

    SUCCESS = "success"  # every byte landed
    FAILED = "failed"
    CANCELLED = "cancelled"  # before any of it had started

    __hash__ = object.__hash__  # as of `Direction`


@dataclass(frozen=True, slots=True)
class TransferResult:
    """The one report of a job.

    `num_bytes`: page bytes moved (0 unless it succeeded). `seconds`: from the start of the
    transfer to its end where the device tells it, else 0.0. `error`: why it failed. Where it
    succeeded, `bytes_by_path`: (name of a path, its part of the bytes) for each; `queue_seconds`:
    from its submission until something of it was queued on the device.
    """

    job_id: int
    status: TransferStatus
    num_bytes: int = 0
    seconds: float = 0.0
    error: BaseException | None = field(default=None, compare=False)
    bytes_by_path: tuple[tuple[str, int], ...] = field(default=(), compare=False)
    queue_seconds: float = field(default=0.0, compare=False)

    @property
    def success(self) -> bool:
        return self.status is TransferStatus.SUCCESS
