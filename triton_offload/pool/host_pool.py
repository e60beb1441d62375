"""The host pool: slots of host memory, exactly as many as asked for."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import torch

from triton_offload.device.base import Background, Device
from triton_offload.pool import shared_memory

# One cudaHostRegister of 512 GiB or more always fails, and each stalls the process for 0.1 s a GB.
_MAX_PIECE_BYTES = 256 << 20
# Not in Python 3.11's mmap; Linux 5.14 and later.
_MADV_POPULATE_WRITE = 23
_POLL_SECONDS = 0.0005


class HostPool:
    """`num_slots` slots of `slot_bytes` bytes: `slots` is uint8 `[num_slots, slot_bytes]`.

    The memory is mapped at construction and usable at once. Touching and, where the device can,
    pinning it goes on in the background, in pieces; `wait_ready` waits for that. A fresh pool
    reads as zeros. Build one with `allocate`, `share`, `attach` or `from_tensor`.
    """

    def __init__(self, device: Device, slots: torch.Tensor, *, owned: bool, pinned: bool) -> None:
        self.device = device
        self.slots = slots
        self.num_slots, self.slot_bytes = slots.shape
        #: copies must not cross a multiple of this many slots: each piece is pinned on its own
        self.piece_slots = self.num_slots
        #: what kept the pool from being pinned, where that was an error
        self.pin_error: Exception | None = None
        self._pinned = pinned
        self._registered: list[torch.Tensor] = []
        self._ready = not owned
        self._closing = False
        self._steps: Generator[None] | None = None
        self._preparing: Background | None = None
        if owned:
            self.piece_slots = _piece_slots(self.num_slots, self.slot_bytes)
            self._steps = self._prepare()
            self._preparing = device.background("triton-offload-pool", self._step)

    @classmethod
    def allocate(cls, device: Device, num_slots: int, slot_bytes: int) -> HostPool:
        """A private pool. Raises ValueError for sizes below one, OSError where memory is out."""
        _check_sizes(num_slots, slot_bytes)
        memory = mmap.mmap(-1, num_slots * slot_bytes)
        return cls(device, _as_slots(memory, num_slots, slot_bytes), owned=True, pinned=False)

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
        with mode 0600. Blocks for that long, at most `timeout` seconds. Raises FileExistsError,
        TimeoutError where a rank does not come, OSError where memory is out; the file is gone
        then too. The memory goes with the last process, however that ends.
        """
        _check_ranks(num_ranks)
        _check_sizes(num_slots, slot_bytes)
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
        _check_ranks(num_ranks)
        _check_sizes(num_slots, slot_bytes)
        memory = shared_memory.join(path, num_slots * slot_bytes, num_ranks, timeout)
        return cls(device, _as_slots(memory, num_slots, slot_bytes), owned=True, pinned=False)

    @classmethod
    def from_tensor(cls, device: Device, slots: torch.Tensor, *, pinned: bool) -> HostPool:
        """A pool over memory that somebody else owns, and has pinned or not.

        `slots`: uint8 `[num_slots, slot_bytes]` on the CPU; rows may lie apart.
        """
        if slots.dtype is not torch.uint8 or slots.dim() != 2 or slots.device.type != "cpu":
            raise ValueError(
                f"slots: expected uint8 [num_slots, slot_bytes] on the cpu, "
                f"got {slots.dtype} {tuple(slots.shape)} on {slots.device}"
            )
        if slots.shape[1] > 1 and slots.stride(1) != 1:
            raise ValueError(f"slots: expected contiguous rows, got stride {slots.stride(1)}")
        _check_sizes(slots.shape[0], slots.shape[1])
        return cls(device, slots, owned=False, pinned=pinned)

    @property
    def pinned(self) -> bool:
        """Whether the whole pool is pinned, so that kernels can reach it and copies never block."""
        return self._pinned and self._ready

    def wait_ready(self, timeout: float | None = None) -> None:
        """Block until touching and pinning have ended; raises TimeoutError."""
        deadline = None if timeout is None else self.device.monotonic() + timeout
        while not self._ready:
            if deadline is not None and self.device.monotonic() >= deadline:
                raise TimeoutError(f"the host pool was not ready within {timeout} s")
            self.device.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Unpin. Idempotent; the memory goes when the last tensor over it does.

        What unpinning a piece raises is raised when the others are unpinned.
        """
        self._closing = True
        if self._preparing is not None:
            self._preparing.stop()
        if self._steps is not None:
            self._steps.close()  # its threads end here, not when they are collected
        self._pinned = False
        with ExitStack() as rest:
            while self._registered:
                rest.callback(self.device.unregister, self._registered.pop())

    def _step(self) -> float:
        """One piece more. Whatever goes wrong, the pool is as good as before, but not pinned."""
        assert self._steps is not None
        try:
            next(self._steps)
        except StopIteration:
            pass
        except Exception as error:
            self.pin_error = error
        else:
            return 0.0
        self._ready = True
        return math.inf

    def _prepare(self) -> Generator[None]:
        """Touch the pages in parallel, then pin piece by piece."""
        pieces = torch.split(self.slots, self.piece_slots)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for piece, _ in zip(pieces, threads.map(self._touch, pieces), strict=True):
                if self._closing or not self.device.register(piece):
                    return
                self._registered.append(piece)
                yield
        self._pinned = True

    def _touch(self, piece: torch.Tensor) -> None:
        # Never by writing: transfers are already under way.
        if not self._closing:
            _populate(piece)


def _check_ranks(num_ranks: int) -> None:
    if num_ranks < 1:
        raise ValueError(f"num_ranks: expected at least 1, got {num_ranks}")


def _check_sizes(num_slots: int, slot_bytes: int) -> None:
    if slot_bytes < 1:
        raise ValueError(f"slot_bytes: expected at least 1, got {slot_bytes}")
    if num_slots < 1:
        raise ValueError(f"num_slots: expected at least one slot in the host pool, got {num_slots}")


def _as_slots(memory: mmap.mmap, num_slots: int, slot_bytes: int) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8).view(num_slots, slot_bytes)


def _piece_slots(num_slots: int, slot_bytes: int) -> int:
    """The most slots of at most 256 MiB that are whole OS pages; all where there is no such."""
    unit = mmap.PAGESIZE // math.gcd(slot_bytes, mmap.PAGESIZE)
    units = _MAX_PIECE_BYTES // (unit * slot_bytes)
    return min(num_slots, units * unit) if units else num_slots


def _populate(piece: torch.Tensor) -> None:
    start = piece.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = piece.data_ptr() + piece.numel() - start
    with suppress(AttributeError, OSError):  # an older kernel: the first transfer touches it
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE
        )
