"""What checksums cost in CPU memory: jobs with `verify="load"` beside the same without, in turn.

    python bench/run.py checksums

From the call to the last byte, through an offloader each, on the same pages. What tells is the
least of many rounds, and the processor time of that more than the time on the clock: of that, other
programs have their share.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from sizes import HAS_GPU
from timing import note
from units import KIB, MIB
from world import World

from triton_offload import KVOffloader

TENSORS = 32
PAGES = (4 * KIB, 16 * KIB, 64 * KIB)
JOB_BYTES = (2 * MIB, 64 * MIB)
ROUNDS = {2 * MIB: 100, 64 * MIB: 25}

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the host device is measured where no GPU is")


@pytest.mark.parametrize("direction", ["store", "load"])
@pytest.mark.parametrize("page_bytes", PAGES)
@pytest.mark.parametrize("job_bytes", JOB_BYTES)
def test_beside_the_same_without(
    benchmark: Any, job_bytes: int, page_bytes: int, direction: str
) -> None:
    world = World.build(page_bytes, job_bytes // page_bytes, tensors=TENSORS)
    keys = [b"%d" % i for i in range(len(world.block_ids))]
    room = len(keys) * world.layout.slot_bytes
    clocks: dict[bool, list[float]] = {False: [], True: []}  # by whether there are checksums
    processors: dict[bool, list[float]] = {False: [], True: []}
    with (
        KVOffloader(world.caches, room) as plain,
        KVOffloader(world.caches, room, verify="load") as verified,
    ):

        def call(offloader: KVOffloader) -> None:
            move = offloader.store if direction == "store" else offloader.load
            start = time.perf_counter(), time.process_time()
            move(keys, world.block_ids).wait()
            clocks[offloader is verified].append(time.perf_counter() - start[0])
            processors[offloader is verified].append(time.process_time() - start[1])

        def before(offloader: KVOffloader) -> None:
            if direction == "store":  # again into the same slots
                offloader.reset()
            offloader.get_finished()

        def setup() -> None:
            before(plain)
            call(plain)
            before(verified)

        for offloader in (plain, verified):
            offloader._pool.wait_ready(120)
            offloader.store(keys, world.block_ids).wait()
        benchmark.pedantic(
            lambda: call(verified), setup=setup, rounds=ROUNDS[job_bytes], warmup_rounds=2
        )
    note(
        benchmark,
        "checksums",
        direction=direction,
        page_bytes=page_bytes,
        pages=len(keys) * TENSORS,
        bytes=world.num_bytes,
        with_seconds=min(clocks[True]),
        without_seconds=min(clocks[False]),
        times=min(processors[True]) / min(processors[False]),
    )
