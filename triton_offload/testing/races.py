"""Happens-before over bytes: two accesses of a byte, one a write, must be ordered by the program.

Every stream, and the host, is a line of operations that are ordered among themselves. A vector
clock holds, for each line, the number of its last operation that is known to be over: a stream
learns of others by the events that it waits for, the host by those that it saw reached, and an
operation knows what the host knew when it queued it. For every byte the last write and the last
read of every line are kept. An access that
does not know of an earlier one that it conflicts with is a race, whatever the order was this time.

A byte of memory costs 128 bytes here: caches for tests are small.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Clock = npt.NDArray[np.int32]
#: bytes, as indices of the checker's arrays
Cells = slice | npt.NDArray[np.int64]

_LINES = 16
_CELLS = 4096  # to begin with
MOST_BYTES = 4 << 20


@dataclass(slots=True, eq=False)
class Memory:
    """One allocation that the simulation knows, by address."""

    name: str
    start: int
    end: int
    cells: int  # index of its first byte
    on_device: bool
    pinned: bool
    checked: bool


@dataclass(frozen=True, slots=True)
class Race:
    """Two operations on the same byte, at least one of them a write, in no order."""

    earlier: str
    later: str
    first_access: str  # "read" or "write"
    second_access: str
    place: str

    def __str__(self) -> str:
        return (
            f"race on {self.place}: {self.later} {self.second_access}s it, and nothing orders it "
            f"behind {self.earlier}, which {self.first_access}s it. Missing edge: an event that "
            f"is recorded behind {self.earlier}, and that the stream (or the host) of "
            f"{self.later} waits for before that is queued."
        )


class RaceChecker:
    """Remembers who touched every byte last. `races`: what was found, at most `MOST`."""

    MOST = 20

    def __init__(self) -> None:
        self.races: list[Race] = []
        self._starts: list[int] = []
        self._memories: list[Memory] = []
        self._num_cells = 0
        self._names: list[object] = ["the start"] * 1024  # by number
        # [byte, line]: the line's last operation that wrote it, and that read it
        self._written = np.zeros((_CELLS, _LINES), dtype=np.int32)
        self._read = np.zeros((_CELLS, _LINES), dtype=np.int32)

    # -- lines and clocks --

    def new_clock(self) -> Clock:
        return np.zeros(self._written.shape[1], dtype=np.int32)

    def make_room(self, num_lines: int) -> bool:
        """Make room for so many lines; True where clocks made before are too short now."""
        if num_lines <= self._written.shape[1]:
            return False
        self._written = np.hstack([self._written, np.zeros_like(self._written)])
        self._read = np.hstack([self._read, np.zeros_like(self._read)])
        return True

    # -- memory --

    def find(self, address: int) -> Memory | None:
        index = bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._memories[index].end:
            return None
        return self._memories[index]

    def add(
        self,
        start: int,
        size: int,
        name: str,
        *,
        on_device: bool,
        pinned: bool,
        checked: bool = True,
    ) -> Memory:
        """Know an allocation, and where `checked`, who touches its bytes. Older ones at the same
        addresses are gone."""
        end = start + size
        for memory in [m for m in self._memories if m.start < end and start < m.end]:
            place = self._memories.index(memory)
            del self._memories[place], self._starts[place]
        place = bisect_right(self._starts, start)
        memory = Memory(name, start, end, self._num_cells, on_device, pinned, checked)
        self._memories.insert(place, memory)
        self._starts.insert(place, start)
        self._num_cells += size if checked else 0
        return memory

    def cells(self, tensor: torch.Tensor, memory: Memory) -> Cells:
        """The bytes of a uint8 tensor [bytes] or [rows, bytes]."""
        first = memory.cells + tensor.data_ptr() - memory.start
        if tensor.is_contiguous():
            return slice(first, first + tensor.numel())
        width = tensor.shape[-1]
        rows = first + np.arange(tensor.shape[0]) * tensor.stride(0)
        return rows_of(rows, width)

    # -- accesses --

    def access(
        self,
        number: int,
        name: object,
        line: int,
        clock: Clock,
        reads: Sequence[Cells],
        writes: Sequence[Cells],
    ) -> None:
        """An operation of `line` that knows of `clock`; numbers grow with every operation."""
        self._grow(number)
        count_nonzero = np.count_nonzero  # `any` of a small array takes ten times as long
        self._names[number] = name
        clock[line] = number  # a line is in order
        written, read = self._written, self._read
        for cells in reads:
            unknown = written[cells] > clock
            if count_nonzero(unknown):
                self._report(written, unknown, number, "write", "read", cells)
        for cells in writes:
            unknown = written[cells] > clock
            if count_nonzero(unknown):
                self._report(written, unknown, number, "write", "write", cells)
            unknown = read[cells] > clock
            if count_nonzero(unknown):
                self._report(read, unknown, number, "read", "write", cells)
        for cells in reads:
            read[cells, line] = number
        for cells in writes:
            written[cells, line] = number

    def report_ids(self, earlier: object, later: object) -> None:
        """The host wrote the ids of `later` over those of `earlier`, not knowing it to be over."""
        if len(self.races) < self.MOST:
            writes = f"the host's writing of ids for {later}"
            self.races.append(Race(str(earlier), writes, "read", "write", "ids"))

    def _report(
        self,
        accesses: npt.NDArray[np.int32],
        unknown: npt.NDArray[np.bool_],
        later: int,
        first: str,
        second: str,
        cells: Cells,
    ) -> None:
        if len(self.races) >= self.MOST:
            return
        bad, line = (int(index[0]) for index in np.nonzero(unknown))
        cell = cells.start + bad if isinstance(cells, slice) else int(cells[bad])
        earlier = self._names[int(accesses[cell, line])]
        names = str(earlier), str(self._names[later])
        self.races.append(Race(*names, first, second, self._place(cell)))

    def _place(self, cell: int) -> str:
        for memory in self._memories:
            size = memory.end - memory.start if memory.checked else 0
            if memory.cells <= cell < memory.cells + size:
                return f"byte {cell - memory.cells} of {memory.name}"
        return "freed memory"

    def _grow(self, number: int) -> None:
        if number >= len(self._names):
            self._names.extend([""] * len(self._names))
        if self._num_cells > MOST_BYTES:
            raise ValueError(
                f"memory: expected at most {MOST_BYTES} bytes in a simulation that checks them, "
                f"got {self._num_cells} (smaller caches, pools and `buffer_bytes` will do)"
            )
        if self._num_cells > len(self._written):
            room = np.zeros((self._num_cells, self._written.shape[1]), dtype=np.int32)
            self._written = np.vstack([self._written, room])
            self._read = np.vstack([self._read, room])


def rows_of(starts: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.int64]:
    """The indices of `width` bytes from each of `starts` on."""
    indices: npt.NDArray[np.int64] = (starts[:, None] + np.arange(width)).ravel()
    return indices
