"""The benchmarks that `regression.py` watches: planning, the manager, transfers in CPU memory.

What can be switched off is off in all of them: slots are of one size, nothing is added up
(`verify="off"`), and loads are not by layers. So they show what these cost whoever does without.

Each yields (reference, ours). The references are plain Python, numpy and torch, so that a ratio
means the same wherever it is measured and whatever other version of a peer is installed.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TypeAlias

import numpy as np
import torch

from triton_offload.device.host import HostDevice
from triton_offload.pool.host_pool import HostPool
from triton_offload.scheduler.manager import CPUOffloadingManager
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.queue_manager import transfer_queue

Pair: TypeAlias = tuple[Callable[[], object], Callable[[], object]]

JOB_BYTES = 64 << 20
TENSORS = 8
POOL_CHUNKS = 5_000
NUM_REQUESTS = 600


@contextmanager
def planning(num_blocks: int, num_tensors: int) -> Iterator[Pair]:
    """A store's plan; beside it three arrays with an entry per page: its address in the cache, in
    the slot, and its size."""
    page_bytes, limit = 64, 2 * num_blocks
    caches = [torch.empty(limit, page_bytes, dtype=torch.uint8) for _ in range(num_tensors)]
    layout = CacheLayout(caches)
    rng = np.random.default_rng(0)
    block_ids, slot_ids = (rng.permutation(limit)[:num_blocks] for _ in range(2))
    repeats = max(1, 4096 // num_blocks)  # so that a round is long beside the clock's grain

    def descriptors() -> None:
        for _ in range(repeats):
            pages, places, sizes = (
                np.empty(num_blocks * num_tensors, dtype=np.int64) for _ in range(3)
            )
            for i, cache in enumerate(caches):
                of_tensor = slice(i, None, num_tensors)
                pages[of_tensor] = block_ids * page_bytes + cache.data_ptr()
                places[of_tensor] = slot_ids * layout.slot_bytes + i * page_bytes
                sizes[of_tensor] = page_bytes

    def plan() -> None:
        for _ in range(repeats):
            runs = layout.plan(
                Direction.STORE,
                GPULoadStoreSpec(block_ids),
                CPULoadStoreSpec(slot_ids, fresh=True),
                limit,
            )
            assert sum(len(part.block_ids) for run in runs for part in run.split(200)) == num_blocks

    yield descriptors, plan


@contextmanager
def managing(policy: str) -> Iterator[Pair]:
    """Requests against a full pool; beside it the least that an LRU cache does: a dict lookup a
    key, and one key out and one in for each that is missing."""
    rng = random.Random(0)
    prefixes = [[rng.randbytes(36) for _ in range(8)] for _ in range(100)]
    requests = [
        rng.choice(prefixes)[: rng.randint(1, 8)] + [rng.randbytes(36) for _ in range(16)]
        for _ in range(NUM_REQUESTS)
    ]
    manager = CPUOffloadingManager(POOL_CHUNKS, policy)
    least = OrderedDict.fromkeys(rng.randbytes(36) for _ in range(POOL_CHUNKS))

    def run_least() -> None:
        for keys in requests:
            for key in keys:
                if key in least:
                    least.move_to_end(key)
                else:
                    least.popitem(last=False)
                    least[key] = None

    def run_manager() -> None:
        for keys in requests:
            found = manager.lookup(keys)
            manager.touch(keys)
            manager.prepare_load(keys[:found])
            manager.complete_load(keys[:found])
            output = manager.prepare_store(keys[found:])
            assert output is not None
            manager.complete_store(output.keys_to_store)

    run_manager()  # which fills the pool
    yield run_least, run_manager


@contextmanager
def transferring(
    direction: Direction, page_bytes: int, blocks_per_chunk: int = 1, *, adjacent: bool = True
) -> Iterator[Pair]:
    """A job in CPU memory; beside it one plain copy of as many bytes with as many threads."""
    num_blocks = JOB_BYTES // (TENSORS * page_bytes)
    num_chunks = num_blocks // blocks_per_chunk
    rng = np.random.default_rng(0)
    caches = [torch.ones(2 * num_blocks, page_bytes, dtype=torch.uint8) for _ in range(TENSORS)]
    layout = CacheLayout(caches, blocks_per_chunk)
    pool = HostPool.allocate(HostDevice(), 2 * num_chunks, layout.slot_bytes)
    pool.wait_ready()
    pool.slots.fill_(1)  # so that no page is touched for the first time while it is timed
    queue = transfer_queue(layout, pool)
    pages = GPULoadStoreSpec(rng.permutation(2 * num_blocks)[:num_blocks])
    slot_ids = np.arange(num_chunks) if adjacent else rng.permutation(2 * num_chunks)[:num_chunks]
    slots = CPULoadStoreSpec(slot_ids, fresh=True)
    ends = (pages, slots) if direction is Direction.STORE else (slots, pages)
    source, target = (torch.ones(JOB_BYTES, dtype=torch.uint8) for _ in range(2))

    def transfer() -> None:
        queue.wait([queue.transfer_async(*ends)])
        assert queue.get_finished()[0].success

    try:
        yield lambda: target.copy_(source), transfer
    finally:
        queue.shutdown()
        pool.close()


CHOSEN: dict[str, Callable[[], AbstractContextManager[Pair]]] = {
    "plan 8,192 blocks x 80 tensors": partial(planning, 8192, 80),
    "plan 512 blocks x 32 tensors": partial(planning, 512, 32),
    "manager, LRU": partial(managing, "lru"),
    "manager, ARC": partial(managing, "arc"),
    "store, 4 KiB pages": partial(transferring, Direction.STORE, 4 << 10),
    "load, 4 KiB pages": partial(transferring, Direction.LOAD, 4 << 10),
    "store, 64 KiB pages": partial(transferring, Direction.STORE, 64 << 10),
    "load, 64 KiB pages": partial(transferring, Direction.LOAD, 64 << 10),
    "store, 4 KiB pages, chunks of 32": partial(
        transferring, Direction.STORE, 4 << 10, 32, adjacent=False
    ),
}
