"""What a test asks of a simulation, and does in it beside the code under test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import torch

from triton_offload.errors import DeviceLostError
from triton_offload.kernels.table import PageTable
from triton_offload.specs import Ids
from triton_offload.testing.faults import Faults
from triton_offload.testing.places import Places
from triton_offload.testing.races import Cells, Race
from triton_offload.testing.schedule import Operation, Stream
from triton_offload.testing.simulation import Simulation


class RaceError(AssertionError):
    """Accesses that nothing orders. The message names both, and the seed."""


class Controls:
    """The part of `SimulatedDevice` that is no device's."""

    def __init__(self, simulation: Simulation, launch_seconds: float) -> None:
        self._simulation = simulation
        self._places: Places = simulation.places
        self._launch_seconds = launch_seconds

    def check(self) -> None:
        """Raise RaceError for the races that were found."""
        if self.races:
            found = "\n".join(str(race) for race in self.races[:3])
            raise RaceError(f"{found}\n{self._history(60)}")

    @property
    def races(self) -> list[Race]:
        """Accesses that nothing ordered, whatever the order was."""
        return self._simulation.races.races

    @property
    def faults(self) -> Faults:
        """What is to go wrong."""
        return self._simulation.faults

    @property
    def streams(self) -> list[Stream]:
        """Streams that are open, in the order of their making; the first two are the engine's."""
        return self._simulation.streams

    @property
    def background_names(self) -> list[str]:
        """Background functions that were not stopped."""
        return [task.name for task in self._simulation.tasks]

    @property
    def num_operations(self) -> int:
        """Operations queued so far, records and waits included."""
        return self._simulation.schedule.num_submitted

    @property
    def num_queued(self) -> dict[tuple[str, str], int]:
        """Operations queued so far by kind and stream, but records and waits."""
        return self._simulation.num_queued

    @property
    def num_blocked(self) -> int:
        """How often a call that should only queue blocked the host."""
        return self._simulation.num_blocked

    @property
    def lost(self) -> DeviceLostError | None:
        """What every call raises since a sticky error."""
        return self._simulation.lost

    @property
    def calls(self) -> dict[str, int]:
        """How often each call of the seam was made."""
        return self._simulation.calls

    def trace(self, last: int | None = None) -> str:
        """The last events, a line each; None: all that are kept."""
        return self._simulation.history(last)

    def reseed(self, seed: int) -> None:
        """Go on in the order of another seed. The trace names this one from here on."""
        self._simulation.reseed(seed)

    def drain(self) -> None:
        """Run every operation that can run."""
        self._simulation.drain()

    def end_hung(self) -> None:
        """Let the operations go on that a fault kept from ending."""
        self._simulation.end_hung()

    def launch(
        self,
        name: str,
        stream: Stream,
        *,
        reads: Sequence[torch.Tensor | Cells] = (),
        writes: Sequence[torch.Tensor | Cells] = (),
        run: Callable[[], object] | None = None,
        seconds: float = 0.0,
    ) -> Operation:
        """Queue a kernel of the engine's own, which touches these uint8 tensors (or the cells of
        `pages_of`)."""
        self._simulation.enter("launch")
        return self._simulation.queue(
            self._simulation.operation(name, stream),
            reads=[self._cells(part) for part in reads],
            writes=[self._cells(part) for part in writes],
            run=run,
            seconds=self._launch_seconds + seconds,
        )

    def pages_of(self, table: PageTable, block_ids: Ids) -> Cells:
        """What a kernel touches that reads or writes the pages of these blocks."""
        return self._places.pages(table, block_ids)

    def touch(
        self, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()
    ) -> None:
        """The host itself reads or writes these bytes now."""
        self._simulation.host_access(
            "access",
            [self._places.of(tensor) for tensor in reads],
            [self._places.of(tensor) for tensor in writes],
        )

    def new_blocking_stream(self, name: str) -> Stream:
        """A stream that synchronises with `legacy_stream`."""
        self._simulation.note_call("new_stream")
        return self._simulation.open_stream(name, blocking=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.drain()
            self.check()
        else:  # wrong bytes, say: what raced is their cause
            found = "".join(f"{race}\n" for race in self.races[:3])
            error.add_note(f"{found}{self._history(40)}")

    def _cells(self, part: torch.Tensor | Cells) -> Cells:
        return self._places.of(part) if isinstance(part, torch.Tensor) else part

    def _history(self, last: int) -> str:
        return f"SimulatedDevice(seed={self._simulation.seed}), last events:\n{self.trace(last)}"
