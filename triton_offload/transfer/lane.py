"""A lane: jobs of one direction in submission order, cut into segments and queued ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from triton_offload.calibration import Path, PathTable
from triton_offload.closing import Closing
from triton_offload.device.base import Device, Event, Stream
from triton_offload.errors import DeviceLostError
from triton_offload.specs import Direction
from triton_offload.transfer.checksums import Checksums
from triton_offload.transfer.contents import SlotContents, SlotMarks
from triton_offload.transfer.endings import Endings
from triton_offload.transfer.job import InFlight, Job, Planned
from triton_offload.transfer.lane_paths import LanePaths
from triton_offload.transfer.lane_streams import LaneStreams
from triton_offload.transfer.layout import GroupRun
from triton_offload.transfer.results import prove, result_of
from triton_offload.transfer.segment import Gate, Segment
from triton_offload.transfer.staging import IndexRing
from triton_offload.transfer.sum_memory import SumMemory

# Submitting to a CUDA stream blocks at about 1,000 queued operations (ordering rule 7), each range
# of a batch taken for one; a segment, of `MOST_COPIES` and some more, is admitted uncounted.
_MAX_QUEUED_OPS = 600


class Lane:
    """FIFO of one direction with streams and buffers of its own. Its user holds the lock.

    `contents`: what the pool's slots hold, for stores; loads change nothing there. `checksums`:
    what the lane's bytes are added up for; None: they are not.
    """

    def __init__(
        self,
        name: str,
        direction: Direction,
        device: Device,
        streams: LaneStreams,
        table: PathTable,
        *,
        blocks_per_chunk: int,
        max_indices: int,
        window_bytes: int | None,
        contents: SlotContents | None,
        checksums: Checksums | None = None,
    ) -> None:
        self.name = name
        self.direction = direction
        self.streams = streams
        self.finished: list[Job] = []  # to be reported
        self._device = device
        self.paths = LanePaths(name, streams, table, sums=checksums is not None)
        self._endings = Endings(device, streams)
        self._window_bytes = window_bytes
        self._contents = contents
        self._checksums = checksums
        # A segment takes at most a quarter, and holds at least one chunk.
        ids_of_chunk = blocks_per_chunk + 1
        self._indices = IndexRing(device, max(max_indices, 4 * ids_of_chunk))
        self._max_chunks = self._indices.capacity // 4 // ids_of_chunk
        self._sums: SumMemory | None = None
        if checksums is not None:
            self._sums = SumMemory(device, self._indices.capacity)
        self._backlog: deque[Job] = deque()
        self._in_flight: deque[InFlight] = deque()
        self._waits_for_jobs = False
        self._num_ops = 0
        self._num_bytes = 0
        self._sequence = 0
        self._last_path: Path | None = None
        self._closing = Closing()
        self._closing.callback(self._indices.close)
        self._closing.callback(streams.close)

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
        return self.paths.broken

    @property
    def lost(self) -> DeviceLostError | None:
        """Why nothing can be queued any more."""
        return self._endings.lost

    @property
    def next_event(self) -> Event | None:
        """The event that the oldest work in flight ends with; None where that is over, and its job
        is to end after those that had its slots."""
        return self._in_flight[0].done if self._in_flight and not self._waits_for_jobs else None

    def submit(
        self, job_id: int, runs: list[GroupRun], compute: Event | None, after: list[Job]
    ) -> Job:
        """Accept a job; `pump` queues it."""
        self._sequence += 1
        num_bytes = sum(run.num_bytes for run in runs)
        job = Job(
            job_id,
            self.direction,
            self.name,
            self._sequence,
            num_bytes,
            runs,
            compute,
            after,
            self._now(),
        )
        if self._checksums is not None:
            job.before = tuple(after)
        self._backlog.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """Take back a job that `can_cancel` allows; it is reported when its turn comes."""
        job.cancelled = True

    def can_cancel(self, job: Job) -> bool:
        """Whether nothing of the job has been queued."""
        return not (job.started or job.queued or job.cancelled)

    def go_ahead(self) -> bool:
        """Where the next to be queued is a load by layers, ask for a run more of it, in place of a
        caller who is busy; whether it is one."""
        job = self._backlog[0] if self._backlog else None
        if job is None or not job.has_all_asked_for:
            return False
        job.num_asked += 1
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
        """Free the streams and the buffers; everything queued has ended. Idempotent; what could not
        be freed is tried again by the next call."""
        self._closing.close()

    def _queue_job(self, job: Job) -> bool:
        """Queue the job's segments; False where the rest must wait for room."""
        if job.planned is None:
            job.planned = self._split(job)
        while job.error is None:
            job.held = job.held or next(job.planned, None)
            if job.held is None:
                # A job of no blocks is an event to record, and room for that is bounded too.
                return bool(job.runs) or self._num_ops < _MAX_QUEUED_OPS
            if job.has_all_asked_for:
                return False
            if not self._has_room(job.held.run):
                return False
            if not self._queue_segment(job, job.held):
                return False
            job.held = None
        return True

    def _split(self, job: Job) -> Iterator[Planned]:
        # What fills a path's two stages is short, and what drains them. A store behind others finds
        # them full; a load is waited for, whatever comes behind it.
        stores = self.direction is Direction.STORE
        fills = stores and not self._in_flight
        runs = job.runs
        for i, run in enumerate(runs):
            path = self.paths.choose(run)
            most = max(1, min(self._max_chunks, self.paths.max_chunks(path, run)))
            short = self.paths.short_chunks(path, run)
            first = short if fills and i == 0 else 0
            last = short if not stores and i == len(runs) - 1 else 0
            for part in run.split(most, first, last):
                yield Planned(path, part)
            if job.run_of_layer and job.last is not None:  # asked for more: this run is queued
                job.landed.append(job.last.released)

    def _has_room(self, run: GroupRun) -> bool:
        if not self._in_flight:
            return True
        if self._window_bytes is not None and self._num_bytes + run.num_bytes > self._window_bytes:
            return False
        return self._num_ops < _MAX_QUEUED_OPS

    def _queue_segment(self, job: Job, planned: Planned) -> bool:
        """Queue one segment, or fail the job; False where its ids must wait for room.

        A segment is tried twice at most: by its path, and by the one that stands in for that.
        """
        run = planned.run
        if not self._indices.has_room(len(run.block_ids) + len(run.slot_ids)):
            return False
        path = self.paths.usable(planned.path)
        if not job.started:
            self._start(job, path)
        # Only now: of what is cancelled or refused before this, the slots keep what they held.
        marks = self._contents.store(run) if self._contents is not None else SlotMarks()
        ids = self._indices.take(run.block_ids, run.rows)
        assert ids is not None
        sums = None
        if self._sums is not None and self.paths.adds_up(path):
            sums = self._sums.of(self._indices.begin_of_newest, len(run.block_ids))
        segment = Segment(run, ids[0], ids[1], marks, sums)
        error = self._try(job, segment, path)
        if error is not None and self.lost is None:
            stands_in = self.paths.give_up(path, error)
            if stands_in is not None:
                error = self._try(job, segment, stands_in)
                if error is not None and self.lost is None:
                    self.paths.give_up(stands_in, error)
        if error is not None:
            job.error = error
        if self.lost is None:  # whichever try was the last, its end gives the ids back
            self._in_flight[-1].holds_ids = True
        return True

    def _start(self, job: Job, path: Path) -> None:
        """The job's first segment is about to be queued."""
        job.started = True
        now = self._now()
        if job.submitted is not None and now is not None:
            job.queue_seconds = now - job.submitted
        try:
            start = self._device.new_event(timed=True)
            self._device.record(start, self.paths.first_stream(path))
            job.start = start
        except DeviceLostError:
            raise
        except Exception:
            pass  # no reason to fail a job whose bytes may still land
        job.pages = Gate(self._device, [job.compute] if job.compute is not None else [])
        ends = [other.end for other in job.after if not other.finished and other.end is not None]
        job.slots = Gate(self._device, ends)

    def _now(self) -> float | None:
        try:
            return self._device.monotonic()
        except Exception:
            return None  # no reason either

    def _try(self, job: Job, segment: Segment, path: Path) -> Exception | None:
        """Queue the segment; what keeps it from being queued whole. Both streams follow the part
        that was, then, unless the lane is lost."""
        assert job.pages is not None
        assert job.slots is not None
        try:
            if self._last_path not in (None, path):
                self.streams.settle()  # ordering rule 5, where neighbours end on different streams
            self._last_path = path
            queued = self.paths.queue(path, segment, job.pages, job.slots)
        except Exception as error:
            ends = self._settle()
            if ends:
                self._fly(InFlight(job, ends, ends[-1], num_ops=5))
            return error
        job.last = queued
        job.by_path[path] = job.by_path.get(path, 0) + segment.run.num_bytes
        work = InFlight(job, queued.events, queued.done, queued.num_ops, segment.run.num_bytes)
        if segment.sums is not None and self.paths.adds_up(path):
            work.summed = segment
        self._fly(work)
        return None

    def _end(self, job: Job) -> None:
        """Everything of the job is queued: mark the end, which later jobs may wait for."""
        job.queued = True
        job.planned = job.held = job.pages = job.slots = job.compute = None
        job.after.clear()
        if job.cancelled:
            self._end_cancelled(job)
            return
        self._doubt(job)  # the next store of its slots may be queued before this one is over
        last = self._in_flight[-1] if self._in_flight else None
        if job.error is None and last is not None and last.job is job:  # its last segment is whole
            job.end = last.done
            last.ends = True
            return
        ends: tuple[Event, ...] = ()
        if self.lost is None and job.error is None:
            try:
                event = self._device.new_event(timed=True)
                self._device.record(event, self._last_stream())
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
        self._fly(InFlight(job, ends, job.end, num_ops=3, ends=True))

    def _end_cancelled(self, job: Job) -> None:
        """The job's turn to be reported comes with the end of what is queued before it. An event of
        its own would be an operation more, and nothing bounds how many jobs are taken back."""
        if self._in_flight:
            job.end = self._in_flight[-1].done
            self._fly(InFlight(job, (), job.end, num_ops=0, ends=True))
        else:
            self._finish(job)

    def _doubt(self, job: Job) -> None:
        if job.error is not None and self._contents is not None:
            self._contents.doubt(job.runs)

    def _settle(self) -> tuple[Event, ...]:
        """Events after all that is queued on either stream; none where the lane is lost."""
        try:
            return self.streams.settle()
        except Exception as error:
            self._endings.lose(error)
            return ()

    def _last_stream(self) -> Stream:
        """The one that the last operation was queued on."""
        if self._last_path is None:
            return self.streams.copies
        return self.paths.last_stream(self._last_path)

    def _fly(self, work: InFlight) -> None:
        self._in_flight.append(work)
        self._num_ops += work.num_ops
        self._num_bytes += work.num_bytes

    def _retire(self) -> None:
        self._waits_for_jobs = False
        while self._in_flight:
            work = self._in_flight[0]
            # A cancelled job is over with what was before it, and that has left the queue.
            if not work.job.cancelled and not self._endings.is_over(work.done, work.job):
                return
            for event in work.events:
                if event is not work.done:  # asked above
                    self._endings.is_over(event, work.job)
            if work.ends and not all(job.finished for job in work.job.before):
                self._waits_for_jobs = True  # their sums are not kept, or not compared yet
                return
            self._in_flight.popleft()
            self._num_ops -= work.num_ops
            self._num_bytes -= work.num_bytes
            if work.summed is not None and work.summed.sums is not None:
                work.job.sums.append((work.summed.run, work.summed.sums.host.copy()))
            if work.holds_ids:
                self._indices.free()
            if work.ends:
                self._finish(work.job)

    def _finish(self, job: Job) -> None:
        """Ordering rule 9: its last event was reached, or the device is lost."""
        job.finished = True
        if self._checksums is not None and not job.cancelled:
            prove(job, self._checksums)
        job.result = result_of(job, self._device)
        if job.error is not None:
            self.streams.distrust()
        self._doubt(job)
        job.let_go()
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
        self.streams._ring._check()
