"""Jobs on slots of different sizes that are the same bytes, while others are under way there.

A manager of ours gives no slab away before its transfers have ended. vLLM's forgets all chunks at a
reset and gives their slots out at once: the transfers wait for one another.
"""

from __future__ import annotations

import pytest
import torch

from triton_offload.calibration import Path
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import CPULoadStoreSpec, GPULoadStoreSpec, TransferStatus
from triton_offload.testing import SimulatedDevice
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.options import PipelineOptions
from triton_offload.transfer.queue_manager import transfer_queue

PAGES = (16, 48)  # of each group: three small slots in a slab, or a large one


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("path", ["staged", "copy_engine"])
def test_what_uses_a_slab_as_another_size_waits_for_what_is_under_way_there(
    path: str, seed: int
) -> None:
    with SimulatedDevice(seed) as device:
        tensors = [device.empty(8 * size).view(8, size) for size in PAGES]
        for i, tensor in enumerate(tensors):
            for block in range(8):
                tensor[block].fill_(1 + i * 8 + block)
        layout = CacheLayout(tensors, 1, [[(0, 16)], [(1, 48)]], packed=True)
        pool = HostPool.allocate(device, 2, 48, layout.slot_sizes)
        pool.wait_ready(60)
        options = PipelineOptions(path=Path(path), buffer_bytes=48)
        queue = transfer_queue(layout, pool, options=options)
        small = CPULoadStoreSpec([0, 1, 2], True), GPULoadStoreSpec([1, 2, 3], [3, 0], [0, 0])
        large = CPULoadStoreSpec([6], True), GPULoadStoreSpec([5], [0, 1], [0, 0])
        back = GPULoadStoreSpec([4, 6, 7], [3, 0], [0, 0])
        last = GPULoadStoreSpec([0], [0, 1], [0, 0])
        jobs = [
            queue.transfer_async(small[1], small[0]),
            queue.transfer_async(CPULoadStoreSpec([0, 1, 2]), back),
            queue.transfer_async(large[1], large[0]),  # the same slab
            queue.transfer_async(CPULoadStoreSpec([6]), last),
        ]
        queue.wait(jobs)
        results = queue.get_finished()
        assert {each.status for each in results} == {TransferStatus.SUCCESS}
        assert torch.equal(tensors[0][[4, 6, 7]], tensors[0][[1, 2, 3]])
        assert torch.equal(tensors[1][0], tensors[1][5])
        queue.shutdown()
        pool.close()
