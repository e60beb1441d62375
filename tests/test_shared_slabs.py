"""Slots of several sizes taken and put back at random, beside a map of every byte."""

from __future__ import annotations

import random

import numpy as np
import pytest

from triton_offload.scheduler.shared_slabs import SharedSlabs
from triton_offload.slabs import Slabs

SIZES = {
    "one that divides the other": ([160, 1920], 64),
    "odd sizes": ([999, 7 * 128, 1234, 50], 48),
    "one slab": ([100, 33], 1),
    "few slabs": ([100, 33, 60], 3),
}


class ByteMap:
    """Whose every byte of the pool is: 0 nobody's, else a slot's id and one."""

    def __init__(self, slabs: Slabs) -> None:
        self._slabs = slabs
        self._owner = np.zeros(slabs.num_bytes, dtype=np.int32)
        self.num_used = 0

    def take(self, slot: int) -> None:
        owner = self._bytes(slot)
        assert not owner.any(), "a byte is given out twice"
        owner[:] = slot + 1
        self.num_used += len(owner)

    def put(self, slot: int) -> None:
        owner = self._bytes(slot)
        assert (owner == slot + 1).all()
        owner[:] = 0
        self.num_used -= len(owner)

    def check(self) -> None:
        assert np.count_nonzero(self._owner) == self.num_used, "a byte is lost"

    def _bytes(self, slot: int) -> np.ndarray:
        ids = np.array([slot])
        size = self._slabs.sizes[int(self._slabs.sizes_of(ids)[0])]
        begin = int(size.rows(ids)[0]) * size.unit
        return self._owner[begin : begin + size.num_bytes]


def take_and_put(name: str, steps: int, seed: int) -> None:
    sizes, most = SIZES[name]
    rng = random.Random(seed)
    slabs = Slabs.fit(most * max(sizes), sizes)
    slots, bytes_of = SharedSlabs(slabs), ByteMap(slabs)
    taken: list[list[int]] = [[] for _ in sizes]
    done = 0
    while done < steps:
        size = rng.randrange(len(sizes))
        # Half of the time the pool is nearly full, half of the time nearly empty.
        filling = (done // 500) % 2 == 0
        if rng.random() < (0.7 if filling else 0.3):
            count = min(rng.choice((1, 1, 2, 5, 30)), slots.num_free(size))
            found = slots.take(count, size)
            assert found == sorted(set(found))
            assert len(found) == count
            for slot in found:
                bytes_of.take(slot)
            taken[size] += found
        else:
            count = min(rng.choice((1, 1, 2, 5, 30)), len(taken[size]))
            for _ in range(count):
                place = rng.randrange(len(taken[size]))
                taken[size][place], taken[size][-1] = taken[size][-1], taken[size][place]
                bytes_of.put(taken[size][-1])
                slots.put([taken[size].pop()])
        done += max(count, 1)
        if rng.random() < 0.01:
            used = [slot for each in taken for slot in each]
            slots._check(used)
            bytes_of.check()
            for number, each in enumerate(taken):
                assert slots.num_used(number) == len(each)
    for each in taken:
        slots.put(each)
    slots._check([])
    for number, size in enumerate(slabs.sizes):
        assert slots.num_free(number) == slabs.num_slabs * size.per_slab


@pytest.mark.parametrize("name", SIZES)
def test_no_byte_is_lost_or_given_out_twice(name):
    take_and_put(name, 12_500, seed=1)


@pytest.mark.deep
@pytest.mark.parametrize("name", SIZES)
def test_no_byte_is_lost_or_given_out_twice_in_a_million_steps(name):
    take_and_put(name, 1_000_000, seed=2)


def slots_of(sizes: list[int], num_slabs: int) -> SharedSlabs:
    return SharedSlabs(Slabs.of(max(sizes), num_slabs, sizes))


def test_the_first_slab_goes_to_whoever_needs_one():
    slots = slots_of([10, 30], 3)
    assert slots.take(4, 0) == [0, 1, 2, 3]
    assert slots.take(1, 1) == [11]
    assert (slots.num_free(0), slots.num_free(1)) == (2, 0)
    assert slots.take(2, 0) == [4, 5]


def test_a_slab_of_which_all_is_free_is_anybodys():
    slots = slots_of([10, 30], 2)
    assert slots.take(6, 0) == [0, 1, 2, 3, 4, 5]
    slots.put([0, 2, 4])
    assert slots.num_free(1) == 0
    slots.put([1])
    assert (slots.num_free(0), slots.num_free(1)) == (4, 1)
    assert slots.take(1, 1) == [6]
    assert slots.take(1, 0) == [4]


def test_slots_that_were_begun_are_taken_before_another_slab_is_cut():
    slots = slots_of([10, 30], 2)
    assert slots.take(1, 0) == [0]
    assert slots.take(2, 0) == [1, 2]
    assert (slots.num_cut(0), slots.num_free(1)) == (1, 1)
    slots.put([1])
    assert slots.take(3, 0) == [1, 3, 4]
    assert slots.num_cut(0) == 2
