"""A lane: jobs of one direction in submission order, cut into segments and queued ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from triton_offload.calibration import Path, PathTable
from triton_offload.device.base import Device, DeviceLostError, Event
from triton_offload.specs import Direction, TransferResult, TransferStatus
from triton_offload.transfer.layout import CacheLayout, GroupRun
from triton_offload.transfer.paths import Gate, PathQueue, Queued, Segment, SlotMarks
from triton_offload.transfer.staging import IndexRing

# Submitting to a CUDA stream blocks at about 1,000 queued operations (ordering rule 7); a segment
# is counted before it is known how many operations it needs.
_MAX_QUEUED_OPS = 600

# Where a segment goes when its path could not be queued: from kernels to the copy engine alone,
# and back. A copy engine's segments fit a staging buffer for that (`PathQueue.max_chunks`).
_FALLBACK = {
    Path.STAGED: Path.COPY_ENGINE,
    Path.ZERO_COPY: Path.COPY_ENGINE,
    Path.COPY_ENGINE: Path.STAGED,
}


@dataclass(slots=True, eq=False)
class Job:
    """One transfer, from submission to its report.

    `compute`: what was queued on the engine's stream at submission. `after`: jobs of other lanes
    on the same slots. `start`: None where it could not be marked, and the job is not timed.
    `queued`: all of it is queued, or it has failed. `finished`: nothing of it touches a page or a
    slot any more, and `result` says how it ended.
    """

    job_id: int
    direction: Direction
    runs: list[GroupRun]
    compute: Event | None
    after: list[Job]
    lane: Lane
    sequence: int
    planned: Iterator[_Planned] | None = None
    held: _Planned | None = None  # taken from `planned`, not queued yet
    pages: Gate | None = None
    slots: Gate | None = None
    start: Event | None = None
    end: Event | None = None
    last: Queued | None = None
    started: bool = False
    queued: bool = False
    finished: bool = False
    cancelled: bool = False
    error: BaseException | None = None
    result: TransferResult | None = None

    @property
    def num_bytes(self) -> int:
        return sum(run.num_bytes for run in self.runs)

    @property
    def released(self) -> Event | None:
        """Once all of it is queued: what its pages are the engine's after (ordering rule 3)."""
        # Of a job that failed, what came after its last whole segment may still touch them.
        return self.end if self.last is None or self.error is not None else self.last.released


@dataclass(frozen=True, slots=True)
class _Planned:
    """What one segment is made of, in whatever path it crosses."""

    path: Path
    run: GroupRun
    marks: SlotMarks


@dataclass(slots=True)
class _InFlight:
    """What the lane waits for next: a queued segment, or the end of a job (`ends`)."""

    job: Job
    events: tuple[Event, ...]
    done: Event
    num_ops: int
    num_bytes: int
    holds_ids: bool
    ends: bool


class Lane:
    """FIFO of one direction with streams and buffers of its own. Its user holds the lock.

    `mark_slots` is asked once for every segment, in the order in which they are queued.
    """

    def __init__(
        self,
        device: Device,
        layout: CacheLayout,
        direction: Direction,
        paths: PathQueue,
        table: PathTable,
        *,
        max_indices: int,
        window_bytes: int | None,
        zero_copy_allowed: Callable[[], bool],
        mark_slots: Callable[[GroupRun], SlotMarks],
    ) -> None:
        self.direction = direction
        self.paths = paths
        self.finished: list[Job] = []  # to be reported
        #: why nothing can be queued any more
        self.lost: DeviceLostError | None = None
        self._device = device
        self._layout = layout
        self._table = table
        self._window_bytes = window_bytes
        self._zero_copy_allowed = zero_copy_allowed
        self._mark_slots = mark_slots
        self._indices = IndexRing(device, max_indices)
        self._max_segment_indices = max_indices // 4
        self._backlog: deque[Job] = deque()
        self._in_flight: deque[_InFlight] = deque()
        self._num_ops = 0
        self._num_bytes = 0
        self._sequence = 0
        self._broken: set[Path] = set()
        self._last_path: Path | None = None
        self._drained = False  # lost, but all that was queued has ended well or not

    @property
    def has_backlog(self) -> bool:
        return bool(self._backlog)

    @property
    def broken(self) -> frozenset[Path]:
        """The paths that could not be queued here, for which others stand in."""
        return frozenset(self._broken)

    @property
    def next_event(self) -> Event | None:
        """The event that the oldest work in flight ends with."""
        return self._in_flight[0].done if self._in_flight else None

    def submit(
        self, job_id: int, runs: list[GroupRun], compute: Event | None, after: list[Job]
    ) -> Job:
        """Accept a job; `pump` queues it."""
        self._sequence += 1
        job = Job(job_id, self.direction, runs, compute, after, self, self._sequence)
        self._backlog.append(job)
        return job

    def cancel(self, job: Job) -> bool:
        """Take a job back that nothing has been queued of."""
        if job.started or job.queued or job.cancelled:
            return False
        job.cancelled = True
        return True

    def pump(self) -> None:
        """Retire what is done and queue what fits. Never blocks on the device."""
        self._retire()
        while self._backlog:
            job = self._backlog[0]
            if self.lost is None and not job.cancelled:
                if not all(other.queued for other in job.after):
                    return  # its events are not recorded yet
                try:
                    if not self._queue_job(job):
                        return
                except Exception as error:  # ends the job, not its caller and not the feeder
                    job.error = error
            self._backlog.popleft()
            self._end(job)

    def close(self) -> None:
        """Free the streams and the buffers; everything queued has ended. Idempotent."""
        self._indices.close()
        self.paths.close()

    def _queue_job(self, job: Job) -> bool:
        """Queue the job's segments; False where the rest must wait for room."""
        if not job.started:
            self._start(job)
        assert job.planned is not None
        while job.error is None:
            job.held = job.held or next(job.planned, None)
            if job.held is None:
                return True
            if not self._has_room(job.held.run) or not self._queue_segment(job, job.held):
                return False
        return True

    def _start(self, job: Job) -> None:
        job.started = True
        try:
            start = self._device.new_event(timed=True)
            # The stream that the job's first operation is queued on tells when it starts.
            first = self.paths.copies if self._starts_on_copies(job) else self.paths.kernels
            self._device.record(start, first)
            job.start = start
        except DeviceLostError:
            raise
        except Exception:
            pass  # no reason to fail a job whose bytes may still land
        job.pages = Gate(self._device, [job.compute] if job.compute is not None else [])
        ends = [other.end for other in job.after if not other.finished and other.end is not None]
        job.slots = Gate(self._device, ends)
        job.planned = self._split(job)

    def _starts_on_copies(self, job: Job) -> bool:
        if not job.runs:
            return False
        path = self._choose(job.runs[0])
        return path is Path.COPY_ENGINE or (
            path is Path.STAGED and self.direction is Direction.LOAD
        )

    def _split(self, job: Job) -> Iterator[_Planned]:
        for run in job.runs:
            path = self._choose(run)
            most = max(1, self._max_segment_indices // (self._layout.blocks_per_chunk + 1))
            for part in run.split(min(most, self.paths.max_chunks(path, run))):
                yield _Planned(path, part, self._mark_slots(part))

    def _choose(self, run: GroupRun) -> Path:
        table = run.group.table
        pages = len(run.block_ids) * len(table.pages)
        path = self._table.choose(self.direction, table.bytes_per_block // len(table.pages), pages)
        return self._allowed(path)

    def _allowed(self, path: Path) -> Path:
        if path is Path.ZERO_COPY and not self._zero_copy_allowed():
            path = Path.STAGED
        while path in self._broken:  # ends, for `_abandon` leaves one that is not
            path = _FALLBACK[path]
        return path

    def _has_room(self, run: GroupRun) -> bool:
        if not self._in_flight:
            return True
        if self._window_bytes is not None and self._num_bytes + run.num_bytes > self._window_bytes:
            return False
        return self._num_ops < _MAX_QUEUED_OPS

    def _queue_segment(self, job: Job, planned: _Planned) -> bool:
        """Queue one segment; False where its ids must wait for room."""
        assert job.pages is not None
        assert job.slots is not None
        run = planned.run
        ids = self._indices.take(run.block_ids, run.slot_ids)
        if ids is None:
            return False
        path = self._allowed(planned.path)
        try:
            if self._last_path not in (None, path):
                self.paths.settle()  # ordering rule 5, where neighbours end on different streams
            self._last_path = path
            segment = Segment(run, ids[0], ids[1], planned.marks)
            queued = self.paths.queue(path, segment, job.pages, job.slots)
        except Exception as error:
            self._abandon(job, planned, path, error)
            return True
        job.held = None
        job.last = queued
        self._fly(
            _InFlight(job, queued.events, queued.done, queued.num_ops, run.num_bytes, True, False)
        )
        return True

    def _abandon(self, job: Job, planned: _Planned, path: Path, error: Exception) -> None:
        """A segment was not queued, or only in part: settle, and let it try another path once."""
        ends = self._settle()
        if not ends:  # no path is any better
            job.error = error
            return
        self._fly(_InFlight(job, ends, ends[-1], 5, 0, True, False))
        stands_in = _FALLBACK[path]
        if path is not planned.path or stands_in in self._broken:
            job.error = error
        # Of staged and copy engine, each other's fallback, one is kept, for better times.
        if path is Path.ZERO_COPY or stands_in not in self._broken:
            self._broken.add(path)

    def _end(self, job: Job) -> None:
        """Everything of the job is queued: mark the end, which later jobs may wait for."""
        job.queued = True
        ends: tuple[Event, ...] = ()
        if self.lost is None and job.error is None:
            try:
                event = self._device.new_event(timed=True)
                stream = self.paths.kernels if self._ends_on_kernels(job) else self.paths.copies
                self._device.record(event, stream)
                ends = (event,)
            except Exception as error:
                job.error = error
        if self.lost is None and job.error is not None:
            ends = self._settle()  # what was queued of it may be on both streams
        if not ends:
            self._retire()  # the lane's earlier jobs are reported before this one
            job.error = job.error or self.lost
            self._finish(job)
            return
        job.end = ends[-1]
        self._fly(_InFlight(job, ends, job.end, 3, 0, False, True))

    def _settle(self) -> tuple[Event, ...]:
        """Events after all that is queued on either stream; none where the lane is lost."""
        try:
            return self.paths.settle()
        except Exception as error:
            self._lose(error)
            return ()

    def _ends_on_kernels(self, job: Job) -> bool:
        if self._last_path is Path.STAGED:
            return self.direction is Direction.LOAD
        return self._last_path is Path.ZERO_COPY

    def _fly(self, work: _InFlight) -> None:
        self._in_flight.append(work)
        self._num_ops += work.num_ops
        self._num_bytes += work.num_bytes

    def _retire(self) -> None:
        while self._in_flight:
            work = self._in_flight[0]
            if not self._is_over(work.done, work.job):
                return
            for event in work.events:
                self._is_over(event, work.job)
            self._in_flight.popleft()
            self._num_ops -= work.num_ops
            self._num_bytes -= work.num_bytes
            if work.holds_ids:
                self._indices.free()
            if work.ends:
                self._finish(work.job)

    def _is_over(self, event: Event, job: Job) -> bool:
        """Whether nothing queued before the event runs any more; what failed of it is the job's."""
        if self.lost is not None and not self._drained:
            job.error = job.error or self.lost
            return True
        try:
            return self._is_reached(event)
        except DeviceLostError as error:
            self._lose(error)
            job.error = job.error or self.lost
        except Exception as error:
            job.error = job.error or error
        return True

    def _is_reached(self, event: Event) -> bool:
        """Raises what failed before it, once it is reached."""
        try:
            return self._device.query(event)
        except DeviceLostError:
            raise
        except Exception:
            # Something failed and is over, or the query did, and pages may still be touched.
            try:
                self._device.synchronize(event, 0.0)
            except TimeoutError:
                return False
            return True

    def _finish(self, job: Job) -> None:
        """Ordering rule 9: its last event was reached, or the device is lost."""
        job.finished = True
        if job.cancelled:
            job.result = TransferResult(job.job_id, TransferStatus.CANCELLED)
        elif job.error is not None:
            job.result = TransferResult(job.job_id, TransferStatus.FAILED, error=job.error)
        else:
            seconds = 0.0
            with suppress(Exception):  # the bytes have landed
                seconds = self._device.elapsed(job.start, job.end) if job.start else 0.0
            job.result = TransferResult(job.job_id, TransferStatus.SUCCESS, job.num_bytes, seconds)
        if job.error is not None:
            self.paths.distrust()
        job.planned = None
        job.after.clear()
        self.finished.append(job)

    def _check(self) -> None:
        """Asserts that every job is in one place, in order, and that all is counted."""
        flying = [work.job.sequence for work in self._in_flight]
        waiting = [job.sequence for job in self._backlog]
        assert flying == sorted(flying)
        assert waiting == sorted(set(waiting))
        assert not flying or not waiting or flying[-1] <= waiting[0]
        assert not any(job.queued or job.finished for job in self._backlog)
        assert not any(job.started for job in list(self._backlog)[1:])
        assert not any(work.job.finished for work in self._in_flight)
        assert all(work.job.queued for work in self._in_flight if work.ends)
        assert self._num_ops == sum(work.num_ops for work in self._in_flight)
        assert self._num_bytes == sum(work.num_bytes for work in self._in_flight)
        assert len(self._indices._taken) == sum(work.holds_ids for work in self._in_flight)
        self._indices._check()
        self.paths._ring._check()

    def _lose(self, error: Exception) -> None:
        """Nothing that is queued here from now on would ever be known to end."""
        self._drained = False
        if isinstance(error, DeviceLostError):
            self.lost = error
            return
        # Not even an event can be recorded, and yet the device may work: what touches pages must
        # end before its job is reported, and only draining the streams still tells that it has.
        # Where the device is lost, draining returns at once.
        self.lost = DeviceLostError(f"the device was lost: {error}")
        self.lost.__cause__ = error
        with suppress(Exception):
            self.paths.close_streams()
            self._drained = True
