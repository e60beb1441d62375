"""Whom a job on some slots comes after, and until when."""

from __future__ import annotations

import itertools

import numpy as np

from triton_offload.slabs import Slabs
from triton_offload.transfer.job import Job
from triton_offload.transfer.jobs_under_way import JobsUnderWay
from triton_offload.transfer.lanes import LANES

# Slots 0 to 8 are three to a slab, 9 to 11 fill one each.
SLABS = Slabs.of(30, 3, [10, 30])


class Lanes:
    def __init__(self) -> None:
        self.jobs = JobsUnderWay(SLABS)
        self._sequences = {name: itertools.count(1) for name in LANES}

    def before(self, lane: str, *slots: int) -> list[Job]:
        return self.jobs.before(lane, np.array(slots, dtype=np.int64))

    def add(self, lane: str, *slots: int) -> Job:
        self.before(lane, *slots)
        job = Job(0, LANES[lane], lane, next(self._sequences[lane]), 0, [], None, [], None)
        self.jobs.add(job, np.array(slots, dtype=np.int64))
        return job


def test_a_store_comes_after_all_that_use_its_slots_and_a_load_after_stores():
    lanes = Lanes()
    assert lanes.before("store", 0, 1) == []
    store, load, expedited = (lanes.add(name, 0, 1) for name in LANES)
    assert lanes.before("store", 1, 2) == [store, load, expedited]
    assert lanes.before("load", 1) == lanes.before("expedited", 1) == [store]
    assert lanes.before("store", 2) == []
    assert lanes.before("store") == []


def test_who_has_ended_is_waited_for_no_more():
    lanes = Lanes()
    first, second = lanes.add("store", 0), lanes.add("store", 1)
    assert lanes.jobs.of() == lanes.jobs.of("store") == [first, second]
    assert lanes.jobs.of("load") == []
    lanes.jobs.remove(first)
    assert (first in lanes.jobs, second in lanes.jobs) == (False, True)
    assert lanes.before("load", 0) == []
    assert lanes.before("load", 0, 1) == [second]
    assert Lanes().add("store", 1) not in lanes.jobs


def test_a_slot_of_a_slab_that_is_cut_anew_comes_after_those_of_the_cut_before():
    lanes = Lanes()
    store = lanes.add("store", 2)
    assert lanes.before("store", 9) == [store]
