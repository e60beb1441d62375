"""What a lane of transfers reuses: staging buffers, and host memory for ids."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

from triton_offload.device.base import Device, Event
from triton_offload.kernels.table import PageTable
from triton_offload.specs import Ids

_MAX_VIEWS = 256


@dataclass(slots=True, eq=False)
class StagingBuffer:
    """Device memory that one segment at a time passes through.

    `free_after`: the event of the last work on it (None: never used). `holds`: the packed table
    of the last group that used it. Under another table stale bytes would lie in the gaps between
    pages, and the gaps go to the pool with them.
    """

    memory: torch.Tensor
    free_after: Event | None = None
    holds: PageTable | None = None
    _viewed: tuple[PageTable, torch.Tensor] | None = field(default=None, init=False)

    def slots(self, table: PageTable) -> torch.Tensor:
        """The buffer as uint8 `[slots that fit, slot_bytes]` of the packed table."""
        if self._viewed is None or self._viewed[0] is not table:
            count = self.memory.shape[0] // table.slot_bytes
            view = self.memory[: count * table.slot_bytes].view(count, table.slot_bytes)
            self._viewed = table, view
        return self._viewed[1]


class StagingRing:
    """Buffers used in turn. The host never waits for one: streams wait for `free_after`."""

    def __init__(self, device: Device, num_buffers: int, buffer_bytes: int) -> None:
        self.buffer_bytes = buffer_bytes
        self._buffers = [StagingBuffer(device.empty(buffer_bytes)) for _ in range(num_buffers)]
        self.num_taken = 0

    def take(self) -> StagingBuffer:
        buffer = self._buffers[self.num_taken % len(self._buffers)]
        self.num_taken += 1
        return buffer

    def distrust(self) -> None:
        """Take no buffer for cleared any more."""
        for buffer in self._buffers:
            buffer.holds = None

    def close(self) -> None:
        """Free the memory."""
        self._buffers.clear()

    def _check(self) -> None:
        """Asserts that no two buffers share memory, and that each holds whole chunks."""
        places = sorted(buffer.memory.data_ptr() for buffer in self._buffers)
        assert all(a + self.buffer_bytes <= b for a, b in itertools.pairwise(places))
        for buffer in self._buffers:
            assert len(buffer.memory) == self.buffer_bytes
            assert buffer.holds is None or buffer.holds.slot_bytes <= self.buffer_bytes


class IndexRing:
    """Host memory from which kernels read ids; freed in the order in which it was taken.

    A copy of ids to the device would queue behind a load on the copy engine; kernels read these
    over the link instead. The host writes here when it submits, so the memory of unfinished work
    must not be handed out again: `take` returns None then, and the segment waits for a later call.
    """

    def __init__(self, device: Device, capacity: int) -> None:
        self._memory = device.empty_indices(capacity)
        self._array: Ids = self._memory.numpy()
        # Whoever finds the ring empty takes from its start: the same views over and over, and to
        # make one takes longer than all else here.
        self._views: dict[tuple[int, int], torch.Tensor] = {}
        self._head = 0  # where the next ids go
        self._taken: deque[tuple[int, int]] = deque()  # [begin, end) in order

    @property
    def capacity(self) -> int:
        return len(self._array)

    def has_room(self, count: int) -> bool:
        """Whether so many ids can be taken now; raises ValueError where they never could."""
        return self._find(count) is not None

    def take(self, *parts: Ids) -> list[torch.Tensor] | None:
        """Each part's ids in memory that the device reads, until the matching `free`."""
        begin = self._find(sum(map(len, parts)))
        if begin is None:
            return None
        tensors = []
        place = begin
        for part in parts:
            end = place + len(part)
            self._array[place:end] = part
            tensors.append(self._view(place, end))
            place = end
        self._taken.append((begin, place))
        self._head = place
        return tensors

    @property
    def begin_of_newest(self) -> int:
        """Where what was taken last begins."""
        return self._taken[-1][0]

    def free(self) -> None:
        """Give back the oldest that was taken."""
        self._taken.popleft()
        if not self._taken:
            self._head = 0

    def close(self) -> None:
        """Free the memory; nothing of it is in use. Idempotent."""
        self._views.clear()
        self._memory = torch.empty(0, dtype=torch.int64, device="cpu")
        self._array = np.empty(0, dtype=np.int64)
        self._taken.clear()
        self._head = 0

    def _view(self, begin: int, end: int) -> torch.Tensor:
        view = self._views.get((begin, end))
        if view is None:
            if len(self._views) == _MAX_VIEWS:
                self._views.clear()
            view = self._views[begin, end] = self._memory[begin:end]
        return view

    def _find(self, count: int) -> int | None:
        """Where so many ids fit side by side; None where they must wait."""
        if count > self.capacity:
            raise ValueError(f"ids: expected at most {self.capacity} in a segment, got {count}")
        if not self._taken:
            return 0
        tail = self._taken[0][0]
        if self._head > tail:
            if self._head + count <= self.capacity:
                return self._head
            # `<`: a head that met the tail would look like an empty ring
            return 0 if count < tail else None
        return self._head if self._head + count < tail else None

    def _check(self) -> None:
        """Asserts that what is taken lies within, in order and apart."""
        taken = [part for part in self._taken if part[0] < part[1]]
        assert all(begin >= 0 and end <= self.capacity for begin, end in taken)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(sorted(taken)))
        wraps = sum(b[0] < a[1] for a, b in itertools.pairwise(taken))
        assert wraps <= 1, "the ring turned twice"
        assert self._head == (self._taken[-1][1] if self._taken else 0)
