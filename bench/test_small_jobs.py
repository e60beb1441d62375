"""Small jobs on the host device beside torch's own indexed copies, and a lookup beside the manager.

    python bench/run.py small_jobs

From the call to the last byte, the caches warm, in turn in one process: stores beside
`index_select(out=)` of each tensor into its place in the slots, loads beside `index_copy_` from
there, both on the widest words. What tells is the least of many rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from contenders import _words
from sizes import HAS_GPU
from timing import note
from units import KIB
from world import World

from triton_offload import KVOffloader
from triton_offload.specs import CPULoadStoreSpec, GPULoadStoreSpec, LoadStoreSpec
from triton_offload.transfer.queue_manager import transfer_queue

TENSORS = 32
BLOCKS = (1, 4, 16, 64)
PAGES = (4 * KIB, 16 * KIB, 64 * KIB)
KEYS = 2048
ROUNDS = 40

Call = Callable[[], object]

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the host device is measured where no GPU is")


def every_job(test: Any) -> Any:
    for name, values in (
        ("direction", ["store", "load"]),
        ("page_bytes", PAGES),
        ("blocks", BLOCKS),
    ):
        test = pytest.mark.parametrize(name, values)(test)
    return test


def in_turn(benchmark: Any, ours: Call, peer: Call, before: Call, **facts: object) -> None:
    """Time both after `before`, and note the peer's least seconds over ours."""
    peer_seconds: list[float] = []

    def setup() -> None:
        before()
        start = time.perf_counter()
        peer()
        peer_seconds.append(time.perf_counter() - start)

    benchmark.pedantic(ours, setup=setup, rounds=ROUNDS, warmup_rounds=3)
    least = min(peer_seconds)
    note(benchmark, peer_seconds=least, ratio=least / benchmark.stats.stats.min, **facts)


def peer_of(world: World, direction: str) -> Call:
    """By torch, one call per tensor."""
    width = world.page_bytes
    slots = torch.zeros(len(world.block_ids), TENSORS * width, dtype=torch.int8)
    places = [_words(slots[:, i * width : (i + 1) * width]) for i in range(TENSORS)]
    caches = [_words(cache.clone()) for cache in world.caches]
    ids = torch.from_numpy(world.block_ids.copy())

    def store() -> None:
        for cache, place in zip(caches, places, strict=True):
            torch.index_select(cache, 0, ids, out=place)

    def load() -> None:
        for cache, place in zip(caches, places, strict=True):
            cache.index_copy_(0, ids, place)

    return store if direction == "store" else load


@every_job
def test_through_an_offloader(benchmark: Any, blocks: int, page_bytes: int, direction: str) -> None:
    world = World.build(page_bytes, blocks * TENSORS, tensors=TENSORS)
    keys = [b"%d" % i for i in range(blocks)]
    with KVOffloader(world.caches, blocks * world.layout.slot_bytes) as offloader:
        offloader._pool.wait_ready(120)
        move = offloader.store if direction == "store" else offloader.load
        offloader.store(keys, world.block_ids).wait()

        def before() -> None:
            if direction == "store":  # again into the same slots
                offloader.reset()
            offloader.get_finished()

        in_turn(
            benchmark,
            lambda: move(keys, world.block_ids).wait(),
            peer_of(world, direction),
            before,
            kind="small job",
            by="KVOffloader",
            direction=direction,
            blocks=blocks,
            page_bytes=page_bytes,
        )


@every_job
def test_through_a_queue_manager(
    benchmark: Any, blocks: int, page_bytes: int, direction: str
) -> None:
    world = World.build(page_bytes, blocks * TENSORS, tensors=TENSORS)
    pool = world.pool()
    queue = transfer_queue(world.layout, pool)

    def run() -> None:
        pages = GPULoadStoreSpec(world.block_ids)
        slots = CPULoadStoreSpec(world.slot_ids, fresh=True)
        ends: tuple[LoadStoreSpec, LoadStoreSpec]
        ends = (pages, slots) if direction == "store" else (slots, pages)
        queue.wait([queue.transfer_async(*ends)])
        assert all(result.success for result in queue.get_finished())

    in_turn(
        benchmark,
        run,
        peer_of(world, direction),
        lambda: None,
        kind="small job",
        by="queue manager",
        direction=direction,
        blocks=blocks,
        page_bytes=page_bytes,
    )
    queue.shutdown(120)
    pool.close()


def test_lookup(benchmark: Any) -> None:
    keys = [i.to_bytes(32, "little") for i in range(KEYS)]
    with KVOffloader([torch.zeros(KEYS, 64, dtype=torch.int8)], KEYS * 64) as offloader:
        offloader.store(keys, np.arange(KEYS)).wait()
        in_turn(
            benchmark,
            lambda: offloader.lookup(keys),
            lambda: offloader._manager.lookup(keys),
            lambda: None,
            kind="lookup",
            keys=KEYS,
        )
