"""A lane: jobs of one direction in submission order, cut into segments and queued ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from triton_offload.calibration import Path, PathTable
from triton_offload.closing import Closing
from triton_offload.device.base import Device, DeviceLostError, Event, Stream
from triton_offload.specs import Direction, TransferResult, TransferStatus
from triton_offload.transfer.contents import SlotContents, SlotMarks
from triton_offload.transfer.layout import GroupRun
from triton_offload.transfer.paths import Gate, PathQueue, Queued, Segment
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

    `lane`: its name. `sequence`: its number among the lane's jobs. `compute`: what was queued on
    the engine's stream at submission. `after`: jobs of other lanes on the same slots. `started`:
    something of it may be queued. `start`: None where it could not be marked, and the job is not
    timed. `queued`: all of it is queued, or it has failed. `finished`: nothing of it touches a page
    or a slot any more, `result` says how it ended, and it keeps neither ids nor events.
    """

    job_id: int
    direction: Direction
    lane: str
    sequence: int
    num_bytes: int
    runs: list[GroupRun]
    compute: Event | None
    after: list[Job]
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
    def released(self) -> Event | None:
        """Once all of it is queued: what its pages are the engine's after (ordering rule 3)."""
        # Of a job that failed, what came after its last whole segment may still touch them.
        return self.end if self.last is None or self.error is not None else self.last.released


class _Planned(NamedTuple):
    """What one segment is made of, and the path that it is to cross by."""

    path: Path
    run: GroupRun


@dataclass(slots=True)
class _InFlight:
    """What the lane waits for next: a queued segment, or the end of a job (`ends`).

    `holds_ids`: the oldest ids in the ring are free when it is over.
    """

    job: Job
    events: tuple[Event, ...]
    done: Event
    num_ops: int
    num_bytes: int = 0
    holds_ids: bool = False
    ends: bool = False


class Lane:
    """FIFO of one direction with streams and buffers of its own. Its user holds the lock.

    `contents`: what the pool's slots hold, for stores; loads change nothing there.
    """

    def __init__(
        self,
        name: str,
        direction: Direction,
        device: Device,
        paths: PathQueue,
        table: PathTable,
        *,
        blocks_per_chunk: int,
        max_indices: int,
        window_bytes: int | None,
        contents: SlotContents | None,
    ) -> None:
        self.name = name
        self.direction = direction
        self.paths = paths
        self.finished: list[Job] = []  # to be reported
        #: why nothing can be queued any more
        self.lost: DeviceLostError | None = None
        self._device = device
        self._table = table
        self._window_bytes = window_bytes
        self._contents = contents
        # A segment takes at most a quarter, and holds at least one chunk.
        ids_of_chunk = blocks_per_chunk + 1
        self._indices = IndexRing(device, max(max_indices, 4 * ids_of_chunk))
        self._max_chunks = self._indices.capacity // 4 // ids_of_chunk
        self._backlog: deque[Job] = deque()
        self._in_flight: deque[_InFlight] = deque()
        self._num_ops = 0
        self._num_bytes = 0
        self._sequence = 0
        self._broken: set[Path] = set()
        self._last_path: Path | None = None
        self._drained = False  # lost, but all that was queued has ended well or not
        self._closing = Closing()
        self._closing.callback(self._indices.close)
        self._closing.callback(paths.close)

    @property
    def has_backlog(self) -> bool:
        return bool(self._backlog)

    @property
    def is_busy(self) -> bool:
        """Whether it has a job that is not over."""
        return bool(self._backlog or self._in_flight)

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
        num_bytes = sum(run.num_bytes for run in runs)
        job = Job(
            job_id, self.direction, self.name, self._sequence, num_bytes, runs, compute, after
        )
        self._backlog.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """Take back a job that `can_cancel` allows; it is reported when its turn comes."""
        job.cancelled = True

    def can_cancel(self, job: Job) -> bool:
        """Whether nothing of the job has been queued."""
        return not (job.started or job.queued or job.cancelled)

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
        """Free the streams and the buffers; everything queued has ended. Idempotent; what could not
        be freed is tried again by the next call."""
        self._closing.close()

    def _queue_job(self, job: Job) -> bool:
        """Queue the job's segments; False where the rest must wait for room."""
        if job.planned is None:
            job.planned = self._split(job.runs)
        while job.error is None:
            job.held = job.held or next(job.planned, None)
            if job.held is None:
                # A job of no blocks is an event to record, and room for that is bounded too.
                return bool(job.runs) or self._num_ops < _MAX_QUEUED_OPS
            if not self._has_room(job.held.run) or not self._queue_segment(job, job.held):
                return False
            job.held = None
        return True

    def _split(self, runs: list[GroupRun]) -> Iterator[_Planned]:
        for run in runs:
            path = self._choose(run)
            for part in run.split(max(1, min(self._max_chunks, self.paths.max_chunks(path, run)))):
                yield _Planned(path, part)

    def _choose(self, run: GroupRun) -> Path:
        table = run.group.table
        pages = len(run.block_ids) * len(table.pages)
        path = self._table.choose(self.direction, table.bytes_per_block // len(table.pages), pages)
        return self._allowed(path)

    def _allowed(self, path: Path) -> Path:
        if path is Path.ZERO_COPY and not self.paths.reaches_pool:
            path = Path.STAGED
        for _ in _FALLBACK:  # one that is not broken is at most two steps away: see `_abandon`
            if path in self._broken:
                path = _FALLBACK[path]
        return path

    def _has_room(self, run: GroupRun) -> bool:
        if not self._in_flight:
            return True
        if self._window_bytes is not None and self._num_bytes + run.num_bytes > self._window_bytes:
            return False
        return self._num_ops < _MAX_QUEUED_OPS

    def _queue_segment(self, job: Job, planned: _Planned) -> bool:
        """Queue one segment, or fail the job; False where its ids must wait for room.

        A segment is tried twice at most: by its path, and by the one that stands in for that.
        """
        run = planned.run
        if not self._indices.has_room(len(run.block_ids) + len(run.slot_ids)):
            return False
        path = self._allowed(planned.path)
        if not job.started:
            self._start(job, path)
        # Only now: of what is cancelled or refused before this, the slots keep what they held.
        marks = self._contents.store(run) if self._contents is not None else SlotMarks()
        ids = self._indices.take(run.block_ids, run.slot_ids)
        assert ids is not None
        segment = Segment(run, ids[0], ids[1], marks)
        error = self._try(job, segment, path)
        if error is not None and self.lost is None:
            stands_in = self._abandon(path)
            if stands_in is not None:
                error = self._try(job, segment, stands_in)
                if error is not None and self.lost is None:
                    self._abandon(stands_in)
        if error is not None:
            job.error = error
        if self.lost is None:  # whichever try was the last, its end gives the ids back
            self._in_flight[-1].holds_ids = True
        return True

    def _start(self, job: Job, path: Path) -> None:
        """The job's first segment is about to be queued."""
        job.started = True
        try:
            start = self._device.new_event(timed=True)
            self._device.record(start, self._first_stream(path))
            job.start = start
        except DeviceLostError:
            raise
        except Exception:
            pass  # no reason to fail a job whose bytes may still land
        job.pages = Gate(self._device, [job.compute] if job.compute is not None else [])
        ends = [other.end for other in job.after if not other.finished and other.end is not None]
        job.slots = Gate(self._device, ends)

    def _first_stream(self, path: Path) -> Stream:
        """The stream that the first operation of a segment is queued on."""
        copies_first = path is Path.COPY_ENGINE or (
            path is Path.STAGED and self.direction is Direction.LOAD
        )
        return self.paths.copies if copies_first else self.paths.kernels

    def _try(self, job: Job, segment: Segment, path: Path) -> Exception | None:
        """Queue the segment; what keeps it from being queued whole. Both streams follow the part
        that was, then, unless the lane is lost."""
        assert job.pages is not None
        assert job.slots is not None
        try:
            if self._last_path not in (None, path):
                self.paths.settle()  # ordering rule 5, where neighbours end on different streams
            self._last_path = path
            queued = self.paths.queue(path, segment, job.pages, job.slots)
        except Exception as error:
            ends = self._settle()
            if ends:
                self._fly(_InFlight(job, ends, ends[-1], num_ops=5))
            return error
        job.last = queued
        self._fly(_InFlight(job, queued.events, queued.done, queued.num_ops, segment.run.num_bytes))
        return None

    def _abandon(self, path: Path) -> Path | None:
        """A segment could not be queued by `path`: which one stands in for it, from now on."""
        stands_in = _FALLBACK[path]
        # Of staged and copy engine, each other's fallback, one is kept, for better times.
        if path is Path.ZERO_COPY or stands_in not in self._broken:
            self._broken.add(path)
        return None if stands_in in self._broken else stands_in

    def _end(self, job: Job) -> None:
        """Everything of the job is queued: mark the end, which later jobs may wait for."""
        job.queued = True
        job.planned = job.held = job.pages = job.slots = job.compute = None
        job.after.clear()
        if job.cancelled:
            self._end_cancelled(job)
            return
        self._doubt(job)  # the next store of its slots may be queued before this one is over
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
        self._fly(_InFlight(job, ends, job.end, num_ops=3, ends=True))

    def _end_cancelled(self, job: Job) -> None:
        """The job's turn to be reported comes with the end of what is queued before it. An event of
        its own would be an operation more, and nothing bounds how many jobs are taken back."""
        if self._in_flight:
            job.end = self._in_flight[-1].done
            self._fly(_InFlight(job, (), job.end, num_ops=0, ends=True))
        else:
            self._finish(job)

    def _doubt(self, job: Job) -> None:
        if job.error is not None and self._contents is not None:
            self._contents.doubt(job.runs)

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
            # A cancelled job is over with what was before it, and that has left the queue.
            if not work.job.cancelled and not self._is_over(work.done, work.job):
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
        self._doubt(job)
        # Who keeps the job keeps its result, and no memory that was moved.
        job.runs, job.start, job.end, job.last = [], None, None, None
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
        assert not any(job.started and job.cancelled for job in self._backlog)
        assert not any(work.job.finished for work in self._in_flight)
        assert all(work.job.queued for work in self._in_flight if work.ends)
        assert self._num_ops == sum(work.num_ops for work in self._in_flight)
        assert self._num_bytes == sum(work.num_bytes for work in self._in_flight)
        if self.lost is None:
            taken = sum(work.holds_ids for work in self._in_flight)
            assert len(self._indices._taken) == taken
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
