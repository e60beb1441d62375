"""Store and load on the host device, beside one plain copy of the same bytes.

    pytest bench/test_host_transfers.py --benchmark-group-by=group

`extra_info["ratio"]` is the plain copy's time over ours, both medians of rounds taken in turn, so
that what else the machine does meets both. The plain copy is torch's, over contiguous memory, with
as many threads as the transfers use.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
import torch

from triton_offload.calibration import Path
from triton_offload.device.host import HostDevice
from triton_offload.host_pool import HostPool
from triton_offload.layout import CacheLayout
from triton_offload.pipeline import PipelineOptions
from triton_offload.queue_manager import transfer_queue
from triton_offload.specs import CPULoadStoreSpec, GPULoadStoreSpec

JOB_BYTES = 256 << 20
TENSORS = 8
ROUNDS = 9


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize("page_bytes", [4 << 10, 64 << 10], ids=["4KiB", "64KiB"])
def test_both_directions_at_once(benchmark, page_bytes):
    """A store and a load of half the bytes each, other pages and slots, beside one plain copy."""
    count = JOB_BYTES // (2 * TENSORS * page_bytes)
    rng = np.random.default_rng(0)
    caches = [torch.ones(4 * count, page_bytes, dtype=torch.uint8) for _ in range(TENSORS)]
    layout = CacheLayout(caches)
    pool = HostPool.allocate(HostDevice(), 2 * count, layout.slot_bytes)
    pool.wait_ready()
    pool.slots.fill_(1)
    queue = transfer_queue(layout, pool)
    stored, loaded = np.split(rng.permutation(4 * count)[: 2 * count], 2)
    source, target = (torch.ones(JOB_BYTES, dtype=torch.uint8) for _ in range(2))

    def transfer() -> None:
        store = queue.transfer_async(
            GPULoadStoreSpec(stored), CPULoadStoreSpec(np.arange(count), fresh=True)
        )
        load = queue.transfer_async(
            CPULoadStoreSpec(np.arange(count, 2 * count)), GPULoadStoreSpec(loaded)
        )
        queue.wait([store, load])
        assert sum(result.num_bytes for result in queue.get_finished()) == JOB_BYTES

    plain: list[float] = []
    benchmark.group = f"both directions {page_bytes >> 10} KiB pages"
    benchmark.pedantic(
        transfer,
        setup=lambda: plain.append(seconds(lambda: target.copy_(source))),
        rounds=ROUNDS,
        warmup_rounds=2,
    )
    ratio = statistics.median(plain) / benchmark.stats.stats.median
    benchmark.extra_info["ratio"] = ratio
    print(f" ratio {ratio:.2f}")
    queue.shutdown()
    pool.close()


@pytest.mark.parametrize("slots", ["adjacent", "scattered"])
@pytest.mark.parametrize("path", [None, Path.STAGED, Path.COPY_ENGINE], ids=lambda p: str(p))
@pytest.mark.parametrize("page_bytes", [4 << 10, 64 << 10], ids=["4KiB", "64KiB"])
@pytest.mark.parametrize("direction", ["store", "load"])
def test_transfer(benchmark, direction, page_bytes, path, slots):
    count = JOB_BYTES // (TENSORS * page_bytes)
    rng = np.random.default_rng(0)
    caches = [torch.ones(2 * count, page_bytes, dtype=torch.uint8) for _ in range(TENSORS)]
    layout = CacheLayout(caches)
    pool = HostPool.allocate(HostDevice(), 2 * count, layout.slot_bytes)
    pool.wait_ready()
    pool.slots.fill_(1)  # so that no page is touched for the first time while it is timed
    queue = transfer_queue(layout, pool, options=PipelineOptions(path=path))
    block_ids = rng.permutation(2 * count)[:count]
    slot_ids = np.arange(count) if slots == "adjacent" else rng.permutation(2 * count)[:count]
    device_spec = GPULoadStoreSpec(block_ids)
    host_spec = CPULoadStoreSpec(slot_ids, fresh=True)
    source, target = (
        torch.ones(JOB_BYTES, dtype=torch.uint8),
        torch.ones(JOB_BYTES, dtype=torch.uint8),
    )

    def transfer() -> None:
        if direction == "store":
            job = queue.transfer_async(device_spec, host_spec)
        else:
            job = queue.transfer_async(host_spec, device_spec)
        queue.wait([job])
        assert queue.get_finished()[0].num_bytes == JOB_BYTES

    plain: list[float] = []
    benchmark.group = f"{direction} {page_bytes >> 10} KiB pages"
    benchmark.pedantic(
        transfer,
        setup=lambda: plain.append(seconds(lambda: target.copy_(source))),
        rounds=ROUNDS,
        warmup_rounds=2,
    )
    ours = benchmark.stats.stats.median
    benchmark.extra_info["ratio"] = statistics.median(plain) / ours
    benchmark.extra_info["GB/s"] = JOB_BYTES / ours / 1e9
    print(f" ratio {statistics.median(plain) / ours:.2f}, {JOB_BYTES / ours / 1e9:.1f} GB/s")
    queue.shutdown()
    pool.close()
