"""Transfers and compute: whose the pages are, and when."""

from __future__ import annotations

from unittest.mock import patch

import scenarios

from mutants.registry import Patch, instead, mutant, serving
from triton_offload.specs import Direction
from triton_offload.transfer.lane import Lane
from triton_offload.transfer.paths.base import Crossing
from triton_offload.transfer.paths.staged import Staged
from triton_offload.transfer.pipeline import Pipeline

# -- 1 and 2: transfers and compute --


def _without_compute(direction: Direction) -> Patch:
    def make(submit):
        def submit_alone(self, job_id, runs, compute, after):
            compute = None if self.direction is direction else compute
            return submit(self, job_id, runs, compute, after)

        return submit_alone

    return instead(Lane, "submit", make)


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

    return instead(Lane, "_start", make)


@mutant("2", scenarios.a_load_that_waits)
def a_load_into_staging_waits_for_compute():
    def make(load):
        def load_late(self, streams, segment, pages, slots):
            pages.hold(streams.copies)
            return load(self, streams, segment, pages, slots)

        return load_late

    return instead(Staged, "load", make)


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

    return instead(Crossing, "queue", make)


@mutant("3", serving("staged"))
def wait_on_does_nothing():
    return patch.object(
        Pipeline, "wait_on", lambda self, job, stream, timeout=None, layer=None: None
    )


@mutant("3", serving("staged, window"))
def wait_on_takes_an_event_that_is_not_recorded_yet():
    def wait_on(self, job, stream, timeout=None, layer=None):
        with self._lock:
            event = job.last.released if job.last and job.queued else job.end
            self._device.wait(stream, event or self._device.new_event())

    return patch.object(Pipeline, "wait_on", wait_on)
