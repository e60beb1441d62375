"""A device that runs what it is given in any order that CUDA would allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NamedTuple

import torch

from triton_offload.device.base import DeviceLostError
from triton_offload.kernels import reference
from triton_offload.kernels.table import BlockRun, PageTable
from triton_offload.specs import Ids
from triton_offload.testing.background import Background
from triton_offload.testing.faults import Faults
from triton_offload.testing.races import Cells, Race
from triton_offload.testing.schedule import Engine, Operation, Stream
from triton_offload.testing.simulation import Record, Simulation

POISON = 0xA5


class RaceError(AssertionError):
    """Accesses that nothing orders. The message names both, and the seed."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Virtual speeds: bytes a second, and seconds.

    `link`: one way, an H100 on PCIe Gen5 x16. `kernel`: what 16 CTAs gather or scatter (the link's
    bytes of 100 us cost some 70 SM us). `device`: a copy inside the device. `launch`: from the
    queue to the first byte. `piece`: a copy engine's time for a small piece of a batch. `call`:
    the host's for one call.
    """

    link: float = 55e9
    kernel: float = 1.2e12
    device: float = 1.5e12
    launch: float = 3e-6
    piece: float = 1.5e-6
    call: float = 2e-6


@dataclass(slots=True, eq=False)
class Event:
    """Bound to its latest record; None: never recorded."""

    latest: Record | None = None


class SimulatedDevice:
    """A device behind the seam (`device.base.Device`) on which no order is ever lucky.

    Nothing runs when it is queued. A scheduler with the given seed picks, one at a time, any
    operation that CUDA's rules would let run next, between any two calls of the host; memory is
    CPU memory, and kernels are their torch references. Beside the bytes, which must come out
    right whatever the order, happens-before is checked for every byte that anybody touches, so
    that a missing wait is found even where the order hid it.

    What is CUDA's: a wait binds the latest record at the time of the call, and an event that was
    never recorded does not block; a query sees a re-record; copies read their source when they
    run; copies of one engine are serial, pieces of a batch are in no order; a copy from or to host
    memory that is not registered blocks the host until the stream gets there (one to the device
    until it has read it); a stream holds `max_queued` operations, and one more blocks the host;
    `legacy_stream` synchronises with streams made as blocking. `num_blocked` counts how often the
    host was blocked by a call that should only queue.

    To test a worker of your own, give it the device, memory from `empty` and `empty_indices`, and
    call `check` at the end, or leave it to `with`:

    ```python
    for seed in range(200):
        with SimulatedDevice(seed) as device:
            pages, staging = device.empty(64), device.empty(64)
            compute, copies = device.current_stream(), device.new_stream("copies")
            device.launch("write", compute, writes=[pages], run=lambda: pages.fill_(7))
            written = device.new_event()
            device.record(written, compute)
            device.wait(copies, written)  # without this line: RaceError
            device.copy(staging, pages, copies)
            device.drain()
            assert (staging == 7).all()
    ```

    A failure names the seed; the same seed and the same calls give the same order. `trace()` is
    what happened, readable. `timing_only`: no bytes and no checks, operations run in the order of
    virtual time, for questions such as how long a copy waits (`Operation.start`); copy engines
    serve streams in turn, or first in, first out without `in_turn`.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        timing_only: bool = False,
        in_turn: bool = True,
        rates: Rates = Rates(),
        max_queued: int = 1024,
    ) -> None:
        self.torch_device = torch.device("cpu")
        self.name = "simulated"
        self.maps_host_memory = True
        self.rates = rates
        self.is_capturing = False
        #: copy engines, one each way
        self.to_device = Engine("host to device")
        self.to_host = Engine("device to host")
        self._simulation = Simulation(
            seed,
            timing_only=timing_only,
            in_turn=in_turn,
            max_queued=max_queued,
            call_seconds=rates.call,
        )
        self._timing_only = timing_only
        self._places = self._simulation.places
        self.legacy_stream = self._simulation.legacy
        self.compute_stream = self._simulation.open_stream("compute")

    # -- what a test asks --

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
    def calls(self) -> dict[str, int]:
        """How often each call of the seam was made."""
        return self._simulation.calls

    def trace(self, last: int | None = None) -> str:
        """The last events, a line each; None: all that are kept."""
        return self._simulation.trace.text(last)

    def drain(self) -> None:
        """Run every operation that can run."""
        self._simulation.drain()

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
            seconds=self.rates.launch + seconds,
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

    def __enter__(self) -> SimulatedDevice:
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
        else:
            error.add_note(self._history(40))

    # -- the host's own steps --

    def monotonic(self) -> float:
        return self._simulation.now

    def sleep(self, seconds: float) -> None:
        self._simulation.enter("sleep")
        self._simulation.sleep(seconds)

    def background(self, name: str, step: Callable[[], float | None]) -> Background:
        self._simulation.note_call("background")
        return Background(name, step, self._simulation.now, self._simulation.tasks)

    # -- streams and events --

    def current_stream(self) -> Stream:
        self._simulation.note_call("current_stream")
        return self.compute_stream

    def capturing(self) -> bool:
        self._simulation.note_call("capturing")
        return self.is_capturing

    def new_stream(self, name: str, *, high_priority: bool = False) -> Stream:
        self._simulation.note_call("new_stream")
        return self._simulation.open_stream(name)

    def close_stream(self, stream: Stream) -> None:
        self._simulation.enter("close_stream", though_lost=True)
        if stream.last is not None and not stream.last.done:
            with suppress(DeviceLostError):
                self._simulation.block_until(stream.last, f"{stream} was not drained", tasks=False)
        stream.closed = True
        self.streams.remove(stream)

    def new_event(self, *, timed: bool = False) -> Event:
        self._simulation.note_call("new_event")
        return Event()

    def record(self, event: Event, stream: Stream) -> None:
        self._simulation.enter("record")
        event.latest = self._simulation.record(stream)

    def wait(self, stream: Stream, event: Event) -> None:
        self._simulation.enter("wait")
        if event.latest is not None:
            self._simulation.wait(stream, event.latest)

    def query(self, event: Event) -> bool:
        self._simulation.enter("query")
        record = event.latest
        if record is None:
            return True
        # By virtual time an operation is run before its end.
        if not record.operation.done or (
            self._timing_only and record.operation.end > self._simulation.now
        ):
            return False
        self._reached(record)
        return True

    def synchronize(self, event: Event, timeout: float | None) -> None:
        self._simulation.enter("synchronize")
        record = event.latest
        if record is not None:
            operation = record.operation
            self._simulation.block_until(operation, "the event was not reached", timeout)
            self._reached(record)

    def elapsed(self, start: Event, end: Event) -> float:
        self._simulation.note_call("elapsed")
        if start.latest is None or end.latest is None:
            raise RuntimeError("start, end: expected recorded events")
        return end.latest.operation.end - start.latest.operation.end

    # -- memory --

    def empty(self, num_bytes: int) -> torch.Tensor:
        self._simulation.note_call("empty")
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        if not self._timing_only:
            buffer.fill_(POISON)
        self._places.add(buffer, f"device buffer {self.calls['empty']}", on_device=True)
        return buffer

    def empty_indices(self, count: int) -> torch.Tensor:
        self._simulation.note_call("empty_indices")
        indices = torch.full((count,), -1, dtype=torch.int64)
        self._places.add_indices(indices, f"ids {self.calls['empty_indices']}")
        return indices

    def register(self, host: torch.Tensor) -> bool:
        self._simulation.enter("register")
        self._places.pin(host, pinned=True)
        return True

    def unregister(self, host: torch.Tensor) -> None:
        self._simulation.enter("unregister", though_lost=True)
        if self._simulation.lost is None:  # nobody may be using it
            self._simulation.host_access("unregistering", [], [self._places.of(host)])
        self._places.pin(host, pinned=False)

    # -- work --

    def fill_zero(self, buffer: torch.Tensor, stream: Stream) -> None:
        self._simulation.enter("fill_zero")
        self._simulation.queue(
            self._simulation.operation("fill_zero", stream, self._places.text(buffer)),
            writes=[self._places.of(buffer)],
            run=buffer.zero_,
            seconds=self.rates.launch + buffer.numel() / self.rates.device,
        )

    def copy(self, dst: torch.Tensor, src: torch.Tensor, stream: Stream) -> None:
        self._simulation.enter("copy")
        places = self._places
        engine, seconds = self._transit(places.on_device(dst), places.on_device(src))
        to_pageable, source = places.pageable(dst), src
        if to_pageable or places.pageable(src):
            self._wait_for_host(stream)
            source = src.clone()  # it is read before the call returns
        operation = self._simulation.operation("copy", stream, Pair(places.text, src, dst))
        self._simulation.queue(
            operation,
            reads=[places.of(src)],
            writes=[places.of(dst)],
            run=lambda: dst.copy_(source),
            engine=engine,
            seconds=self.rates.launch + dst.numel() * seconds,
        )
        if to_pageable:
            self._simulation.block_until(
                operation, "a copy to pageable memory was not done", tasks=False
            )

    def copy_batch(self, dst: Ids, src: Ids, sizes: Ids, stream: Stream) -> None:
        self._simulation.enter("copy_batch")
        if len(sizes) == 0:
            return
        places = self._places
        engine, rate = self._transit(
            places.address_on_device(int(dst[0])), places.address_on_device(int(src[0]))
        )
        seconds = max(float(sizes.sum()) * rate, len(sizes) * self.rates.piece)
        reads: list[Cells] = []
        writes: list[Cells] = []
        run = None
        if not self._timing_only:
            reads, writes = places.ranges(src, sizes), places.ranges(dst, sizes)
            order = self._simulation.rng.sample(range(len(sizes)), len(sizes))
            run = places.mover(dst, src, sizes, order)
        self._simulation.queue(
            self._simulation.operation("copy_batch", stream, f"{len(sizes)} pieces"),
            reads=reads,
            writes=writes,
            run=run,
            engine=engine,
            seconds=self.rates.launch + seconds,
        )

    def prepare(self, table: PageTable, slots: torch.Tensor) -> None:
        self._simulation.note_call("prepare")
        self._places.know(table, slots)

    def gather(
        self,
        table: PageTable,
        block_ids: torch.Tensor,
        slots: torch.Tensor,
        slot_ids: torch.Tensor,
        first_block: int,
        stream: Stream,
        *,
        zero_copy: bool,
    ) -> None:
        ids = block_ids, slot_ids
        self._kernel("gather", table, *ids, slots, first_block, stream, zero_copy)

    def scatter(
        self,
        table: PageTable,
        block_ids: torch.Tensor,
        slots: torch.Tensor,
        slot_ids: torch.Tensor,
        first_block: int,
        stream: Stream,
        *,
        zero_copy: bool,
    ) -> None:
        ids = block_ids, slot_ids
        self._kernel("scatter", table, *ids, slots, first_block, stream, zero_copy)

    # -- inside --

    def _kernel(
        self,
        kind: Literal["gather", "scatter"],
        table: PageTable,
        block_ids: torch.Tensor,
        slot_ids: torch.Tensor,
        slots: torch.Tensor,
        first_block: int,
        stream: Stream,
        zero_copy: bool,
    ) -> None:
        simulation, places = self._simulation, self._places
        simulation.enter(kind)
        rate = self.rates.link if zero_copy else self.rates.kernel
        seconds = self.rates.launch + len(block_ids) * table.bytes_per_block / rate
        if self._timing_only:
            simulation.queue(simulation.operation(kind, stream), seconds=seconds)
            return
        blocks, chunks = block_ids.numpy().copy(), slot_ids.numpy().copy()
        pages = places.pages(table, blocks)
        there = places.chunks(table, slots, chunks, first_block, len(blocks))
        gathers = kind == "gather"
        run = BlockRun(block_ids, slot_ids, first_block)
        views = places.views(table, slots)
        operation = simulation.operation(kind, stream, Launch(blocks, chunks, slots))
        for ids in (block_ids, slot_ids):
            if (found := places.ids_of(ids)) is not None:
                simulation.read_ids(operation, *found)
        simulation.queue(
            operation,
            reads=[pages if gathers else there],
            writes=[there if gathers else pages],
            # The kernel reads its ids when it runs, and only then.
            run=lambda: reference.move_run(table, run, views, kind),
            seconds=seconds,
        )

    def _cells(self, part: torch.Tensor | Cells) -> Cells:
        return self._places.of(part) if isinstance(part, torch.Tensor) else part

    def _transit(self, to_device: bool, from_device: bool) -> tuple[Engine | None, float]:
        """The copy engine, and seconds a byte."""
        if to_device and from_device:
            return None, 1 / self.rates.device
        return (self.to_device if to_device else self.to_host), 1 / self.rates.link

    def _wait_for_host(self, stream: Stream) -> None:
        """Pageable memory: the call returns only when the stream has got there."""
        self._simulation.num_blocked += 1
        if stream.last is not None:
            self._simulation.block_until(stream.last, f"{stream} was not done", tasks=False)

    def _reached(self, record: Record) -> None:
        self._simulation.learn(record)
        if record.failure is not None:
            raise record.failure

    def _history(self, last: int) -> str:
        return f"SimulatedDevice(seed={self._simulation.seed}), last events:\n{self.trace(last)}"


class Launch(NamedTuple):
    """What a kernel was given, for a reader."""

    blocks: Ids
    chunks: Ids
    slots: torch.Tensor

    def __str__(self) -> str:
        count = f"{self.slots.shape[0]} slots at {self.slots.data_ptr():#x}"
        return f"blocks {self.blocks.tolist()}, chunks {self.chunks.tolist()} of {count}"


class Pair(NamedTuple):
    """What a copy was given, for a reader."""

    text: Callable[[torch.Tensor], str]
    src: torch.Tensor
    dst: torch.Tensor

    def __str__(self) -> str:
        return f"{self.text(self.src)} to {self.text(self.dst)}"
