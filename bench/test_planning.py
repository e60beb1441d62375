"""What a job costs its caller: planning, beside the descriptors that vLLM fills, and submission.

    pytest bench/test_planning.py --benchmark-group-by=group

Planning is all that grows with the job: ids checked, runs cut into segments. No page is touched,
so the caches may be larger than the machine's memory.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peers import vllm_planner

from triton_offload.device.host import HostDevice
from triton_offload.host_pool import HostPool
from triton_offload.layout import CacheLayout
from triton_offload.queue_manager import transfer_queue
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec

NUM_BLOCKS = 16_384
PAGE_BYTES = 1024
SHAPES = [(8, 32), (512, 32), (8192, 32), (8192, 80)]  # blocks of a job, tensors


def ids(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.permutation(NUM_BLOCKS)[:count], rng.permutation(NUM_BLOCKS)[:count]


def caches(num_tensors: int) -> list[torch.Tensor]:
    return [torch.empty(NUM_BLOCKS, PAGE_BYTES, dtype=torch.int8) for _ in range(num_tensors)]


@pytest.mark.parametrize(("blocks", "tensors"), SHAPES)
def test_ours(benchmark, blocks, tensors):
    benchmark.group = f"plan {blocks} blocks x {tensors} tensors"
    layout = CacheLayout(caches(tensors))
    block_ids, slot_ids = ids(blocks)

    def plan() -> int:
        device_spec = GPULoadStoreSpec(block_ids)
        host_spec = CPULoadStoreSpec(slot_ids, fresh=True)
        runs = layout.plan(Direction.STORE, device_spec, host_spec, NUM_BLOCKS)
        return sum(len(part.block_ids) for run in runs for part in run.split(200))

    assert benchmark(plan) == blocks


@pytest.mark.parametrize(("blocks", "tensors"), SHAPES)
def test_vllm(benchmark, blocks, tensors):
    benchmark.group = f"plan {blocks} blocks x {tensors} tensors"
    slots = torch.empty(NUM_BLOCKS, tensors * PAGE_BYTES, dtype=torch.int8)
    plan = vllm_planner(caches(tensors), slots)
    block_ids, slot_ids = ids(blocks)
    count, num_bytes = benchmark(plan, block_ids.astype(np.int32), slot_ids.astype(np.int32))
    assert (count, num_bytes) == (blocks * tensors, blocks * tensors * PAGE_BYTES)


@pytest.mark.parametrize("blocks", [8, 512])
def test_submission(benchmark, blocks):
    """`transfer_async` as a whole on the host device, planning included, with an idle queue."""
    benchmark.group = "submit"
    layout = CacheLayout([torch.zeros(NUM_BLOCKS, 64, dtype=torch.uint8) for _ in range(32)])
    pool = HostPool.allocate(HostDevice(), NUM_BLOCKS, layout.slot_bytes)
    pool.wait_ready()
    queue = transfer_queue(layout, pool)
    block_ids, slot_ids = ids(blocks)
    jobs: list[int] = []

    def idle() -> None:
        queue.wait(jobs)
        assert all(result.success for result in queue.get_finished())
        jobs.clear()

    def submit() -> None:
        jobs.append(
            queue.transfer_async(
                GPULoadStoreSpec(block_ids), CPULoadStoreSpec(slot_ids, fresh=True)
            )
        )

    benchmark.pedantic(submit, setup=idle, rounds=200, warmup_rounds=5)
    idle()
    queue.shutdown()
    pool.close()
