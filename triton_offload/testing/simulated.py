"""A device that runs what it is given in any order that CUDA would allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch

from triton_offload.calibration import CUDA_PATHS
from triton_offload.errors import DeviceLostError
from triton_offload.kernels.table import PageTable
from triton_offload.specs import Ids
from triton_offload.testing.background import Background
from triton_offload.testing.controls import Controls
from triton_offload.testing.races import Cells
from triton_offload.testing.schedule import Engine, Record, Stream
from triton_offload.testing.simulation import Simulation
from triton_offload.testing.work import Launch, Pair, flip_bit, run_kernel

POISON = 0xA5


@dataclass(frozen=True, slots=True)
class Rates:
    """Virtual speeds: bytes per second, and seconds.

    `link`: one way, an H100 on PCIe Gen5 x16. `kernel`: what 16 CTAs gather or scatter (the link's
    bytes of 100 us cost some 70 SM us). `device`: a copy inside the device. `launch`: from the
    queue to the first byte. `small_copy`: a copy engine's time for a small range of a batch (8 KiB
    at 5.2 GB/s are published for an H100), and what any copy takes of it beside its bytes. `call`:
    the host's for one call.
    """

    link: float = 55e9
    kernel: float = 1.2e12
    device: float = 1.5e12
    launch: float = 3e-6
    small_copy: float = 1.5e-6
    call: float = 2e-6


@dataclass(slots=True, eq=False)
class Event:
    """Bound to its latest record; None: never recorded."""

    latest: Record | None = None


class SimulatedDevice(Controls):
    """A device behind the seam (`device.base.Device`) on which no order is ever lucky.

    Nothing runs when it is queued. A scheduler with the given seed picks, one at a time, any
    operation that CUDA's rules would let run next, between any two calls of the host; memory is
    CPU memory, and kernels are their torch references. Beside the bytes, which must come out
    right whatever the order, happens-before is checked for every byte that anybody touches, so
    that a missing wait is found even where the order hid it.

    What is CUDA's: a wait binds the latest record at the time of the call, and an event that was
    never recorded does not block; a query sees a re-record; copies read their source when they
    run; copies of one engine are serial, ranges of a batch are in no order; a copy from or to host
    memory that is not registered blocks the host until the stream gets there (one to the device
    until it has read it), and a kernel that reaches such memory loses the device; a stream holds
    `max_queued` operations, each range of a batch one, and one more blocks the host;
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
        self.batches_copies = True
        self.default_paths = CUDA_PATHS
        self.needs_interpreter = False
        self.numa_node: int | None = None
        self.limits: tuple[str, ...] = ()
        self.rates = rates
        self.is_capturing = False  # the compute stream does
        #: set it, and a pipeline gives copies of host memory that is not registered to threads
        self.blocks_on_pageable = False
        #: parts of host memory that are registered
        self.num_registered = 0
        #: copy engines, one each way
        self.to_device = Engine("host to device", None if in_turn else deque())
        self.to_host = Engine("device to host", None if in_turn else deque())
        simulation = Simulation(
            seed, timing_only=timing_only, max_queued=max_queued, call_seconds=rates.call
        )
        super().__init__(simulation, rates.launch)
        self._timing_only = timing_only
        self.legacy_stream = self._simulation.legacy
        self.compute_stream = self._simulation.open_stream("compute")

    # -- the host's own steps --

    def monotonic(self) -> float:
        self._simulation.note_call("monotonic", though_lost=True)
        return self._simulation.now

    def sleep(self, seconds: float) -> None:
        self._simulation.enter("sleep", though_lost=True)
        self._simulation.sleep(seconds)

    def background(
        self,
        name: str,
        step: Callable[[], float | None],
        orphaned: Callable[[], None] | None = None,  # its memory goes with the simulation
    ) -> Background:
        self._simulation.note_call("background", though_lost=True)
        return Background(name, step, self._simulation.now, self._simulation.tasks)

    # -- streams and events --

    def current_stream(self) -> Stream:
        self._simulation.note_call("current_stream")
        return self.compute_stream

    def check_stream(self, stream: Stream | None) -> None:
        self._simulation.note_call("check_stream")
        if stream is not None and not any(stream is each for each in self.streams):
            raise ValueError(
                f"stream: expected an open stream of this simulated device, got {stream!r}"
            )

    def capturing(self, stream: Stream | None) -> bool:
        self._simulation.note_call("capturing")
        return self.is_capturing and stream in (None, self.compute_stream)

    def new_stream(self, name: str, *, high_priority: bool = False) -> Stream:
        self._simulation.note_call("new_stream")
        return self._simulation.open_stream(name)

    def close_stream(self, stream: Stream) -> None:
        self._simulation.enter("close_stream", though_lost=True)
        if stream.last is not None and not stream.last.done:
            with suppress(DeviceLostError):
                self._simulation.block_until(stream.last, f"{stream} was not drained", tasks=False)
        self._simulation.drained(stream)
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

    def empty_pinned(self, num_bytes: int) -> torch.Tensor | None:
        self._simulation.note_call("empty_pinned")
        return None

    def register(self, host: torch.Tensor) -> bool:
        self._simulation.enter("register")
        if self._simulation.faults.armed and self._simulation.faults.refuses():
            return False
        self._places.pin(host, pinned=True)
        self.num_registered += 1
        return True

    def unregister(self, host: torch.Tensor) -> None:
        self._simulation.enter("unregister", though_lost=True)
        if self._simulation.lost is None:  # nobody may be using it
            self._simulation.host_access("unregistering", [], [self._places.of(host)])
        self._places.pin(host, pinned=False)
        self.num_registered -= 1

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
        engine, rate = self._transit(places.on_device(dst), places.on_device(src))
        to_pageable, source = places.pageable(dst), src
        if to_pageable or places.pageable(src):
            self._wait_for_host(stream)
            source = src.clone()  # it is read before the call returns
        operation = self._simulation.operation("copy", stream, Pair(places.text, src, dst))
        self._simulation.queue(
            operation,
            reads=[] if self._timing_only else [places.of(src)],
            writes=[] if self._timing_only else [places.of(dst)],
            run=lambda: dst.copy_(source),
            flip=lambda: flip_bit(dst, self._simulation.rng),
            engine=engine,
            seconds=(self.rates.small_copy if engine else self.rates.launch) + dst.numel() * rate,
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
        seconds = max(float(sizes.sum()) * rate, len(sizes) * self.rates.small_copy)
        reads: list[Cells] = []
        writes: list[Cells] = []
        run = None
        if not self._timing_only:
            reads, writes = places.ranges(src, sizes), places.ranges(dst, sizes)
            order = self._simulation.rng.sample(range(len(sizes)), len(sizes))
            run = places.mover(dst, src, sizes, order)
        pageable = any(map(places.address_pageable, (int(dst[0]), int(src[0]))))
        if pageable:
            self._wait_for_host(stream)
        operation = self._simulation.operation("copy_batch", stream, f"{len(sizes)} ranges")
        operation.entries = len(sizes)
        self._simulation.queue(
            operation,
            reads=reads,
            writes=writes,
            run=run,
            engine=engine,
            seconds=self.rates.launch + seconds,
        )
        if pageable:
            what = "a batch from or to pageable memory was not done"
            self._simulation.block_until(operation, what, tasks=False)

    def prepare(self, table: PageTable, slots: torch.Tensor, *, sums: bool = False) -> None:
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
        sums: torch.Tensor | None = None,
    ) -> None:
        ids = block_ids, slot_ids
        self._kernel("gather", table, *ids, slots, first_block, stream, zero_copy, sums)

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
        sums: torch.Tensor | None = None,
    ) -> None:
        ids = block_ids, slot_ids
        self._kernel("scatter", table, *ids, slots, first_block, stream, zero_copy, sums)

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
        sums: torch.Tensor | None,
    ) -> None:
        simulation, places = self._simulation, self._places
        simulation.enter(kind)
        rate = self.rates.link if zero_copy else self.rates.kernel
        seconds = self.rates.launch + block_ids.shape[0] * table.bytes_per_block / rate
        if self._timing_only:
            simulation.queue(simulation.operation(kind, stream), seconds=seconds)
            return
        blocks, chunks = block_ids.numpy().copy(), slot_ids.numpy().copy()
        pages = places.pages(table, blocks)
        there = places.chunks(table, slots, chunks, first_block, len(blocks))
        gathers = kind == "gather"
        reads, writes = ([pages], [there]) if gathers else ([there], [pages])
        if sums is not None:
            reads.append(places.of(sums))
            writes.append(places.of(sums))
        views = places.views(table, slots)
        operation = simulation.operation(kind, stream, Launch(blocks, chunks, slots))
        for ids in (block_ids, slot_ids):
            if (found := places.ids_of(ids)) is not None:
                simulation.read_ids(operation, *found)
        if places.pageable(slots):
            error = RuntimeError(f"{operation} reaches host memory that is not registered")
            simulation.fail(operation, error)
        simulation.queue(
            operation,
            reads=reads,
            writes=writes,
            run=lambda: run_kernel(kind, table, block_ids, views, slot_ids, first_block, sums),
            seconds=seconds,
        )

    def _transit(self, to_device: bool, from_device: bool) -> tuple[Engine | None, float]:
        """The copy engine, and seconds a byte."""
        if to_device and from_device:
            return None, 1 / self.rates.device
        return (self.to_device if to_device else self.to_host), 1 / self.rates.link

    def _wait_for_host(self, stream: Stream) -> None:
        """Pageable memory: the call returns only when the stream has got there."""
        self._simulation.num_blocked += not self._simulation.in_task
        if stream.last is not None:
            self._simulation.block_until(stream.last, f"{stream} was not done", tasks=False)

    def _reached(self, record: Record) -> None:
        self._simulation.learn(record)
        if record.failure is not None:
            raise record.failure
