"""All lanes over one pool: one lock, the order of jobs on the same slots, the feeder.

The ordering rules that every transfer keeps; the code names them where it does:

1. A store reads pages only after what was queued on the engine's stream at submission.
2. A load writes pages only after that too; its copy into staging starts at once.
3. Pages are the job's until it releases them; a load by layers does so band by band.
4. A staging buffer, or memory of ids, is refilled only after its last use. Lanes share none.
5. Jobs of one lane end in the order of their submission; expedited loads have a lane of their own.
6. A slot is not written while another job reads or writes it, whatever the manager says.
7. Submission never blocks on the device. A lane queues a bounded number of operations ahead; what
   exceeds it is queued by later calls and, where nobody calls, by one feeder thread.
8. A partial chunk moves its own pages; the rest of a slot that is not fresh keeps its bytes.
9. A job is reported once, when nothing of it can touch a page or slot any more, failed or not.
10. `wait` returns when the bytes have landed or raises; it consumes no result.
11. Copies are slices, on streams of their own, so that a copy of the engine waits for a slice.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Collection, Iterable
from contextlib import ExitStack, suppress
from typing import cast

from triton_offload.calibration import Path
from triton_offload.device import Device
from triton_offload.device.base import Event, Stream
from triton_offload.device.deferred import Deferred
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec, Ids
from triton_offload.transfer.checksums import Checksums
from triton_offload.transfer.endings import forget_frames
from triton_offload.transfer.job import Job
from triton_offload.transfer.jobs_under_way import JobsUnderWay
from triton_offload.transfer.lanes import LANES, open_lanes
from triton_offload.transfer.layers import Layers
from triton_offload.transfer.layout import CacheLayout, GroupLayout, place
from triton_offload.transfer.options import PipelineOptions as PipelineOptions

_log = logging.getLogger(__name__)

_FEEDER_SECONDS = 0.001  # 55 MB of link, less than a lane has queued
_AHEAD_SECONDS = 0.0001  # between bands of layers, so that their caller has its turn
_POLL_SECONDS = 0.0005


class Pipeline:
    """Moves jobs between a cache and a pool, in three lanes: stores, loads, expedited loads.

    Every method may be called from any thread, and none but `wait`, `wait_on` and `shutdown`
    blocks on the device.
    """

    def __init__(
        self,
        layout: CacheLayout,
        pool: HostPool,
        options: PipelineOptions | None = None,
        lanes: Collection[str] = tuple(LANES),
    ) -> None:
        """`lanes`: those that jobs will come for; the others take no memory, and no jobs."""
        options = options or PipelineOptions()
        for group in layout.groups:
            slots = pool.slabs.sizes[group.size : group.size + 1]
            if not slots or slots[0].num_bytes < group.table.slot_bytes:
                raise ValueError(
                    f"pool: expected slots of at least {group.table.slot_bytes} bytes, "
                    f"got {slots[0].num_bytes if slots else 'none'}"
                )
        self._device: Device = pool.device
        self._deferred: Deferred | None = None
        if self._device.blocks_on_pageable and not pool.pinned:
            held = weakref.ref(pool)
            self._deferred = Deferred(pool.device, lambda: not _pinned(held()))
            self._device = cast(Device, self._deferred)
        self._lock = threading.RLock()
        self._shutting_down = threading.RLock()
        self._layout: CacheLayout | None = layout  # None: no new jobs
        self._slabs = pool.slabs
        #: None: nobody asked for sums
        self.checksums: Checksums | None = None
        if options.verify != "off":
            self.checksums = Checksums(layout, pool.slabs)
        self._jobs = JobsUnderWay(pool.slabs)
        self._finished: dict[Direction, list[Job]] = {direction: [] for direction in Direction}
        # Those that are not closed.
        self._lanes = open_lanes(lanes, self._device, layout, pool, options, self.checksums)
        self._told_lost = False
        with ExitStack() as undo:
            dropped = ExitStack()  # without `shutdown`: nothing may go that is still in use
            for lane in self._lanes.values():
                undo.callback(lane.streams.close)
                dropped.callback(lane.streams.close)
            self._feeder = self._device.background(
                "triton-offload-feeder", self._feed, dropped.close
            )
            undo.pop_all()

    def submit(
        self,
        job_id: int,
        direction: Direction,
        device_spec: GPULoadStoreSpec,
        host_spec: CPULoadStoreSpec,
        *,
        expedited: bool = False,
        stream: Stream | None = None,
        layers: Layers | None = None,
    ) -> Job:
        """Accept a job. `stream`: the engine's compute stream, default: the caller's current one.
        `layers`: load band by band, so that a wait may be for one layer.

        Raises ValueError for ids that are out of range or written twice, RuntimeError while the
        stream captures a graph or after `shutdown`; nothing is queued then.
        """
        self._device.check_stream(stream)
        runs = self._open_layout().plan(direction, device_spec, host_spec, self._slabs.num_slots)
        if len(self._slabs.sizes) > 1:
            runs = place(runs, self._slabs)
        if self._device.capturing(stream):
            which = "the current stream" if stream is None else "stream"
            raise RuntimeError(
                f"{which} captures a graph: expected transfers to be submitted outside of it"
            )
        # Ordering rules 1 and 2: recorded here, on the caller's thread.
        stream = self._device.current_stream() if stream is None else stream
        compute = None
        if stream is not None:
            compute = self._device.new_event()
            self._device.record(compute, stream)
        name = "store"
        if direction is Direction.LOAD:
            name = "expedited" if expedited else "load"
        with self._lock:
            self._open_layout()
            run_of_layer: tuple[int, ...] = ()
            if layers is not None:
                runs, run_of_layer = layers.cut(runs, self._prepare_loads)
            after = self._jobs.before(name, host_spec.slot_ids)
            job = self._lanes[name].submit(job_id, runs, compute, after)
            job.run_of_layer = run_of_layer
            job.num_asked = run_of_layer[0] + 1 if run_of_layer else 0
            self._jobs.add(job, host_spec.slot_ids)
            self._pump()
            if any(lane.has_backlog for lane in self._lanes.values()):
                self._feeder.wake()
            return job

    def cancel(self, job: Job) -> bool:
        """Take a job back of which nothing has been queued; it is reported as cancelled."""
        return self.cancel_all([job])

    def cancel_all(self, jobs: Iterable[Job]) -> bool:
        """Take all of these jobs back, or none: False where something of one has been queued, or it
        has ended, was taken back before or is not this pipeline's, and where there are no jobs.

        Those that are taken back are reported as cancelled, each when the turn of its lane comes.
        """
        jobs = list(dict.fromkeys(jobs))
        with self._lock:
            if not jobs or not all(self._can_cancel(job) for job in jobs):
                return False
            for job in jobs:
                self._lanes[job.lane].cancel(job)
            return True

    def take_finished(self, direction: Direction) -> list[Job]:
        """Jobs that finished since the last call, each lane's in order."""
        with self._lock:
            self._go_ahead()  # who polls computes no layer just now
            self._pump()
            taken, self._finished[direction] = self._finished[direction], []
            return taken

    def wait(self, job: Job, timeout: float | None = None) -> None:
        """Block until the job is finished (ordering rule 10); raises TimeoutError."""
        deadline = None if timeout is None else self._device.monotonic() + timeout
        self._wait(job, deadline, timeout)

    def wait_for_layer(self, job: Job, layer: int, timeout: float | None = None) -> None:
        """Block until a layer's pages are the engine's, whether right or not, or the job is
        finished; raises TimeoutError."""
        deadline = None if timeout is None else self._device.monotonic() + timeout
        while not self.released(job, layer):
            with self._lock:
                event = job.released_after(layer)
                if event is None and not job.finished:
                    event = self._lanes[job.lane].next_event
            self._block(event, deadline, f"layer {layer} was not there within {timeout} s")

    def monotonic(self) -> float:
        """The clock that `wait` counts its timeout by."""
        return self._device.monotonic()

    def _wait(self, job: Job, deadline: float | None, timeout: float | None) -> None:
        while True:
            with self._lock:
                job.ask_for(None)
                self._pump()
                if job.finished:
                    return
                event = self._lanes[job.lane].next_event
            self._block(event, deadline, f"job {job.job_id} was not done within {timeout} s")

    def wait_for_slots(self, slot_ids: Ids, *, writing: bool) -> None:
        """Block until the jobs submitted so far that write these slots have ended, and where
        `writing` those that read them too. Slots that the pool does not have are nobody's."""
        known = slot_ids[(slot_ids >= 0) & (slot_ids < self._slabs.num_slots)]
        with self._lock:
            jobs = self._jobs.before("store" if writing else "load", known)
        for job in jobs:
            self.wait(job)

    def released(self, job: Job, layer: int | None = None) -> bool:
        """Whether the pages of the job, or of a layer, are the engine's again (ordering rule 3)."""
        with self._lock:
            if layer is not None:
                job.ask_for(layer)
            self._pump()
            if job.finished:
                return True
            event = job.released_after(layer)
            if event is None:
                return False
            try:
                return self._device.query(event)
            except Exception:
                return False  # failed: its pages are free when it is finished

    def broken_paths(self, job: Job) -> frozenset[Path]:
        """The paths that could not be queued in the job's lane, for which others stand in."""
        with self._lock:
            return self._lanes[job.lane].broken

    @property
    def all_broken_paths(self) -> frozenset[Path]:
        """Those of any lane; none after `shutdown`."""
        with self._lock:
            return frozenset().union(*(lane.broken for lane in self._lanes.values()))

    def wait_on(
        self, job: Job, stream: Stream, timeout: float | None = None, layer: int | None = None
    ) -> None:
        """Let `stream` follow the release of the job, or of one of its layers, without the host.

        Blocks only while part of that is still in the backlog, for then its last event is not
        recorded yet. Raises ValueError for what is no stream of the device.
        """
        if stream is None:
            raise ValueError("stream: expected the one that is to follow the job, got None")
        self._device.check_stream(stream)
        deadline = None if timeout is None else self._device.monotonic() + timeout
        with self._lock:
            job.ask_for(layer)
        while True:
            with self._lock:
                if not job.has_all_asked_for:
                    self._pump()
                if job.finished:
                    return
                event = job.released_after(layer)
                if event is not None and self._is_known(event):
                    self._device.wait(stream, event)
                    return
                head = None if event is not None else self._lanes[job.lane].next_event
            self._block(head, deadline, f"job {job.job_id} was not queued within {timeout} s")

    def shutdown(self, timeout: float | None = None) -> None:
        """Refuse new jobs, take back what has not started, drain the rest, stop every thread, and
        let go of all memory, the pool's and the cache's included. Idempotent.

        `timeout`: for all of it together. Raises TimeoutError where the device does not finish;
        what its lane holds then stays allocated. Whatever raises, everything else is closed and
        freed; then it is raised, and a later call tries again what is left.
        """
        deadline = None if timeout is None else self._device.monotonic() + timeout
        longest = -1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX)
        if not self._shutting_down.acquire(timeout=longest):
            raise TimeoutError(f"another call of shutdown had not returned within {timeout} s")
        try:
            with self._lock:
                self._layout = None
                for job in self._jobs.of():
                    self.cancel(job)
                names = list(self._lanes)
            with ExitStack() as rest:
                for name in reversed(names):
                    rest.callback(self._close_lane, name, deadline, timeout)
                rest.callback(self._feeder.stop)
        finally:
            self._shutting_down.release()

    # -- a lane's end --

    def _close_lane(self, name: str, deadline: float | None, timeout: float | None) -> None:
        with self._lock:
            jobs = self._jobs.of(name)
        for job in jobs:
            self._wait(job, deadline, timeout)
        self._lanes[name].close()
        with self._lock:
            del self._lanes[name]

    # -- under the lock --

    def _open_layout(self) -> CacheLayout:
        """The layout, where jobs are accepted."""
        layout = self._layout
        if layout is None:
            raise RuntimeError("the worker is shut down")
        return layout

    def _is_known(self, event: Event) -> bool:
        """Whether the device has recorded it, so that other streams can wait for it."""
        return self._deferred is None or self._deferred.is_recorded(event)

    def _prepare_loads(self, groups: Iterable[GroupLayout]) -> None:
        parts = list(groups)
        for lane in self._lanes.values():
            if lane.direction is Direction.LOAD:
                lane.streams.prepare(parts)

    def _can_cancel(self, job: Job) -> bool:
        return job in self._jobs and self._lanes[job.lane].can_cancel(job)

    def _pump(self) -> None:
        for name, lane in self._lanes.items():
            if not lane.is_busy:
                continue
            lane.pump()
            for job in lane.finished:
                self._jobs.remove(job)
                self._finished[job.direction].append(job)
                if job.error is not None:
                    forget_frames(job.error)
            lane.finished.clear()
            if lane.lost is not None and not self._told_lost:
                self._told_lost = True
                _log.warning(
                    "the device was lost, as the lane %s found (%s): every transfer fails from now "
                    "on; start a new process, where `triton-offload doctor` says whether the "
                    "device works",
                    name,
                    repr(lane.lost),
                )

    def _check(self) -> None:
        """Asserts what holds between two calls: of every lane, and of every job in it."""
        with self._lock:
            for name, lane in self._lanes.items():
                lane._check()
                assert not lane.finished
                under_way = {work.job.sequence for work in lane._in_flight if work.ends}
                under_way.update(job.sequence for job in lane._backlog)
                assert {job.sequence for job in self._jobs.of(name)} == under_way, "a job is lost"
                self._jobs._check(name, lane._sequence)
                if lane._contents is not None:
                    lane._contents._check()
            ended = [job for jobs in self._finished.values() for job in jobs]
            assert all(job.finished and job.result is not None for job in ended)

    # -- threads --

    def _block(self, event: object, deadline: float | None, message: str) -> None:
        """Wait for `event`, or a moment where nothing is in flight, with the lock released."""
        left = None if deadline is None else deadline - self._device.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError(message)
        if event is None:
            self._device.sleep(_POLL_SECONDS)
            return
        try:
            self._device.synchronize(event, left)
        except TimeoutError:
            raise TimeoutError(message) from None
        except Exception:
            # Whose failure it is, `pump` finds out and the job's result tells. Where it is this
            # call that fails, pumping now and then takes its place.
            self._device.sleep(_POLL_SECONDS)

    def _feed(self) -> float | None:
        """Ordering rule 7: queue the backlog where nobody calls."""
        with self._lock:
            if not any(lane.has_backlog for lane in self._lanes.values()):
                return None
            # A thread that died would leave the backlog lying; whoever calls next meets the error.
            with suppress(Exception):
                self._pump()
            return _AHEAD_SECONDS if self._go_ahead() else _FEEDER_SECONDS

    def _go_ahead(self) -> bool:
        """Let a run more of loads by layers be queued than was asked for; whether there are any."""
        ahead = [lane.go_ahead() for lane in self._lanes.values()]
        return any(ahead)


def _pinned(pool: HostPool | None) -> bool:
    return pool is None or pool.pinned
