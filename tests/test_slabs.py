"""How a pool is cut by several sizes: what is lost, and where each slot lies."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from triton_offload.slabs import Slabs

KIB, MIB = 1 << 10, 1 << 20


def places(slabs: Slabs) -> list[dict[int, tuple[int, int]]]:
    """By size: the bytes [begin, end) of every slot, by its id."""
    found = []
    for size in slabs.sizes:
        ids = np.arange(size.first, size.first + slabs.num_slabs * size.per_slab)
        begins = (size.rows(ids) * size.unit).tolist()
        found.append(
            {i: (b, b + size.num_bytes) for i, b in zip(ids.tolist(), begins, strict=True)}
        )
    return found


def test_one_size_has_a_slab_for_each_slot():
    slabs = Slabs.fit(1000, [24])
    assert (slabs.slab_bytes, slabs.num_slabs, slabs.num_slots) == (24, 41, 41)
    assert slabs.sizes[0].rows(np.array([7, 3])).tolist() == [7, 3]


def test_a_slot_that_divides_another_leaves_nothing_over():
    slabs = Slabs.fit(256 * MIB, [160 * KIB, 1920 * KIB])
    assert slabs.slab_bytes == 1920 * KIB
    assert [size.per_slab for size in slabs.sizes] == [12, 1]
    assert (slabs.num_slabs, slabs.most_chunks) == (136, 1632)


@pytest.mark.parametrize(
    ("pool", "sizes"),
    [
        (100, [100, 33]),
        (250, [100, 60]),
        (1000, [48, 16, 7]),
        (5000, [96, 40]),
        (3000, [40, 96]),
        (4096, [33, 17, 50, 1]),
    ],
)
def test_every_slot_lies_within_its_slab_and_apart_from_its_neighbours(pool, sizes):
    slabs = Slabs.fit(pool, sizes)
    assert slabs.num_bytes <= pool
    by_size = places(slabs)
    ids = sorted(i for slots in by_size for i in slots)
    assert ids == list(range(slabs.num_slots))  # none twice, in no two sizes
    for number, (size, slots) in enumerate(zip(slabs.sizes, by_size, strict=True)):
        assert size.num_bytes == sizes[number]
        for slab in range(slabs.num_slabs):
            begin = slab * slabs.slab_bytes
            expected = [
                (begin + i * size.num_bytes, begin + (i + 1) * size.num_bytes)
                for i in range(slabs.slab_bytes // size.num_bytes)
            ]
            assert [slots[i] for i in size.slots(slab)] == expected
        assert (slabs.sizes_of(np.array(list(slots))) == number).all()
    alignments = [np.gcd(16, size) for size in sizes]
    for alignment, slots in zip(alignments, by_size, strict=True):
        if pool > 100:
            assert all(begin % alignment == 0 for begin, _ in slots.values())


def test_whatever_the_sizes_little_of_a_large_pool_is_lost():
    rng = random.Random(5)
    for _ in range(300):
        sizes = [rng.randint(1, 1 << rng.randint(4, 22)) for _ in range(rng.randint(1, 5))]
        sizes = list(dict.fromkeys(sizes))
        slabs = Slabs.fit(1000 * max(sizes), sizes)
        for size in slabs.sizes:
            used = size.num_bytes * size.per_slab * slabs.num_slabs
            assert used >= 0.95 * 1000 * max(sizes), (sizes, slabs)
        assert len(sizes) * slabs.slab_bytes <= 0.08 * 1000 * max(sizes)


def test_a_slab_that_holds_more_is_taken_where_less_is_lost():
    assert Slabs.fit(100_000, [100, 34]).slab_bytes == 204  # six of 34, and two of 100
    assert Slabs.fit(1000, [300, 200]).slab_bytes == 300  # two of 600 would be one too few


def test_a_pool_for_less_than_the_largest_is_refused():
    with pytest.raises(ValueError, match=r"host_bytes: expected room for .* 100 bytes, got 99"):
        Slabs.fit(99, [10, 100])


def test_slots_of_another_size_and_slots_across_each_other_are_refused():
    slabs = Slabs.of(100, 4, [20, 50])
    few, many = np.array([0, 19]), np.array([20, 27])
    assert slabs.rows(0, few).tolist() == [0, 19]
    assert slabs.rows(1, many).tolist() == [0, 7]
    for size, ids in ((0, many), (1, few), (1, np.array([28]))):
        with pytest.raises(ValueError, match=r"slot_ids: expected slots of \d+ bytes, \d+ to \d+"):
            slabs.rows(size, ids)
    slabs.check_apart([(0, np.array([0, 4])), (1, np.array([22, 27]))])
    with pytest.raises(ValueError, match=r"slot_ids: expected slots of one size in each slab.* 3"):
        slabs.check_apart([(0, few), (1, np.array([27]))])


@pytest.mark.parametrize("behind", [0, 3])
def test_neighbours_are_a_step_apart_and_slabs_a_step_and_what_is_behind(behind):
    slabs = Slabs.of(4 * 30 + behind, 3, [30])
    size = slabs.sizes[0]
    rows = size.rows(np.arange(12))
    steps = [b - a for a, b in itertools.pairwise(rows.tolist())]
    within = [steps[i] for i in range(11) if i % 4 != 3]
    assert within == [size.step] * 9
    assert [steps[i] * size.unit for i in (3, 7)] == [30 + behind] * 2
