"""Sums: what was stored is proved when it is loaded."""

from __future__ import annotations

import scenarios

from mutants.registry import instead, mutant, serving
from triton_offload.transfer.checksums import Checksums
from triton_offload.transfer.lane import Lane
from triton_offload.transfer.lane_streams import LaneStreams


@mutant("sums: a load is compared", scenarios.flipped_bits)
def a_sum_is_not_compared():
    return instead(Checksums, "wrong_slots", lambda wrong: lambda self, sums: ())


@mutant("sums: of each block", serving("staged, verified"))
def the_sums_of_a_store_are_kept_in_another_order():
    def make(store):
        return lambda self, runs, sums: store(self, runs, [(run, s[::-1]) for run, s in sums])

    return instead(Checksums, "store", make)


@mutant("sums: cleared before each segment", serving("staged, verified"))
def sums_are_not_cleared():
    return instead(LaneStreams, "clear_sums", lambda clear: lambda self, segment, stream: None)


@mutant("sums: fetched before a job ends", serving("staged, verified"))
def the_sums_of_a_store_are_fetched_on_the_other_stream():
    def make(fetch):
        def fetch_elsewhere(self, segment, stream):
            other = self.kernels if stream is self.copies else stream
            return fetch(self, segment, other)

        return fetch_elsewhere

    return instead(LaneStreams, "fetch_sums", make)


@mutant("sums: in the order of jobs on a slot", scenarios.slot_stored_again)
def a_job_is_proved_before_those_that_had_its_slots():
    def make(submit):
        def submit_unordered(self, job_id, runs, compute, after):
            job = submit(self, job_id, runs, compute, after)
            job.before = ()
            return job

        return submit_unordered

    return instead(Lane, "submit", make)


@mutant("sums: of a load by layers, of all of it", serving("mixed paths, sizes, layers, verified"))
def the_parts_of_a_block_are_compared_each_alone():
    def make(wrong):
        return lambda self, sums: tuple(
            dict.fromkeys(slot for part in sums for slot in wrong(self, [part]))
        )

    return instead(Checksums, "wrong_slots", make)
