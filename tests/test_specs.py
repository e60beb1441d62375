"""Specs keep copies of their own of what they were made of, and refuse what is wrong with it."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from triton_offload import KVOffloader
from triton_offload.specs import (
    CPULoadStoreSpec,
    GPULoadStoreSpec,
    TransferResult,
    TransferStatus,
)
from triton_offload.transfer.pipeline import PipelineOptions


@pytest.mark.parametrize("make", [np.array, torch.tensor, list])
def test_specs_do_not_follow_what_they_were_made_of(make):
    ids, slots, fresh = make([4, 2, 7]), make([1, 0, 3]), make([True, False, True])
    sizes, indices = [1, 2], [5, 6]
    device_spec = GPULoadStoreSpec(ids, sizes, indices)
    host_spec = CPULoadStoreSpec(slots, fresh)
    for owned in (ids, slots, sizes, indices):
        owned[0] = 9
    fresh[0] = False
    assert device_spec.block_ids.tolist() == [4, 2, 7]
    assert (device_spec.group_sizes, device_spec.block_indices) == ((1, 2), (5, 6))
    assert host_spec.slot_ids.tolist() == [1, 0, 3]
    assert host_spec.fresh.tolist() == [True, False, True]


def arrays():
    device_spec, host_spec = GPULoadStoreSpec([4, 2, 7]), CPULoadStoreSpec([1], [True])
    return [
        device_spec.block_ids,
        host_spec.slot_ids,
        host_spec.fresh,
        CPULoadStoreSpec([1], True).fresh,
        *(copied.block_ids for copied in copies(device_spec)),
        *(copied.fresh for copied in copies(host_spec)),
        *(copied.slot_ids for copied in copies(host_spec)),
    ]


def copies(spec):
    return [copy.copy(spec), copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))]


@pytest.mark.parametrize("array", arrays(), ids=str)
def test_nobody_can_write_to_a_spec_nor_to_a_copy_of_one(array):
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True


def test_a_copy_of_a_spec_is_the_same():
    for copied in copies(GPULoadStoreSpec([4, 2, 7], [1, 2], [5, 6])):
        assert copied.block_ids.tolist() == [4, 2, 7]
        assert (copied.group_sizes, copied.block_indices) == ((1, 2), (5, 6))
    for copied in copies(CPULoadStoreSpec([1, 0], [True, False])):
        assert copied.slot_ids.tolist() == [1, 0]
        assert copied.fresh.tolist() == [True, False]
    assert all(copied.fresh is None for copied in copies(CPULoadStoreSpec([1])))


def test_a_spec_made_of_another_ones_ids_shares_them():
    first = GPULoadStoreSpec([4, 2, 7, 1])
    second = GPULoadStoreSpec(first.block_ids[1:3])
    assert np.shares_memory(first.block_ids, second.block_ids)
    assert second.block_ids.tolist() == [2, 7]
    third = CPULoadStoreSpec([4, 2], [True, False])
    assert np.shares_memory(CPULoadStoreSpec(third.slot_ids, third.fresh).fresh, third.fresh)


def test_specs_are_told_apart_by_what_they_are():
    first, second = GPULoadStoreSpec([4, 2, 7]), GPULoadStoreSpec([4, 2, 7])
    assert first != second
    assert len({first, second, CPULoadStoreSpec([1]), CPULoadStoreSpec([1])}) == 4


def test_sizes_and_indices_may_be_of_numpy():
    spec = GPULoadStoreSpec([4, 2, 7], np.array([1, 2]), (np.int32(5), np.int64(6)))
    assert (spec.group_sizes, spec.block_indices) == ((1, 2), (5, 6))
    assert {type(n) for n in spec.group_sizes + spec.block_indices} == {int}
    assert GPULoadStoreSpec([4], [np.int64(1)], [np.int64(0)]).group_sizes == (1,)


def test_all_blocks_are_of_one_group_from_its_start_on_by_default():
    spec = GPULoadStoreSpec(range(3))
    assert (spec.group_sizes, spec.block_indices) == ((3,), (0,))
    assert GPULoadStoreSpec(range(3), [1, 2]).block_indices == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1]), r"group_sizes: expected the sum 2, got \(1,\)"),
        (([1, 2], [3]), r"group_sizes: expected the sum 2, got \(3,\)"),
        (([1, 2], [3, -1]), r"group_sizes\[1\]: expected .* at least 0, got -1"),
        (([1, 2], [1, 1.0]), r"group_sizes\[1\]: expected an integer .*got 1\.0"),
        (([1], [True]), r"group_sizes\[0\]: expected an integer .*got True"),
        (([1], [None]), r"group_sizes\[0\]: expected an integer .*got None"),
        (([1], 1), "group_sizes: expected a sequence of integers, got 1"),
        (([1], "1"), r"group_sizes\[0\]: expected an integer .*got '1'"),
        (([1], [1], [-1]), r"block_indices\[0\]: expected .* at least 0, got -1"),
        (([1], [1], [0, 0]), "block_indices: expected 1, one for each group, got"),
        (([1], [1], [0.5]), r"block_indices\[0\]: expected an integer .*got 0\.5"),
        (([1.5],), "block_ids: expected a one-dimensional sequence of integers, got"),
    ],
)
def test_wrong_blocks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GPULoadStoreSpec(*arguments)


@pytest.mark.parametrize("fresh", [True, np.True_])
def test_one_flag_is_every_chunks(fresh):
    assert CPULoadStoreSpec([3, 1], fresh).fresh.tolist() == [True, True]
    assert CPULoadStoreSpec([3, 1], not fresh).fresh.tolist() == [False, False]
    assert CPULoadStoreSpec([], fresh).fresh.tolist() == []
    assert CPULoadStoreSpec([], []).fresh.dtype == np.bool_
    assert CPULoadStoreSpec([3, 1]).fresh is None


@pytest.mark.parametrize(
    ("fresh", "message"),
    [
        ([True], r"fresh: expected 2 flags, got shape \(1,\) of bool"),
        ([[True, True]], r"fresh: expected 2 flags, got shape \(1, 2\) of bool"),
        ([1, 0], r"fresh: expected 2 flags, got shape \(2,\) of int64"),
        (["no", "no"], "fresh: expected 2 flags, got"),
        ([[True], [True, False]], r"fresh: expected 2 flags, got \[\[True\], "),
        ("no", "fresh: expected 2 flags, got"),
    ],
)
def test_wrong_flags_are_refused(fresh, message):
    with pytest.raises(ValueError, match=message):
        CPULoadStoreSpec([3, 1], fresh)


def test_only_success_is_a_success():
    of_status = {status: TransferResult(1, status).success for status in TransferStatus}
    assert [status for status, success in of_status.items() if success] == [TransferStatus.SUCCESS]


@pytest.mark.parametrize("make", [np.array, torch.tensor, list])
def test_jobs_that_wait_move_the_blocks_that_were_named(make):
    """An engine keeps one block table, and writes it anew for each request."""
    num_blocks = 60
    cache = torch.arange(num_blocks * 1024, dtype=torch.int32).view(num_blocks, 1024)
    before = cache.clone()
    options = PipelineOptions(window_bytes=4096)
    keys = [b"%d" % i for i in range(num_blocks)]
    with KVOffloader([cache], num_blocks * 4096, options=options) as offloader:
        table = make([0])
        jobs = []
        for block in range(num_blocks):
            table[0] = block
            jobs.append(offloader.store([keys[block]], table))
        for job in jobs:
            job.wait(60)
        cache.fill_(-1)
        jobs = []
        for block in range(num_blocks):
            table[0] = num_blocks - 1 - block
            jobs.append(offloader.load([keys[block]], table))
        table[0] = 10**9
        for job in jobs:
            job.wait(60)
        assert all(job.result.success for job in jobs)
        assert torch.equal(cache, before.flip(0))
