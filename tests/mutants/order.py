"""The order of jobs: in a lane, and on the same slots."""

from __future__ import annotations

from collections.abc import Callable

import scenarios

from mutants.registry import Patch, instead, mutant, serving, together
from triton_offload.specs import Direction
from triton_offload.transfer.job import Job
from triton_offload.transfer.jobs_under_way import JobsUnderWay
from triton_offload.transfer.lane import Lane
from triton_offload.transfer.last_jobs import LastJobs
from triton_offload.transfer.pipeline import Pipeline

# -- 5: order of jobs --


@mutant("5", serving("staged, window"))
def the_last_job_goes_first():
    def make(submit):
        def submit_first(self, *args):
            job = submit(self, *args)
            self._backlog.rotate(1)
            return job

        return submit_first

    return instead(Lane, "submit", make)


@mutant("5", scenarios.two_stores_and_a_load)
def paths_change_without_settling():
    def make(queue):
        def queue_unsettled(self, job, planned):
            self._last_path = None
            return queue(self, job, planned)

        return queue_unsettled

    return instead(Lane, "_queue_segment", make)


@mutant("5", scenarios.a_load_that_waits)
def an_expedited_load_has_no_lane_of_its_own():
    def make(submit):
        def submit_behind(self, *args, expedited=False, **kwargs):
            return submit(self, *args, **kwargs)

        return submit_behind

    return instead(Pipeline, "submit", make)


# -- 6: the same slots --


def _without_order(keep: Callable[[str, Job], bool]) -> Patch:
    def make(order):
        def order_some(self, lane, slot_ids):
            return [job for job in order(self, lane, slot_ids) if keep(lane, job)]

        return order_some

    return instead(JobsUnderWay, "before", make)


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
    return together(
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

    return instead(LastJobs, "use", make)


@mutant("6", serving("staged, window"))
def a_job_does_not_wait_for_one_in_the_backlog():
    def make(pump):
        def pump_unordered(self):
            for job in self._backlog:
                job.after = [other for other in job.after if other.queued]
            pump(self)

        return pump_unordered

    return instead(Lane, "pump", make)
