"""All lanes over one pool: one lock, the order of jobs on the same slots, the feeder.

The ordering rules that every transfer keeps; the code names them where it does:

1. A store reads pages only after what was queued on the engine's stream at submission.
2. A load writes pages only after that too; its copy into staging starts at once.
3. Pages are the job's until it releases them.
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

import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import numpy as np

from triton_offload.calibration import CUDA_PATHS, HOST_PATHS, Path, PathTable
from triton_offload.device import Device
from triton_offload.device.base import Stream
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec, Ids
from triton_offload.transfer.lane import Job, Lane
from triton_offload.transfer.layout import CacheLayout, GroupRun
from triton_offload.transfer.paths import PathQueue, SlotMarks

_FEEDER_SECONDS = 0.001  # 55 MB of link, less than a lane has queued
_POLL_SECONDS = 0.0005

# What a slot holds beside a group's chunk, counted from the end of a list with one entry a group:
# zeros, as a pool begins, and bytes of several groups (only stores that keep bytes leave that).
_ZEROS, _MIXED = -1, -2


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """Sizes of the worker side.

    `path`: every segment crosses by it; None: `paths` chooses. `buffer_bytes` and `num_buffers`:
    each lane's staging ring; a buffer holds at least one chunk. `max_indices`: ids in flight a
    lane. `window_bytes`: bytes queued ahead a lane, for cards whose copy engine serves first in,
    first out; it costs throughput, None: no bound.
    """

    path: Path | None = None
    paths: PathTable | None = None
    buffer_bytes: int = 16 << 20
    num_buffers: int = 3
    max_indices: int = 1 << 20
    window_bytes: int | None = None


class Pipeline:
    """Moves jobs between a cache and a pool, in three lanes: stores, loads, expedited loads.

    Every method may be called from any thread, and none but `wait`, `wait_on` and `shutdown`
    blocks on the device.
    """

    def __init__(
        self,
        layout: CacheLayout,
        pool: HostPool,
        options: PipelineOptions = PipelineOptions(),
    ) -> None:
        if pool.slot_bytes < layout.slot_bytes:
            raise ValueError(
                f"pool: expected slots of at least {layout.slot_bytes} bytes, got {pool.slot_bytes}"
            )
        self.layout = layout
        self.pool = pool
        self._device: Device = pool.device
        self._lock = threading.RLock()
        self._closed = False  # no new jobs
        self._stopped = False  # no threads either
        table = options.paths or (HOST_PATHS if self._device.name == "host" else CUDA_PATHS)
        if options.path is not None:
            table = PathTable(options.path)
        # [group, holder]: whether a store of a whole chunk of the group leaves no byte of what the
        # slot held.
        edges = np.tile(np.array([False, True]), (len(layout.groups), 1))
        self._overwrites = np.hstack([~layout.leaves_stale, edges])
        # The group whose chunk each slot holds, or one of the two below.
        self._holder = np.full(pool.num_slots, _ZEROS, dtype=np.int32)
        names = {
            "store": Direction.STORE,
            "load": Direction.LOAD,
            "expedited": Direction.LOAD,
        }
        buffer_bytes = max(
            options.buffer_bytes, max(group.packed.slot_bytes for group in layout.groups)
        )
        # The last job of each lane on each slot, by the lane's count of jobs; 0: none.
        self._last_on_slot = {name: np.zeros(pool.num_slots, dtype=np.int64) for name in names}
        self._jobs_of_lane: dict[str, dict[int, Job]] = {name: {} for name in names}
        self._finished: dict[Direction, list[Job]] = {direction: [] for direction in Direction}
        self._lanes: dict[str, Lane] = {}
        with ExitStack() as undo:
            dropped = ExitStack()  # without `shutdown`: nothing may go that is still in use
            for name, direction in names.items():
                # Ordering rule 4: every lane has its own ring, so that none starves another.
                paths = PathQueue(
                    self._device,
                    layout,
                    pool,
                    direction,
                    f"triton-offload-{name}",
                    num_buffers=options.num_buffers,
                    buffer_bytes=buffer_bytes,
                )
                undo.callback(paths.close)
                dropped.callback(paths.close)
                self._lanes[name] = Lane(
                    self._device,
                    layout,
                    direction,
                    paths,
                    table,
                    # a segment takes at most a quarter, and holds at least one chunk
                    max_indices=max(options.max_indices, 4 * (layout.blocks_per_chunk + 1)),
                    window_bytes=options.window_bytes,
                    zero_copy_allowed=self._zero_copy_allowed,
                    mark_slots=self._mark_slots if direction is Direction.STORE else _no_marks,
                )
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
    ) -> Job:
        """Accept a job. `stream`: the engine's compute stream, default: the caller's current one.

        Raises ValueError for ids that are out of range or written twice, RuntimeError while the
        stream captures a graph or after `shutdown`; nothing is queued then.
        """
        self._device.check_stream(stream)
        runs = self.layout.plan(direction, device_spec, host_spec, self.pool.num_slots)
        if self._device.capturing():
            raise RuntimeError(
                "the current stream captures a graph: expected transfers to be submitted "
                "outside of it"
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
            if self._closed:
                raise RuntimeError("the worker is shut down")
            after = self._order_on_slots(name, host_spec.slot_ids)
            job = self._lanes[name].submit(job_id, runs, compute, after)
            self._last_on_slot[name][host_spec.slot_ids] = job.sequence
            self._jobs_of_lane[name][job.sequence] = job
            self._pump()
            if any(lane.has_backlog for lane in self._lanes.values()):
                self._feeder.wake()
            return job

    def cancel(self, job: Job) -> bool:
        """Take a job back, if nothing of it has been queued; it is reported as cancelled."""
        with self._lock:
            return job.lane.cancel(job)

    def take_finished(self, direction: Direction) -> list[Job]:
        """Jobs that finished since the last call, each lane's in order."""
        with self._lock:
            self._pump()
            taken, self._finished[direction] = self._finished[direction], []
            return taken

    def wait(self, job: Job, timeout: float | None = None) -> None:
        """Block until the job is finished (ordering rule 10); raises TimeoutError."""
        deadline = None if timeout is None else self._device.monotonic() + timeout
        while True:
            with self._lock:
                self._pump()
                if job.finished:
                    return
                event = job.lane.next_event
            self._block(event, deadline, f"job {job.job_id} was not done within {timeout} s")

    def released(self, job: Job) -> bool:
        """Whether the job's pages are the engine's again (ordering rule 3)."""
        with self._lock:
            self._pump()
            if job.finished:
                return True
            if not job.queued or job.released is None:
                return False
            try:
                return self._device.query(job.released)
            except Exception:
                return False  # failed: its pages are free when it is finished

    def wait_on(self, job: Job, stream: Stream, timeout: float | None = None) -> None:
        """Let `stream` follow the job's release, without the host.

        Blocks only while part of the job is still in the backlog, for then its last event is not
        recorded yet. Raises ValueError for what is no stream of the device.
        """
        if stream is None:
            raise ValueError("stream: expected the one that is to follow the job, got None")
        self._device.check_stream(stream)
        deadline = None if timeout is None else self._device.monotonic() + timeout
        while True:
            with self._lock:
                self._pump()
                if job.finished:
                    return
                if job.queued:
                    self._device.wait(stream, job.released)
                    return
                head = job.lane.next_event
            self._block(head, deadline, f"job {job.job_id} was not queued within {timeout} s")

    def shutdown(self, timeout: float | None = None) -> None:
        """Refuse new jobs, take back what has not started, drain the rest, stop every thread.

        Idempotent. Raises TimeoutError where the device does not finish; what it still holds then
        stays allocated, and a later call tries again. What closing a stream raises is raised when
        everything else is closed and freed.
        """
        deadline = None if timeout is None else self._device.monotonic() + timeout
        with self._lock:
            if self._stopped:
                return
            self._closed = True
            for jobs in self._jobs_of_lane.values():
                for job in jobs.values():
                    job.lane.cancel(job)
        self._feeder.stop()
        for job in self._unfinished():
            self.wait(
                job, None if deadline is None else max(0.0, deadline - self._device.monotonic())
            )
        with ExitStack() as rest:
            for lane in self._lanes.values():
                rest.callback(lane.close)
            self._stopped = True

    # -- under the lock --

    def _pump(self) -> None:
        for name, lane in self._lanes.items():
            lane.pump()
            jobs = self._jobs_of_lane[name]
            for job in lane.finished:
                del jobs[job.sequence]
                self._finished[job.direction].append(job)
                if job.direction is Direction.STORE and job.error is not None:
                    for run in job.runs:  # who knows what it wrote, or did not clear
                        self._holder[run.slot_ids] = _MIXED
            lane.finished.clear()

    def _order_on_slots(self, name: str, slot_ids: Ids) -> list[Job]:
        """Ordering rule 6: the jobs that must be done with these slots first.

        A lane's jobs end in order, so that its last one on any of the slots stands for all.
        """
        after: list[Job] = []
        if len(slot_ids) == 0:
            return after
        for other in list(self._lanes) if name == "store" else ["store"]:
            last = int(self._last_on_slot[other][slot_ids].max())
            job = self._jobs_of_lane[other].get(last)
            if job is not None:
                after.append(job)
        return after

    def _mark_slots(self, run: GroupRun) -> SlotMarks:
        """What a store must clear, and note whose bytes its slots hold from here on."""
        group, partial = run.group.index, run.partial_chunks()
        holder = self._holder[run.slot_ids]
        fresh = np.zeros(len(holder), dtype=np.bool_) if run.fresh is None else run.fresh
        stale = np.flatnonzero(fresh & ~self._overwrites[group, holder])
        alone = fresh | (holder == _ZEROS) | (holder == group)
        self._holder[run.slot_ids] = np.where(alone, group, _MIXED)
        return SlotMarks(
            kept=tuple(np.flatnonzero(~fresh).tolist())
            if run.group.has_gaps
            else tuple(chunk for chunk in partial if not fresh[chunk]),
            unfilled=tuple(chunk for chunk in partial if fresh[chunk]),
            stale=tuple(stale.tolist()),
        )

    def _zero_copy_allowed(self) -> bool:
        return self._device.maps_host_memory and self.pool.pinned

    def _unfinished(self) -> list[Job]:
        with self._lock:
            return [job for jobs in self._jobs_of_lane.values() for job in jobs.values()]

    def _check(self) -> None:
        """Asserts what holds between two calls: of every lane, and of every job in it."""
        with self._lock:
            for name, lane in self._lanes.items():
                lane._check()
                assert not lane.finished
                under_way = {work.job.sequence for work in lane._in_flight if work.ends}
                under_way.update(job.sequence for job in lane._backlog)
                assert self._jobs_of_lane[name].keys() == under_way, "a job is lost"
                assert (self._last_on_slot[name] <= lane._sequence).all()
            assert ((self._holder >= _MIXED) & (self._holder < len(self.layout.groups))).all()
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
            return _FEEDER_SECONDS


def _no_marks(run: GroupRun) -> SlotMarks:
    return SlotMarks()
