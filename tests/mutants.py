"""The worker side with one rule taken away each: what the simulated device must report.

A mutant is a patch of real classes that stays while a scenario runs. `catch` runs the scenario by
one seed after another until something is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import scenarios
from schedules import CONFIGURATIONS, run_schedule

from triton_offload.device.base import Stream
from triton_offload.device.deferred import Deferred
from triton_offload.offloader import KVOffloader
from triton_offload.scheduler.manager import CPUOffloadingManager
from triton_offload.scheduler.order import Order
from triton_offload.specs import Direction
from triton_offload.testing import SimulatedDevice, Stuck
from triton_offload.transfer import ranges
from triton_offload.transfer.contents import SlotContents
from triton_offload.transfer.device_worker import DeviceWorker
from triton_offload.transfer.endings import Endings
from triton_offload.transfer.job import Job
from triton_offload.transfer.lane import Lane
from triton_offload.transfer.lane_streams import LaneStreams
from triton_offload.transfer.last_jobs import LastJobs
from triton_offload.transfer.paths.base import Crossing
from triton_offload.transfer.paths.staged import Staged
from triton_offload.transfer.pipeline import Pipeline
from triton_offload.transfer.queue_manager import OffloadingQueueManager
from triton_offload.transfer.staging import IndexRing

MOST_SEEDS = 50

Scenario = Callable[[int], object]
Patch = AbstractContextManager[Any]


@dataclass(frozen=True, slots=True)
class Mutant:
    """`rule`: what is taken away, by its number in `transfer/pipeline.py` or in words."""

    name: str
    rule: str
    scenario: Scenario
    patch: Callable[[], Patch]


@dataclass(frozen=True, slots=True)
class Catch:
    """The first seed of the scenario that reports the mutant, what it is reported as, and the
    report itself."""

    seed: int
    how: str
    report: str


MUTANTS: dict[str, Mutant] = {}


def catch(mutant: Mutant, most: int = MOST_SEEDS) -> Catch | None:
    """None where no seed reports anything. What is no report (a TypeError, say) is raised."""
    for seed in range(most):
        try:
            with mutant.patch():
                mutant.scenario(seed)
        except (AssertionError, Stuck) as error:
            report = "\n".join([str(error), *getattr(error, "__notes__", [])])
            return Catch(seed, _kind(error, report), report)
    return None


def _kind(error: BaseException, report: str) -> str:
    kinds = []
    if "race on " in report:
        kinds.append("race")
    if "wrong bytes" in report or "expected other bytes" in report:
        kinds.append("bytes")
    if isinstance(error, Stuck):
        kinds.append("stuck")
    return ", ".join(kinds) or "count"


_serving: dict[str, Scenario] = {}


def serving(name: str) -> Scenario:
    """The random schedules of a configuration; the same function for the same name."""
    return _serving.setdefault(name, lambda seed: run_schedule(CONFIGURATIONS[name], seed))


def mutant(rule: str, scenario: Scenario) -> Callable[[Callable[[], Patch]], Callable[[], Patch]]:
    """Register a function that returns the patch, under its own name in words."""

    def register(made: Callable[[], Patch]) -> Callable[[], Patch]:
        name = made.__name__.replace("_", " ")
        MUTANTS[name] = Mutant(name, rule, scenario, made)
        return made

    return register


def _instead(cls: type, name: str, make: Callable[[Any], Any]) -> Patch:
    """`make(original)` in place of a method of `cls`."""
    return patch.object(cls, name, make(getattr(cls, name)))


@contextmanager
def _together(*patches: Patch) -> Iterator[None]:
    with ExitStack() as stack:
        for part in patches:
            stack.enter_context(part)
        yield


# -- 1 and 2: transfers and compute --


def _without_compute(direction: Direction) -> Patch:
    def make(submit):
        def submit_alone(self, job_id, runs, compute, after):
            compute = None if self.direction is direction else compute
            return submit(self, job_id, runs, compute, after)

        return submit_alone

    return _instead(Lane, "submit", make)


@mutant("1", serving("staged"))
def a_store_does_not_wait_for_compute():
    return _without_compute(Direction.STORE)


@mutant("2", serving("staged"))
def a_load_does_not_wait_for_compute():
    return _without_compute(Direction.LOAD)


@mutant("1", scenarios.earlier_compute_only)
def compute_is_recorded_when_the_job_starts():
    def make(start):
        def start_late(self, job, path):
            if job.compute is not None:
                self._device.record(job.compute, self._device.current_stream())
            start(self, job, path)

        return start_late

    return _instead(Lane, "_start", make)


@mutant("2", scenarios.a_load_that_waits)
def a_load_into_staging_waits_for_compute():
    def make(load):
        def load_late(self, streams, segment, pages, slots):
            pages.hold(streams.copies)
            return load(self, streams, segment, pages, slots)

        return load_late

    return _instead(Staged, "load", make)


# -- 3: whose the pages are --


@mutant("3", scenarios.pages_after_their_release)
def pages_are_released_at_once():
    return patch.object(Pipeline, "released", lambda self, job: True)


@mutant("3", scenarios.pages_after_their_release)
def pages_are_released_with_the_first_segment():
    def released(self, job):
        with self._lock:
            self._pump()
            return job.finished or (job.last is not None and self._device.query(job.last.released))

    return patch.object(Pipeline, "released", released)


@mutant("3", serving("staged"))
def the_release_is_recorded_before_the_gather():
    def make(queue):
        def queue_early(self, streams, segment, pages, slots):
            early = streams.record(streams.kernels)
            return queue(self, streams, segment, pages, slots)._replace(released=early)

        return queue_early

    return _instead(Crossing, "queue", make)


@mutant("3", serving("staged"))
def wait_on_does_nothing():
    return patch.object(Pipeline, "wait_on", lambda self, job, stream, timeout=None: None)


@mutant("3", serving("staged, window"))
def wait_on_takes_an_event_that_is_not_recorded_yet():
    def wait_on(self, job, stream, timeout=None):
        with self._lock:
            event = job.last.released if job.last and job.queued else job.end
            self._device.wait(stream, event or self._device.new_event())

    return patch.object(Pipeline, "wait_on", wait_on)


# -- 4: staging and ids --


def _without_waiting_for_buffers(*, on_copies: bool) -> Patch:
    def make(take):
        def take_at_once(self, stream):
            return self._ring.take() if (stream is self.copies) == on_copies else take(self, stream)

        return take_at_once

    return _instead(LaneStreams, "take_buffer", make)


@mutant("4", serving("staged"))
def a_store_refills_staging_at_once():
    return _without_waiting_for_buffers(on_copies=False)


@mutant("4", serving("staged"))
def a_load_refills_staging_at_once():
    return _without_waiting_for_buffers(on_copies=True)


def _buffers_freed_by_the_first_event(method: str) -> Patch:
    def make(queue):
        def queue_and_free(self, streams, segment, pages, slots):
            queued = queue(self, streams, segment, pages, slots)
            ring = streams._ring
            ring._buffers[(ring.num_taken - 1) % len(ring._buffers)].free_after = queued.events[0]
            return queued

        return queue_and_free

    return _instead(Staged, method, make)


@mutant("4", serving("staged"))
def staging_is_refilled_when_it_was_gathered():
    return _buffers_freed_by_the_first_event("store")


@mutant("4", serving("staged"))
def staging_is_refilled_before_it_was_scattered():
    return _buffers_freed_by_the_first_event("load")


@mutant("4", scenarios.a_load_that_waits)
def lanes_share_a_staging_ring():
    def make(init):
        def init_shared(self, *args, **kwargs):
            init(self, *args, **kwargs)
            for lane in self._lanes.values():
                lane.streams._ring = self._lanes["load"].streams._ring

        return init_shared

    return _instead(Pipeline, "__init__", make)


class _Deaf:
    """A device on which one stream waits for nothing."""

    def __init__(self, device: SimulatedDevice, deaf: Stream) -> None:
        self._device = device
        self._deaf = deaf

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def wait(self, stream: Stream, event: Any) -> None:
        if stream is not self._deaf:
            self._device.wait(stream, event)


def _second_stage_does_not_wait(method: str, stream: str) -> Patch:
    def make(queue):
        def queue_unordered(self, streams, segment, pages, slots):
            deaf = _Deaf(streams.device, getattr(streams, stream))
            with patch.object(streams, "device", deaf):  # gates have a device of their own
                return queue(self, streams, segment, pages, slots)

        return queue_unordered

    return _instead(Staged, method, make)


@mutant("segments: gather before copy", serving("staged"))
def a_copy_does_not_wait_for_its_gather():
    return _second_stage_does_not_wait("store", "copies")


@mutant("segments: copy before scatter", serving("staged"))
def a_scatter_does_not_wait_for_its_copy():
    return _second_stage_does_not_wait("load", "kernels")


@mutant("4", serving("staged"))
def ids_are_freed_when_they_are_queued():
    def make(queue):
        def queue_and_free(self, job, planned):
            queued = queue(self, job, planned)
            if queued and self.lost is None:
                self._indices.free()
                self._in_flight[-1].holds_ids = False
            return queued

        return queue_and_free

    return _instead(Lane, "_queue_segment", make)


@mutant("4", serving("staged, hybrid"))
def the_ring_of_ids_overruns_its_tail():
    def find(self, count):
        return self._head if self._head + count <= self.capacity else 0

    return patch.object(IndexRing, "_find", find)


@mutant("4", scenarios.earlier_compute_only)
def one_event_is_recorded_again_for_every_segment():
    def record(self, stream):
        events = self.__dict__.setdefault("_events", {})
        event = events.setdefault(id(stream), self.device.new_event())
        self.device.record(event, stream)
        return event

    return patch.object(LaneStreams, "record", record)


# -- 5: order of jobs --


@mutant("5", serving("staged, window"))
def the_last_job_goes_first():
    def make(submit):
        def submit_first(self, *args):
            job = submit(self, *args)
            self._backlog.rotate(1)
            return job

        return submit_first

    return _instead(Lane, "submit", make)


@mutant("5", scenarios.two_stores_and_a_load)
def paths_change_without_settling():
    def make(queue):
        def queue_unsettled(self, job, planned):
            self._last_path = None
            return queue(self, job, planned)

        return queue_unsettled

    return _instead(Lane, "_queue_segment", make)


@mutant("5", scenarios.a_load_that_waits)
def an_expedited_load_has_no_lane_of_its_own():
    def make(submit):
        def submit_behind(self, *args, expedited=False, **kwargs):
            return submit(self, *args, **kwargs)

        return submit_behind

    return _instead(Pipeline, "submit", make)


# -- 6: the same slots --


def _without_order(keep: Callable[[str, Job], bool]) -> Patch:
    def make(order):
        def order_some(self, name, slot_ids):
            return [job for job in order(self, name, slot_ids) if keep(name, job)]

        return order_some

    return _instead(Pipeline, "_order_on_slots", make)


@mutant("6", serving("staged"))
def a_load_does_not_wait_for_a_store_of_its_slots():
    return _without_order(lambda name, job: name == "store")


@mutant("6", serving("staged"))
def a_store_does_not_wait_for_a_load_of_its_slots():
    return _without_order(lambda name, job: job.direction is Direction.STORE)


@mutant("6 and 5", scenarios.two_stores_of_a_slot)
def a_store_does_not_wait_for_a_store_of_its_slots():
    """Stores have one lane, and where its path changes, both streams settle: that orders them too,
    and without it rule 6 does. Only without both a store overtakes one of the same slot."""
    return _together(
        _without_order(lambda name, job: name != "store" or job.direction is Direction.LOAD),
        paths_change_without_settling(),
    )


@mutant("6, a failed job", scenarios.fails_half_way)
def slots_of_a_failed_job_are_free_at_once():
    return _without_order(lambda name, job: job.error is None)


@mutant("6", serving("staged, sizes"))
def a_slab_that_is_cut_anew_is_nobodys():
    """Slots of another size are the same bytes."""

    def make(use):
        def use_of_one_size(self, slot_ids):
            before = {name: last.copy() for name, last in self._last.items()}
            use(self, slot_ids)
            self._last.update(before)

        return use_of_one_size

    return _instead(LastJobs, "use", make)


@mutant("6", serving("staged, window"))
def a_job_does_not_wait_for_one_in_the_backlog():
    def make(pump):
        def pump_unordered(self):
            for job in self._backlog:
                job.after = [other for other in job.after if other.queued]
            pump(self)

        return pump_unordered

    return _instead(Lane, "pump", make)


# -- 7: submission --


@mutant("7", scenarios.burst)
def operations_are_queued_without_a_bound():
    return patch.object(Lane, "_has_room", lambda self, run: True)


@mutant("7", scenarios.burst_of_batches)
def a_batch_of_copies_is_one_operation():
    def make(fly):
        def fly_light(self, work):
            work.num_ops = min(work.num_ops, 8)
            fly(self, work)

        return fly_light

    return _instead(Lane, "_fly", make)


@mutant("7", serving("staged"))
def the_host_waits_for_a_staging_buffer():
    def take_buffer(self, stream):
        buffer = self._ring.take()
        if buffer.free_after is not None:
            self.device.synchronize(buffer.free_after, None)
        return buffer

    return patch.object(LaneStreams, "take_buffer", take_buffer)


@mutant("7", scenarios.nobody_calls)
def nobody_feeds_the_backlog():
    return patch.object(Pipeline, "_feed", lambda self: None)


@mutant("7", scenarios.capture)
def a_transfer_is_queued_into_a_captured_graph():
    return patch.object(SimulatedDevice, "capturing", lambda self, stream: False)


@mutant("7, memory that is not pinned", serving("staged, deferred"))
def copies_of_pageable_memory_are_called_by_the_submitter():
    return patch.object(Deferred, "_work", _at_once)


def _at_once(self, function, operands, stream, *, deferred=False, **options):
    function(*operands, stream.stream, **options)


@mutant("7, memory that is not pinned", serving("staged, deferred"))
def a_stream_does_not_wait_for_what_threads_record():
    def make(wait):
        def wait_if_made(self, stream, event):
            if self.is_recorded(event):
                wait(self, stream, event)

        return wait_if_made

    return _instead(Deferred, "wait", make)


# -- 8: partial chunks, and what must not stay --


def _without_marks(**nothing: tuple[int, ...]) -> Patch:
    def make(mark):
        return lambda self, run: mark(self, run)._replace(**nothing)

    return _instead(SlotContents, "store", make)


@mutant("8", serving("staged"))
def a_partial_chunk_is_copied_whole():
    return _without_marks(kept=())


@mutant("stale bytes: a partial chunk", serving("staged"))
def what_a_partial_chunk_lacks_is_not_cleared():
    return _without_marks(unfilled=())


@mutant("stale bytes: in the slot", serving("staged, hybrid"))
def what_a_slot_held_before_stays_readable():
    return _without_marks(stale=())


@mutant("stale bytes: in staging", serving("staged, hybrid"))
def gaps_between_pages_are_not_cleared():
    def make(take):
        def take_dirty(self, stream):
            buffer = take(self, stream)
            buffer.holds = self._packed
            return buffer

        return take_dirty

    def make_store(store):
        def store_dirty(self, streams, segment, pages, slots):
            streams._packed = segment.run.group.packed
            return store(self, streams, segment, pages, slots)

        return store_dirty

    return _together(
        _instead(LaneStreams, "take_buffer", make), _instead(Staged, "store", make_store)
    )


@mutant("stale bytes: a failed job", scenarios.a_slot_after_a_failure)
def a_failed_store_is_taken_to_have_cleared_its_slots():
    return patch.object(SlotContents, "doubt", lambda self, runs: None)


# -- 9: reports --


@mutant("9", serving("staged"))
def a_job_is_reported_when_it_is_queued():
    def make(end):
        def end_early(self, job):
            end(self, job)
            if not job.finished:
                self._in_flight[-1].ends = False
                self._finish(job)

        return end_early

    return _instead(Lane, "_end", make)


@mutant("9", serving("staged"))
def the_end_of_a_job_is_recorded_on_the_other_stream():
    def make(last_stream):
        def other_stream(self):
            kernels, copies = self.streams.kernels, self.streams.copies
            return copies if last_stream(self) is kernels else kernels

        return other_stream

    return _instead(Lane, "_last_stream", make)


@mutant("9", serving("staged"))
def a_job_is_reported_twice():
    def make(get):
        def get_twice(self):
            results = get(self)
            return results + results[:1]

        return get_twice

    return _instead(DeviceWorker, "get_finished", make)


@mutant("9", serving("staged"))
def a_result_is_swallowed():
    def make(get):
        return lambda self: get(self)[1:]

    return _instead(DeviceWorker, "get_finished", make)


@mutant("9, a failed job", scenarios.fails_half_way)
def a_failed_job_is_reported_while_it_is_under_way():
    def make(end):
        def end_at_once(self, job):
            if job.error is None:
                end(self, job)
            else:
                job.queued = True
                self._finish(job)

        return end_at_once

    return _instead(Lane, "_end", make)


@mutant("9, a failed job", scenarios.fails_half_way)
def a_failed_job_does_not_settle():
    def settle(self):
        return (self.record(self.kernels), self.record(self.copies))

    return patch.object(LaneStreams, "settle", settle)


@mutant("9, a failed job", scenarios.fails_on_the_device)
def a_failure_on_the_device_is_not_noticed():
    is_over = Endings.is_over

    def deaf(self, event, job):
        error = job.error
        over = is_over(self, event, job)
        job.error = error
        return over

    return patch.object(Endings, "is_over", deaf)


@mutant("9, a cancelled job", serving("staged"))
def a_job_that_has_started_is_taken_back():
    return patch.object(Lane, "can_cancel", lambda self, job: True)


@mutant("9, a cancelled job", serving("staged, window"))
def a_job_that_was_taken_back_runs():
    def make(cancel):
        def cancel_in_words(self, job):
            cancel(self, job)
            job.cancelled = False

        return cancel_in_words

    return _instead(Lane, "cancel", make)


# -- 10: waiting --


@mutant("10", serving("staged"))
def wait_returns_when_the_job_is_queued():
    def wait(self, job, timeout=None):
        while not job.queued:
            self._pump()
            self._device.sleep(0.001)

    return patch.object(Pipeline, "wait", wait)


@mutant("10", scenarios.a_copy_that_never_ends)
def wait_returns_on_a_timeout():
    def make(wait):
        def wait_in_peace(self, job, timeout=None):
            with suppress(TimeoutError):
                wait(self, job, timeout)

        return wait_in_peace

    return _instead(Pipeline, "wait", make)


@mutant("10", serving("staged"))
def wait_consumes_results():
    def make(wait):
        def wait_and_get(self, job_ids, timeout=None):
            wait(self, job_ids, timeout)
            self.get_finished()

        return wait_and_get

    return _instead(OffloadingQueueManager, "wait", make)


# -- shutdown --


@mutant("shutdown", scenarios.shutdown)
def shutdown_drops_the_backlog():
    return patch.object(Pipeline, "_unfinished", lambda self, name=None: [])


@mutant("shutdown", scenarios.shutdown)
def shutdown_leaves_the_feeder_running():
    def make(shutdown):
        def shutdown_but_feed(self, timeout=None):
            with patch.object(self._feeder, "stop"):
                shutdown(self, timeout)

        return shutdown_but_feed

    return _instead(Pipeline, "shutdown", make)


@mutant("shutdown", scenarios.shutdown)
def shutdown_leaves_streams_open():
    return patch.object(LaneStreams, "close", lambda self: None)


@mutant("shutdown", scenarios.offloader)
def the_pool_is_unpinned_before_transfers_have_ended():
    def make(close):
        def close_pool_first(self, timeout=None):
            self._pool.close()
            close(self, timeout)

        return close_pool_first

    return _instead(KVOffloader, "close", make)


# -- 11: bursts --


@mutant("11", scenarios.small_copy_in_turn)
def copies_are_not_cut_in_slices():
    return patch.object(ranges, "SLICE_BYTES", 1 << 40)


@mutant("11", scenarios.small_copy_first_in_first_out)
def nothing_bounds_the_bytes_queued_ahead():
    def make(init):
        def init_open(self, *args, window_bytes=None, **kwargs):
            init(self, *args, window_bytes=None, **kwargs)

        return init_open

    return _instead(Lane, "__init__", make)


# -- the manager's side --


@mutant("pins and 6", scenarios.offloader)
def a_chunk_is_evicted_while_it_is_loaded():
    """Where pins end at once, a store into the slot still waits for the load, by rule 6: only
    without both it overtakes."""
    complete = CPUOffloadingManager.complete_load

    def make(prepare):
        def prepare_unpinned(self, keys, blocks=None):
            spec = prepare(self, keys, blocks)
            complete(self, keys)
            return spec

        return prepare_unpinned

    return _together(
        _instead(CPUOffloadingManager, "prepare_load", make),
        patch.object(CPUOffloadingManager, "complete_load", lambda *_, **__: None),
        a_store_does_not_wait_for_a_load_of_its_slots(),
    )


@mutant("pins", scenarios.offloader)
def a_held_chunk_stays_in_the_order_of_eviction():
    def make(take):
        return lambda self, number, protected, busy: take(self, number, protected, busy[:1])

    return _instead(Order, "take", make)


@mutant("pins", scenarios.offloader)
def a_reset_frees_slots_under_transfer():
    def make(reset):
        def reset_all(self):
            reset(self)
            self._room._free.reset()

        return reset_all

    return _instead(CPUOffloadingManager, "reset", make)


@mutant("pins, a failed job", scenarios.offloader)
def the_chunk_of_a_failed_store_is_loaded():
    def make(complete):
        return lambda self, keys, success=True, **which: complete(self, keys, **which)

    return _instead(CPUOffloadingManager, "complete_store", make)


# -- the device --


@mutant("the seam: kernels reach registered memory only", scenarios.before_the_pool_is_pinned)
def a_kernel_reaches_memory_that_is_not_pinned():
    return patch.object(LaneStreams, "reaches_pool", True)


@mutant("the seam: sources of a batch in stream order", serving("copy engine"))
def a_batch_reads_its_sources_ahead_of_the_stream():
    def make(copy_batch):
        def copy_ahead(self, dst, src, sizes, stream):
            self._simulation.host_access("reading ahead", self._places.ranges(src, sizes), [])
            copy_batch(self, dst, src, sizes, stream)

        return copy_ahead

    return _instead(SimulatedDevice, "copy_batch", make)
