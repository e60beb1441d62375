"""What a job costs the host: planning, submission, launches, polling, and starting a pool.

    python bench/run.py submission

Planning is timed in turn with the peer's. Submission is timed with an idle queue; without a GPU
nothing is moved (`IdleDevice`), for threads that move bytes would be timed along.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import pytest
import torch
from peers import VLLMWorker, vllm_planner
from sizes import HAS_GPU, SIZES
from timing import DEVICE, needs_gpu, note, seconds
from units import KIB, MIB
from world import World

from triton_offload.calibration import Path
from triton_offload.device import Device, device_for
from triton_offload.device.host import HostDevice, Record
from triton_offload.kernels import pages
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec, Ids
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.transfer.queue_manager import OffloadingQueueManager, transfer_queue

NUM_BLOCKS = SIZES.num_blocks
PAGE_BYTES = 1 * KIB


class IdleDevice(HostDevice):
    """A host device without threads, on which nothing moves: what is queued is done, or, while it
    is `busy`, not done yet."""

    def __init__(self) -> None:
        super().__init__()
        self.busy = False
        self._unreached: list[Record] = []

    def new_stream(self, name: str, *, high_priority: bool = False) -> Any:
        return name

    def close_stream(self, stream: Any) -> None:
        return

    def record(self, event: Any, stream: Any) -> None:
        event.latest = record = Record()
        record.reached = not self.busy
        if self.busy:
            self._unreached.append(record)

    def wait(self, stream: Any, event: Any) -> None:
        return

    def end(self) -> None:
        """What was queued while it was busy is done."""
        self.busy = False
        for record in self._unreached:
            record.reached = True
        self._unreached.clear()

    def fill_zero(self, buffer: torch.Tensor, stream: Any) -> None:
        return

    def copy(self, dst: torch.Tensor, src: torch.Tensor, stream: Any) -> None:
        return

    def copy_batch(self, dst: Ids, src: Ids, sizes: Ids, stream: Any) -> None:
        return

    def gather(self, *args: Any, zero_copy: bool) -> None:
        return

    def scatter(self, *args: Any, zero_copy: bool) -> None:
        return


def block_and_slot_ids(count: int) -> tuple[Ids, Ids]:
    rng = np.random.default_rng(0)
    return rng.permutation(NUM_BLOCKS)[:count], rng.permutation(NUM_BLOCKS)[:count]


def caches(num_tensors: int, device: torch.device = DEVICE) -> list[torch.Tensor]:
    """Never touched on the CPU: they may be larger than its memory."""
    shape = NUM_BLOCKS, PAGE_BYTES
    return [torch.empty(shape, dtype=torch.int8, device=device) for _ in range(num_tensors)]


@pytest.mark.parametrize("blocks", SIZES.planned)
@pytest.mark.parametrize("tensors", SIZES.tensors)
def test_planning(benchmark: Any, tensors: int, blocks: int) -> None:
    """All that grows with the job, in turn with vLLM's descriptors for the same pages."""
    layout = CacheLayout(caches(tensors, torch.device("cpu")))
    slots = torch.empty(NUM_BLOCKS, tensors * PAGE_BYTES, dtype=torch.int8)
    try:
        peer = vllm_planner(caches(tensors, torch.device("cpu")), slots)
    except pytest.skip.Exception:  # ours is measured without it
        peer = None
    block_ids, slot_ids = block_and_slot_ids(blocks)
    peer_ids = block_ids.astype(np.int32), slot_ids.astype(np.int32)
    peer_seconds: list[float] = []

    def plan() -> int:
        device_spec = GPULoadStoreSpec(block_ids)
        host_spec = CPULoadStoreSpec(slot_ids, fresh=True)
        runs = layout.plan(Direction.STORE, device_spec, host_spec, NUM_BLOCKS)
        return sum(len(part.block_ids) for run in runs for part in run.split(200))

    def in_turn() -> None:
        if peer is not None:
            start = time.perf_counter()
            peer(*peer_ids)
            peer_seconds.append(time.perf_counter() - start)

    assert plan() == blocks
    benchmark.pedantic(plan, setup=in_turn, rounds=SIZES.plan_rounds, warmup_rounds=5)
    note(benchmark, "planning", blocks=blocks, tensors=tensors)
    if peer_seconds:
        median = statistics.median(peer_seconds)
        benchmark.extra_info["peer_seconds"] = median
        benchmark.extra_info["ratio"] = median / benchmark.stats.stats.median


def idle_queue(tensors: int, path: Path) -> tuple[OffloadingQueueManager, HostPool, Device]:
    device: Device = device_for(DEVICE) if HAS_GPU else IdleDevice()
    layout = CacheLayout(caches(tensors))
    if HAS_GPU:
        pool = HostPool.allocate(device, NUM_BLOCKS, layout.slot_bytes)
        pool.wait_ready(120)
    else:  # not touched
        memory = torch.empty((NUM_BLOCKS, layout.slot_bytes), dtype=torch.uint8)
        pool = HostPool.from_tensor(device, memory, pinned=True)
    return transfer_queue(layout, pool, options=PipelineOptions(path=path)), pool, device


@pytest.mark.parametrize("slots", ["adjacent", "scattered"])
@pytest.mark.parametrize("path", Path, ids=lambda path: path.value)
@pytest.mark.parametrize("blocks", SIZES.submitted)
@pytest.mark.parametrize("tensors", SIZES.tensors)
def test_submitting(benchmark: Any, tensors: int, blocks: int, path: Path, slots: str) -> None:
    """`transfer_async` as a whole: planning, and queueing what a lane may have in flight.

    Slots that are not adjacent leave the staging buffer in a copy each.
    """
    if slots == "scattered" and path is not Path.STAGED:
        pytest.skip("slots make no difference to this path")
    if path is Path.COPY_ENGINE and blocks * tensors > 64 * 1024:
        pytest.skip("a copy engine alone, a descriptor for each of more than 65,536 pages")
    queue, pool, _ = idle_queue(tensors, path)
    block_ids, slot_ids = block_and_slot_ids(blocks)
    if slots == "adjacent":
        slot_ids = np.arange(blocks)
    jobs: list[int] = []

    def settle() -> None:
        queue.wait(jobs, 120)
        assert all(result.success for result in queue.get_finished())
        jobs.clear()

    def submit() -> None:
        specs = GPULoadStoreSpec(block_ids), CPULoadStoreSpec(slot_ids, fresh=True)
        jobs.append(queue.transfer_async(*specs))

    benchmark.pedantic(submit, setup=settle, rounds=SIZES.submit_rounds, warmup_rounds=3)
    settle()
    slots_of_buffer = PipelineOptions().buffer_bytes // (tensors * PAGE_BYTES)
    note(
        benchmark,
        "submission",
        blocks=blocks,
        tensors=tensors,
        path=path.value,
        slots=slots,
        segments=1 if path is Path.ZERO_COPY else -(-blocks // slots_of_buffer),
    )
    queue.shutdown(120)
    pool.close()


@needs_gpu
@pytest.mark.parametrize("blocks", SIZES.submitted)
@pytest.mark.parametrize("tensors", SIZES.tensors)
def test_submitting_to_vllm(benchmark: Any, tensors: int, blocks: int) -> None:
    """vLLM's `submit_store` as a whole: its descriptors, and the driver's part."""
    world = World.build(PAGE_BYTES, blocks * tensors, "recycled", tensors)
    worker = VLLMWorker(world)
    worker.run(Direction.STORE)
    benchmark.pedantic(
        lambda: worker.start(Direction.STORE),
        setup=worker.finish,
        rounds=SIZES.submit_rounds,
        warmup_rounds=3,
    )
    worker.finish()
    note(
        benchmark,
        "submission",
        blocks=blocks,
        tensors=tensors,
        path="vLLM",
        slots="scattered",
        segments=1,
    )
    worker.close()


@pytest.mark.parametrize("jobs", [0, 1, 16])
def test_polling(benchmark: Any, jobs: int) -> None:
    """`get_finished` while nothing ends."""
    queue, pool, device = idle_queue(32, Path.ZERO_COPY)
    if isinstance(device, IdleDevice):
        device.busy = True
    elif jobs:
        torch.cuda._sleep(1_000_000_000)  # half a second: the jobs wait for the compute stream
    for first in range(jobs):
        specs = GPULoadStoreSpec([first]), CPULoadStoreSpec([first], fresh=True)
        queue.transfer_async(*specs)
    benchmark.pedantic(lambda: queue.get_finished(), rounds=200, iterations=5, warmup_rounds=5)
    note(benchmark, "polling", jobs=jobs)
    if isinstance(device, IdleDevice):
        device.end()
    queue.shutdown(120)
    pool.close()


@needs_gpu
@pytest.mark.parametrize("zero_copy", [False, True], ids=["staged", "zero copy"])
def test_launching(benchmark: Any, zero_copy: bool) -> None:
    """The host's time for one launch of a gather."""
    layout = CacheLayout(caches(32))
    table = layout.groups[0].table
    slots = torch.zeros(64, layout.slot_bytes, dtype=torch.uint8, device=DEVICE)
    ids = torch.arange(64, device=DEVICE)
    config = pages.choose_config(zero_copy=zero_copy)
    benchmark.pedantic(
        lambda: pages.launch_gather(table, ids, slots, ids, 0, config),
        setup=torch.cuda.synchronize,
        rounds=100,
        warmup_rounds=5,
    )
    note(benchmark, "launch", name="zero copy" if zero_copy else "staged")


@pytest.mark.parametrize("size", SIZES.pools, ids=lambda size: f"{size >> 20} MiB")
def test_starting_a_pool(benchmark: Any, size: int) -> None:
    """Until the pool is usable, touched, and pinned where the device can; beside one allocation
    by torch of the same size, pinned likewise."""
    device = device_for(DEVICE)
    slot_bytes = 1 * MIB
    usable: list[float] = []
    closed: list[float] = []

    def start() -> HostPool:
        begin = time.perf_counter()
        pool = HostPool.allocate(device, size // slot_bytes, slot_bytes)
        usable.append(time.perf_counter() - begin)
        pool.wait_ready(120)
        return pool

    def stop() -> None:
        begin = time.perf_counter()
        pools.pop().close()
        closed.append(time.perf_counter() - begin)

    pools: list[HostPool] = []
    benchmark.pedantic(lambda: pools.append(start()), teardown=stop, rounds=3)
    plain = seconds(lambda: torch.zeros(size, dtype=torch.uint8, pin_memory=HAS_GPU).fill_(1))
    note(
        benchmark,
        "pool",
        bytes=size,
        usable_seconds=statistics.median(usable),
        close_seconds=statistics.median(closed),
        torch_seconds=plain,
        pinned=HAS_GPU,
    )
