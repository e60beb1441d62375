"""When a job is reported, what a wait tells, and how all ends."""

from __future__ import annotations

from contextlib import suppress
from unittest.mock import patch

import scenarios

from mutants.registry import instead, mutant, serving
from triton_offload.offloader import KVOffloader
from triton_offload.transfer.device_worker import DeviceWorker
from triton_offload.transfer.endings import Endings
from triton_offload.transfer.jobs_under_way import JobsUnderWay
from triton_offload.transfer.lane import Lane
from triton_offload.transfer.lane_streams import LaneStreams
from triton_offload.transfer.pipeline import Pipeline
from triton_offload.transfer.queue_manager import OffloadingQueueManager

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

    return instead(Lane, "_end", make)


@mutant("9", serving("staged"))
def the_end_of_a_job_is_recorded_on_the_other_stream():
    def make(record):
        def record_elsewhere(self, stream, *, timed=False):
            if timed:  # what a job may end with
                stream = self.copies if stream is self.kernels else self.kernels
            return record(self, stream, timed=timed)

        return record_elsewhere

    return instead(LaneStreams, "record", make)


@mutant("9", serving("staged"))
def a_job_is_reported_twice():
    def make(get):
        def get_twice(self):
            results = get(self)
            return results + results[:1]

        return get_twice

    return instead(DeviceWorker, "get_finished", make)


@mutant("9", serving("staged"))
def a_result_is_swallowed():
    def make(get):
        return lambda self: get(self)[1:]

    return instead(DeviceWorker, "get_finished", make)


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

    return instead(Lane, "_end", make)


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

    return instead(Lane, "cancel", make)


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

    return instead(Pipeline, "wait", make)


@mutant("10", serving("staged"))
def wait_consumes_results():
    def make(wait):
        def wait_and_get(self, job_ids, timeout=None):
            wait(self, job_ids, timeout)
            self.get_finished()

        return wait_and_get

    return instead(OffloadingQueueManager, "wait", make)


# -- shutdown --


@mutant("shutdown", scenarios.shutdown)
def shutdown_drops_the_backlog():
    return patch.object(JobsUnderWay, "of", lambda self, lane=None: [])


@mutant("shutdown", scenarios.shutdown)
def shutdown_leaves_the_feeder_running():
    def make(shutdown):
        def shutdown_but_feed(self, timeout=None):
            with patch.object(self._feeder, "stop"):
                shutdown(self, timeout)

        return shutdown_but_feed

    return instead(Pipeline, "shutdown", make)


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

    return instead(KVOffloader, "close", make)
