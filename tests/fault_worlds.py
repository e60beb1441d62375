"""A scenario of stores and loads on a device that fails, and what must be where, whatever fails.

Every chunk has source pages that never change, so that what a slot or a page must hold follows
from its key alone. Chunk 2 of group 0 is stored in two parts.
"""

from __future__ import annotations

import gc
import math
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from triton_offload.calibration import Path
from triton_offload.device.base import Device
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import (
    Direction,
    TransferResult,
    TransferStatus,
)
from triton_offload.testing import InjectedError, SimulatedDevice
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.pipeline import Pipeline, PipelineOptions

#: every call of the seam; a new one is found here, and lacks a test until the scenario makes it
SEAM = tuple(
    name for name, member in vars(Device).items() if callable(member) and not name.startswith("_")
)
EVERY = math.inf

# What raises to whom it is called for; everything else is the job's, or nobody's.
SUBMITTING = {"capturing", "check_stream", "current_stream", "new_event", "prepare", "record"}
WAITING = {"monotonic", "sleep"}

PAGES = (16, 8, 9)  # bytes, of each tensor
PADDED = (16, 8, 7)  # ... with bytes at the end that are not the group's
GROUPS = ((0, 1), (2,))
SPAN = 2  # blocks per chunk
NUM_CHUNKS = 8  # of a group's source blocks
NUM_SOURCE = SPAN * NUM_CHUNKS
NUM_BLOCKS = 2 * NUM_SOURCE  # the rest is loaded into
SLOT_BYTES = SPAN * sum(PAGES)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it came of."""
    while error is not None:
        yield error
        error = error.__cause__


@dataclass(eq=False)
class Job:
    """One accepted transfer. `chunks`: (chunk, positions) each; `slots`: where they lie."""

    handle: Any
    direction: Direction
    group: int
    chunks: list[tuple[int, set[int]]]
    slots: list[int]
    blocks: list[int]
    result: TransferResult | None = None

    @property
    def failed(self) -> bool:
        return self.result is not None and not self.result.success


class FaultWorld(ABC):
    """Transfers by one level of the package, and what is known of them.

    `have`: the positions that are stored of each (group, chunk). `raised`: what calls raised that
    a fault explains; anything else they raise is passed on.
    """

    used = PAGES
    device: SimulatedDevice
    pool: HostPool
    layout: CacheLayout

    def __init__(self, seed: int, path: Path | None, **device_options: Any) -> None:
        self.device = SimulatedDevice(seed, **device_options)
        self.threads = threading.active_count()
        self.options = PipelineOptions(
            path=path, buffer_bytes=2 * SLOT_BYTES, num_buffers=2, max_indices=1
        )
        generator = torch.Generator().manual_seed(seed)
        self.tensors = [self.device.empty(NUM_BLOCKS * page).view(-1, page) for page in PAGES]
        for tensor in self.tensors:
            tensor[:NUM_SOURCE] = torch.randint(
                0, 256, (NUM_SOURCE, tensor.shape[1]), dtype=torch.uint8, generator=generator
            )
        self.calls_before = dict(self.device.calls)
        self.have: dict[tuple[int, int], set[int]] = {}
        self.jobs: list[Job] = []
        self.raised: list[tuple[str, BaseException]] = []
        self.injected: BaseException | None = None
        self._free = {group: list(range(NUM_SOURCE, NUM_BLOCKS)) for group in range(len(GROUPS))}

    # -- what the levels differ in --

    @abstractmethod
    def open(self) -> None:
        """Construct what is under test."""

    @abstractmethod
    def close_once(self, timeout: float | None = None) -> None: ...

    @property
    @abstractmethod
    def pipeline(self) -> Pipeline: ...

    @abstractmethod
    def _store(self, group: int, chunks: list[int], blocks: list[int], first: int) -> Any: ...

    @abstractmethod
    def _load(
        self, group: int, chunks: list[int], blocks: list[int], first: int, expedited: bool
    ) -> Any: ...

    @abstractmethod
    def _wait(self, jobs: list[Job], timeout: float | None) -> None: ...

    @abstractmethod
    def _finished(self) -> list[tuple[Any, TransferResult]]:
        """(handle, result) of jobs that ended since the last call."""

    @abstractmethod
    def _follow(self, job: Job) -> None:
        """Let the compute stream wait for the release of the job's pages."""

    @abstractmethod
    def slot_of(self, group: int, chunk: int) -> int: ...

    @abstractmethod
    def drop(self) -> None:
        """Forget what is under test."""

    @abstractmethod
    def check_idle(self) -> None:
        """Nothing is held for a job any more."""

    @abstractmethod
    def after_step(self) -> None:
        """What a level checks of its own after every step."""

    # -- steps --

    def arm(self, call: str, nth: int, times: float = 1) -> None:
        """Let the nth call from now on raise, and perhaps more of them."""
        self.injected = InjectedError(f"injected: {call} raised")
        self.device.faults.in_call(call, nth, times=times, error=self.injected)

    def store(self, group: int, chunks: list[int], first: int = 0, count: int | None = None):
        """Store chunks that lie side by side, or a part of them."""
        span = self._span(chunks, first, count)
        blocks = [chunk * SPAN + position for chunk, part in span for position in sorted(part)]
        handle = self.call("submit", self._store, group, chunks, blocks, first)
        self.after_step()
        return self._accept(handle, Direction.STORE, group, span, blocks)

    def load(self, group: int, chunks: list[int], *, expedited: bool = False):
        """Load what is there of some chunks that lie side by side."""
        chunks = [chunk for chunk in chunks if len(self.have.get((group, chunk), ())) == SPAN]
        if not chunks:
            return None
        span = self._span(chunks, 0, None)
        blocks = [self._free[group].pop(0) for _ in range(SPAN * len(chunks))]
        handle = self.call("submit", self._load, group, chunks, blocks, 0, expedited)
        if handle is None:
            self._free[group] += blocks
        return self._accept(handle, Direction.LOAD, group, span, blocks)

    def follow(self, job: Job | None) -> None:
        """The compute stream goes on when the job has released its pages."""
        if job is not None and job.result is None:
            self.call("follow", self._follow, job)

    def collect(self) -> None:
        """Take in reports: each job's once, and the pages are the engine's from then on."""
        for handle, result in self.call("collect", self._finished) or []:
            (job,) = [job for job in self.jobs if job.handle is handle or job.handle == handle]
            assert job.result is None, f"job {handle} was reported twice"
            job.result = result
            self._ended(job)
        self.after_step()

    def finish(self, timeout: float | None = None) -> None:
        """Until every job is reported. Calls may fail, but somebody who goes on gets there."""
        for _ in range(30):
            pending = [job for job in self.jobs if job.result is None]
            if not pending:
                return
            self.call("wait", self._wait, pending, timeout)
            self.collect()
            if any(job.result is None for job in pending):
                self.device.drain()
        raise AssertionError(f"never reported: {pending}\n{self.device.trace(60)}")

    def call(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """None where the injected error was raised."""
        try:
            return function(*args)
        except Exception as error:
            if self.injected is None or not any(e is self.injected for e in causes(error)):
                raise
            self.raised.append((what, error))
            return None

    @property
    def failed(self) -> list[Job]:
        return [job for job in self.jobs if job.failed]

    # -- the scenario --

    def begin(self) -> None:
        """Open, and store what must not be lost."""
        self.open()
        self.pool.wait_ready(60)
        self.begin_stored()

    def begin_stored(self) -> None:
        self.store(0, [0, 1])
        self.store(1, [0, 1])
        self.store(0, [2], first=0, count=1)
        self.finish()
        assert all(job.result.success for job in self.jobs)

    def work(self) -> None:
        """Stores and loads of both groups in three lanes, parts of chunks, evictions."""
        self.store(0, [3, 4, 5])
        self.load(0, [0, 1])
        self.follow(self.load(1, [0, 1], expedited=True))
        self.store(1, [2, 3], first=1)
        self.store(0, [2], first=1)
        self.collect()
        self.finish(60)
        self.load(0, [2, 3])
        self.follow(self.load(0, [4, 5]))
        self.store(1, [4])
        self.finish()
        self.store(0, [6, 7])
        self.store(1, [5, 6])
        self.load(1, [4], expedited=True)
        self.finish(60)

    def work_on(self) -> list[Job]:
        """One job more in every lane, after the fault: chunks that `work` left alone."""
        jobs = [self.store(1, [7]), self.load(0, [6]), self.load(1, [4], expedited=True)]
        self.finish()
        return [job for job in jobs if job is not None]

    # -- what must hold --

    def check_pool(self) -> None:
        """Every chunk that is stored has its bytes, and nothing else changed source pages."""
        for (group, chunk), part in self.have.items():
            slot = self.slot(group, self.slot_of(group, chunk))
            for page in self.layout.groups[group].table.pages:
                for position in part:
                    start = page.offset + position * page.pitch
                    found = slot[start : start + page.page_bytes]
                    block = chunk * SPAN + position
                    assert torch.equal(found, page.view[block]), (group, chunk, position)

    def check_loads(self) -> None:
        """Every chunk that is stored loads."""
        before = len(self.jobs)
        for group, chunk in list(self.have):
            self.load(group, [chunk])
            self.finish()
        assert not any(job.failed for job in self.jobs[before:])

    def close(self) -> None:
        """A close that raised has freed all that it could; somebody who tries again gets there."""
        for _ in range(5):
            before = len(self.raised)
            self.call("close", self.close_once)
            if len(self.raised) == before:
                return
        raise AssertionError(f"could not be closed: {self.raised[-1]}")

    def check_freed(self, *, streams: int = 0, pieces: int = 0) -> None:
        """Nothing is left but, at most, so many streams and pieces of pinned memory that gave an
        error."""
        assert len(self.device.streams) <= 2 + streams
        assert self.device.background_names == []
        assert self.device.num_registered <= pieces
        assert threading.active_count() == self.threads
        if not self.device.lost:
            self.device.drain()
            self.device.check()

    def check_memory_freed(self) -> None:
        """Dropped, nothing keeps the rings, but for what the test itself kept."""
        pipeline = weakref.ref(self.pipeline)
        assert not any(lane.streams._ring._buffers for lane in self.pipeline._lanes.values())
        assert not any(lane._indices.capacity for lane in self.pipeline._lanes.values())
        self.jobs.clear()
        self.raised.clear()
        for error in (*causes(self.injected), *causes(self.device.lost)):
            error.__traceback__ = error.__context__ = None
        self.drop()
        gc.collect()
        assert pipeline() is None

    def check_failures(self, call: str) -> None:
        """Every job is reported, and what failed tells why; calls raise what is theirs alone."""
        for job in self.jobs:
            assert job.result is not None
            if job.failed:
                assert job.result.status is TransferStatus.FAILED
                assert job.result.num_bytes == 0
                assert self.injected in causes(job.result.error)
        for what, error in self.raised:
            following = WAITING | {"check_stream", "wait"}
            theirs = {"submit": SUBMITTING, "wait": WAITING, "follow": following}
            assert self.device.lost or (error is self.injected and call in theirs.get(what, ()))

    def check_end(self, *, loads: bool = True) -> None:
        """Nothing that is stored is lost, wrong, pinned or leaked."""
        self.device.faults.clear()
        self.finish()
        self.check_pool()
        if loads:
            self.check_loads()
        self.check_idle()
        self.close()
        self.check_freed()

    # -- inside --

    def slot(self, group: int, slot_id: int) -> torch.Tensor:
        """The bytes of a slot of the group's size."""
        size = self.layout.groups[group].size
        (row,) = self.pool.slabs.rows(size, np.array([slot_id])).tolist()
        return self.pool.slots_of(size)[row]

    @staticmethod
    def _span(chunks: list[int], first: int, count: int | None) -> list[tuple[int, set[int]]]:
        end = len(chunks) * SPAN if count is None else first + count
        return [
            (chunk, set(range(max(first - i * SPAN, 0), min(end - i * SPAN, SPAN))))
            for i, chunk in enumerate(chunks)
        ]

    def _accept(
        self,
        handle: Any,
        direction: Direction,
        group: int,
        span: list[tuple[int, set[int]]],
        blocks: list[int],
    ) -> Job | None:
        if handle is None:
            return None
        slots = [self.slot_of(group, chunk) for chunk, _ in span]
        job = Job(handle, direction, group, span, slots, blocks)
        self.jobs.append(job)
        return job

    def _ended(self, job: Job) -> None:
        """Ordering rule 9: the pages are the engine's, and it writes them, as the races tell."""
        assert job.result is not None
        lost = self.device.lost
        pages = [
            self.tensors[i][block, : self.used[i]]
            for i in GROUPS[job.group]
            for block in job.blocks
        ]
        if not lost:
            self.device.touch(writes=pages)
        if job.direction is Direction.STORE:
            for (chunk, part), slot in zip(job.chunks, job.slots, strict=True):
                if not lost:
                    self.device.touch(reads=[self.slot(job.group, slot)])
                if job.result.success:
                    self.have.setdefault((job.group, chunk), set()).update(part)
            return
        if job.result.success:
            sources = [chunk * SPAN + at for chunk, part in job.chunks for at in sorted(part)]
            for i in GROUPS[job.group]:
                pages_of = self.tensors[i][:, : self.used[i]]
                assert torch.equal(pages_of[job.blocks], pages_of[sources])
        for page in pages:
            page.fill_(0xEE)
        self._free[job.group] += job.blocks
