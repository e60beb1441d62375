"""What a call was given is the caller's again when it returns: ids, keys, sizes and flags."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from steps import count_calls

from triton_offload import KVOffloader
from triton_offload.device.host import HostDevice
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import CPULoadStoreSpec, GPULoadStoreSpec
from triton_offload.testing import SimulatedDevice
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.transfer.queue_manager import transfer_queue

#: jobs wait in the backlog, where what they were given is read late
WAITING = PipelineOptions(window_bytes=4096)
#: a simulated device checks every byte of the buffers
SMALL = PipelineOptions(buffer_bytes=64, max_indices=1)
COUNT = 300


def numbered_pages(count: int, size: int = 4096) -> torch.Tensor:
    """Pages that all differ, in every word."""
    pages = torch.arange(count, dtype=torch.int32)[:, None].repeat(1, size // 4)
    return pages.contiguous()


def one_id(kind: str) -> tuple[object, np.ndarray]:
    """Something that holds one id, to call with, and to write to."""
    array = np.zeros(1, dtype=np.int64)
    return (torch.from_numpy(array) if kind == "tensor" else array), array


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_stores_that_wait_do_not_see_the_ids_of_later_ones(kind):
    pages = numbered_pages(COUNT)
    keys = [b"%d" % i for i in range(COUNT)]
    ids, table = one_id(kind)
    with KVOffloader([pages], COUNT * 4096, options=WAITING) as offloader:
        for i, key in enumerate(keys):
            table[0] = i
            job = offloader.store([key], ids)
        job.wait()
        expected = pages.clone()
        pages.fill_(-1)
        offloader.load(keys, range(COUNT)).wait()
    wrong = (pages != expected).any(dim=1).sum()
    assert not wrong, f"{wrong} of {COUNT} keys hold another block's bytes"


@pytest.mark.parametrize("expedited", [False, True], ids=["", "expedited"])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_loads_that_wait_write_the_blocks_that_they_named(kind, expedited):
    pages = numbered_pages(COUNT)
    keys = [b"%d" % i for i in range(COUNT)]
    ids, table = one_id(kind)
    with KVOffloader([pages], COUNT * 4096, options=WAITING) as offloader:
        offloader.store(keys, range(COUNT)).wait()
        expected = pages.flip(0).contiguous()
        pages.fill_(-1)
        jobs = []
        for i, key in enumerate(keys):
            table[0] = COUNT - 1 - i
            jobs.append(offloader.load([key], ids, expedited=expedited))
        table[0] = 10**9
        for job in jobs:
            job.wait()
    wrong = (pages != expected).any(dim=1).sum()
    assert not wrong, f"{wrong} of {COUNT} blocks hold another key's bytes"


def test_a_list_of_keys_is_the_callers_again_when_the_call_returns():
    pages = numbered_pages(COUNT)
    keys: list[bytes] = [b""]
    with KVOffloader([pages], COUNT * 4096, options=WAITING) as offloader:
        for i in range(COUNT):
            keys[0] = b"%d" % i
            job = offloader.store(keys, [i])
        keys[0] = b"another"
        job.wait()
        offloader._check()
        offloader.get_finished()
        assert offloader.lookup([b"%d" % i for i in range(COUNT)]) == COUNT
        expected = pages.clone()
        loads = []
        for i in range(COUNT):
            keys[0] = b"%d" % i
            loads.append(offloader.load(keys, [i]))
            keys[0] = b"another"
        for load in loads:
            load.wait()
        assert torch.equal(pages, expected)
        assert offloader.stats().num_pinned == 0


def test_specs_built_by_hand_keep_what_they_were_built_of():
    pages = numbered_pages(COUNT)
    device = HostDevice()
    layout = CacheLayout([pages], 1, [[(0, 4096)], [(0, 2048)]])
    pool = HostPool.allocate(device, COUNT, layout.slot_bytes)
    pool.wait_ready(60)
    queue = transfer_queue(layout, pool, options=WAITING)
    expected = pages.view(torch.uint8).clone()
    expected[1::2, 2048:] = 0  # half a page, into a fresh slot
    blocks, slots = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    fresh = np.zeros(1, dtype=np.bool_)
    sizes, firsts = [0, 0], [0, 0]
    try:
        whole = GPULoadStoreSpec(range(COUNT), [COUNT, 0], [0, 0])
        jobs = [queue.transfer_async(whole, CPULoadStoreSpec(range(COUNT), True))]
        queue.wait(jobs, 60)
        for i in range(COUNT):
            blocks[0], slots[0], fresh[0] = i, COUNT - 1 - i, True
            sizes[:] = [1 - i % 2, i % 2]
            source = GPULoadStoreSpec(blocks, sizes, firsts)
            target = CPULoadStoreSpec(slots, fresh)
            jobs.append(queue.transfer_async(source, target))
            blocks[0] = slots[0] = 10**9
            fresh[0] = False
            sizes[:], firsts[:] = [7, 7], [0, 0]
        queue.wait(jobs, 60)
        assert all(result.success for result in queue.get_finished())
        assert torch.equal(pool.slots.flip(0), expected)
    finally:
        queue.shutdown(60)
        pool.close()


# -- a prefix that grows step by step --


def prefill(offloader: KVOffloader, steps: int, size: int):
    """Chunked prefill: each step stores the whole prefix so far."""
    keys = [b"%d" % i for i in range(size * steps)]
    return [
        offloader.store(keys[: size * step], range(size * step)) for step in range(1, steps + 1)
    ]


def calls_of_a_wait(steps: int) -> int:
    """How many functions of the package the wait for the last step of a prefill calls."""
    with SimulatedDevice(1) as device:
        pages = device.empty(steps * 8).view(steps, 8)
        with KVOffloader([pages], steps * 8, options=SMALL, device=device) as offloader:
            jobs = prefill(offloader, steps, 1)
            count = count_calls(jobs[-1].wait, ("/job.py", "/jobs.py"))
            assert all(job.done for job in jobs)
    return count


@pytest.mark.timeout(20)
def test_a_wait_looks_at_each_job_that_it_waits_for_once():
    # A step names the keys of all before it: the square of the steps, and no more.
    assert calls_of_a_wait(16) <= 5 * calls_of_a_wait(8)


@pytest.mark.timeout(20)
def test_a_prefix_stored_step_by_step_is_waited_for_and_ends():
    steps, size = 24, 16
    with SimulatedDevice(1) as device:
        pages = device.empty(steps * size * 4).view(steps * size, 4)
        pages.copy_(torch.arange(steps * size).view(-1, 1) % 251)
        with KVOffloader([pages], steps * size * 4, options=SMALL, device=device) as offloader:
            jobs = prefill(offloader, steps, size)
            jobs[-1].wait()
            assert all(job.done for job in jobs)
            assert offloader.lookup([b"%d" % i for i in range(steps * size)]) == steps * size
