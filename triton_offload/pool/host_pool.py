"""The host pool: slots of host memory, exactly as many as asked for."""

from __future__ import annotations

import math
import mmap
import operator
import os
import warnings
import weakref
from collections.abc import Sequence

import torch

from triton_offload.device.base import Device
from triton_offload.pool import shared_memory
from triton_offload.pool.memory_limits import check_memory, check_room
from triton_offload.pool.placement import place
from triton_offload.pool.preparation import Preparation
from triton_offload.slabs import Slabs

# One cudaHostRegister of 512 GiB or more always fails, and each stalls the process for 0.1 s a GB.
_MAX_PIECE_BYTES = 256 << 20
_POLL_SECONDS = 0.0005


class HostPool:
    """`num_slots` slots of `slot_bytes` bytes: `slots` is uint8 `[num_slots, slot_bytes]`.

    The memory is mapped at construction and usable at once. Touching and, where the device can,
    pinning it goes on in the background, in pieces; `wait_ready` waits for that. A fresh pool
    reads as zeros. Build one with `allocate`, `share`, `attach` or `from_tensor`.

    With slots of several sizes (`slabs`), those are its slabs: `slots_of` has the slots of a size.
    """

    def __init__(
        self,
        device: Device,
        slots: torch.Tensor,
        *,
        owned: bool,
        pinned: bool,
        sizes: Sequence[int] = (),
    ) -> None:
        self.device = device
        self.num_slots, self.slot_bytes = slots.shape
        #: how each slot is cut further
        self.slabs = Slabs.of(self.slot_bytes, self.num_slots, sizes or [self.slot_bytes])
        #: what was asked for its memory and refused, in words
        self.notes: tuple[str, ...] = ()
        #: copies must not cross a multiple of this many slots: each piece is pinned on its own
        self.piece_slots = self.num_slots
        #: whether others write to slots between two jobs: nobody knows what they held last
        self.has_other_writers = False
        self._slots: torch.Tensor | None = slots
        self._slots_of: dict[int, torch.Tensor] = {}
        self._pinned = pinned
        self._preparation: Preparation | None = None
        if owned:
            self.piece_slots = _piece_slots(self.num_slots, self.slot_bytes)
            self._preparation = Preparation(device, torch.split(slots, self.piece_slots))
            self._dropped = weakref.finalize(self, _free_dropped, self._preparation, str(self))
            self._dropped.atexit = False

    @classmethod
    def allocate(
        cls, device: Device, num_slots: int, slot_bytes: int, sizes: Sequence[int] = ()
    ) -> HostPool:
        """A private pool, on the device's NUMA node.

        `sizes`: bytes of the slots that each is cut into; none: it is one slot.
        Where the device can't pin memory that is there, it allocates the pool: pinned from the
        start, in this call, which takes some 0.2 s for each GiB then. Raises ValueError for sizes
        below one and, naming `host_bytes`, for more than is free on this machine or in this control
        group; OSError where memory is out.
        """
        num_slots, slot_bytes = _sizes(num_slots, slot_bytes)
        num_bytes = num_slots * slot_bytes
        check_memory("host_bytes", num_bytes)
        pinned = device.empty_pinned(num_bytes)
        if pinned is not None:
            slots = pinned.zero_().view(num_slots, slot_bytes)
            return cls(device, slots, owned=False, pinned=True, sizes=sizes)
        memory = mmap.mmap(-1, num_bytes)
        slots = _as_slots(memory, num_slots, slot_bytes)
        notes = place(slots, device.numa_node)  # before its pages are touched
        pool = cls(device, slots, owned=True, pinned=False, sizes=sizes)
        pool.notes = notes
        return pool

    @classmethod
    def share(
        cls,
        device: Device,
        num_slots: int,
        slot_bytes: int,
        path: str,
        num_ranks: int,
        timeout: float = 60.0,
    ) -> HostPool:
        """A pool that `num_ranks` processes of one user map: one calls this, the others `attach`.

        `path`: a name in /dev/shm, say, that nothing has yet; it is there until all have come, and
        with mode 0600. All of its memory is taken here and now (a second for some GiB), so that
        nobody finds later that there is none; then blocks until all have come, at most `timeout`
        seconds. Raises FileExistsError, TimeoutError where a rank does not come, ValueError as
        `allocate` does and for more than is free in the path's folder, OSError where memory is out
        all the same; the file is gone then too. The memory goes with the last process, however
        that ends.
        """
        num_ranks = _at_least_one("num_ranks", num_ranks)
        num_slots, slot_bytes = _sizes(num_slots, slot_bytes)
        check_memory("host_bytes", num_slots * slot_bytes)
        check_room("host_bytes", num_slots * slot_bytes, os.path.dirname(path) or ".")
        memory = shared_memory.create(path, num_slots * slot_bytes, num_ranks, timeout)
        return cls(device, _as_slots(memory, num_slots, slot_bytes), owned=True, pinned=False)

    @classmethod
    def attach(
        cls,
        device: Device,
        num_slots: int,
        slot_bytes: int,
        path: str,
        num_ranks: int,
        timeout: float = 60.0,
    ) -> HostPool:
        """The pool that another process makes with `share`, before or after this call.

        Blocks until all ranks have come. Raises ValueError for another size, PermissionError for a
        file that is not this user's alone, TimeoutError, RuntimeError where another rank gave up.
        """
        num_ranks = _at_least_one("num_ranks", num_ranks)
        num_slots, slot_bytes = _sizes(num_slots, slot_bytes)
        memory = shared_memory.join(path, num_slots * slot_bytes, num_ranks, timeout)
        return cls(device, _as_slots(memory, num_slots, slot_bytes), owned=True, pinned=False)

    @classmethod
    def from_tensor(
        cls, device: Device, slots: torch.Tensor, *, pinned: bool, sizes: Sequence[int] = ()
    ) -> HostPool:
        """A pool over memory that somebody else owns, and has pinned or not.

        `slots`: uint8 `[num_slots, slot_bytes]` on the CPU; rows may lie apart, but not with
        `sizes`, which are those of `allocate`.
        """
        if slots.dtype is not torch.uint8 or slots.dim() != 2 or slots.device.type != "cpu":
            raise ValueError(
                f"slots: expected uint8 [num_slots, slot_bytes] on the cpu, "
                f"got {slots.dtype} {tuple(slots.shape)} on {slots.device}"
            )
        if slots.shape[1] > 1 and slots.stride(1) != 1:
            raise ValueError(f"slots: expected contiguous rows, got stride {slots.stride(1)}")
        _sizes(*slots.shape)
        if sizes and not slots.is_contiguous():
            raise ValueError(f"slots: expected no gaps to be cut by sizes, got {slots.stride()}")
        return cls(device, slots, owned=False, pinned=pinned, sizes=sizes)

    @property
    def slots(self) -> torch.Tensor:
        """uint8 `[num_slots, slot_bytes]`. Raises RuntimeError once the pool is closed."""
        if self._slots is None:
            raise RuntimeError("the host pool is closed")
        return self._slots

    def slots_of(self, size: int) -> torch.Tensor:
        """The slots of one size, uint8 `[rows, num_bytes]`: those of `SlotSize.rows` are slots,
        and the others lie across them. Raises RuntimeError once the pool is closed."""
        found = self._slots_of.get(size)
        if found is None:
            found, cut = self.slots, self.slabs.sizes[size]
            if cut.num_bytes < self.slot_bytes:
                num_rows = (self.slabs.num_bytes - cut.num_bytes) // cut.unit + 1
                found = found.as_strided((num_rows, cut.num_bytes), (cut.unit, 1))
            self._slots_of[size] = found
        return found

    @property
    def pinned(self) -> bool:
        """Whether the whole pool is pinned, so that kernels can reach it and copies never wait."""
        return self._pinned if self._preparation is None else self._preparation.pinned

    @property
    def pin_error(self) -> Exception | None:
        """What kept the pool from being pinned, where that was an error."""
        return None if self._preparation is None else self._preparation.error

    @property
    def pin_failure(self) -> str | None:
        """Why the pool could not be pinned, in words; None while that is under way, and where it
        was or where nobody tried."""
        return None if self._preparation is None else self._preparation.failure

    def wait_ready(self, timeout: float | None = None) -> None:
        """Block until touching and pinning have ended; raises TimeoutError, RuntimeError where
        the pool is closed instead."""
        deadline = None if timeout is None else self.device.monotonic() + timeout
        while self._preparation is not None and not self._preparation.ended:
            if self._slots is None:
                raise RuntimeError("the host pool was closed before it was ready")
            if deadline is not None and self.device.monotonic() >= deadline:
                raise TimeoutError(f"the host pool was not ready within {timeout} s")
            self.device.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Unpin, stop every thread, and let go of the memory: it goes with the last tensor that
        somebody else has over it. No transfer may be under way. Idempotent.

        What unpinning a piece raises is raised when the others are unpinned. A pool that goes
        without `close` is freed all the same, with a ResourceWarning.
        """
        self._pinned = False
        self._slots = None
        self._slots_of.clear()
        if self._preparation is not None:
            self._dropped.detach()
            self._preparation.close()

    def __str__(self) -> str:
        return f"host pool of {self.num_slots} slots of {self.slot_bytes} bytes"


def _free_dropped(preparation: Preparation, name: str) -> None:
    try:
        preparation.abandon()
    finally:
        warnings.warn(f"not closed: {name}", ResourceWarning, stacklevel=2)


def _sizes(num_slots: int, slot_bytes: int) -> tuple[int, int]:
    return _at_least_one("num_slots", num_slots), _at_least_one("slot_bytes", slot_bytes)


def _at_least_one(name: str, number: int) -> int:
    try:
        found = 0 if isinstance(number, bool) else operator.index(number)
    except TypeError:
        found = 0
    if found < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {number!r}")
    return found


def _as_slots(memory: mmap.mmap, num_slots: int, slot_bytes: int) -> torch.Tensor:
    with torch.inference_mode(False):  # else nobody could write there outside of the mode
        return torch.frombuffer(memory, dtype=torch.uint8).view(num_slots, slot_bytes)


def _piece_slots(num_slots: int, slot_bytes: int) -> int:
    """The most slots of at most 256 MiB that are whole OS pages, or the fewest that are."""
    unit = mmap.PAGESIZE // math.gcd(slot_bytes, mmap.PAGESIZE)
    units = _MAX_PIECE_BYTES // (unit * slot_bytes)
    return min(num_slots, max(1, units) * unit)
