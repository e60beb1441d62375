"""Gather and scatter kernels by themselves: device memory, and mapped host memory.

    python bench/run.py kernels

Times are events around one launch, the L2 cache cold. In device memory every byte is read once
and written once, and GB/s count both; over mapped host memory they count the link alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sizes import SIZES
from timing import DEVICE, gpu_clock, needs_gpu, note, rounds_for, seconds
from world import TENSORS, World, jobs

from triton_offload.kernels import pages
from triton_offload.kernels.tiling import KernelConfig
from triton_offload.specs import Direction

pytestmark = [needs_gpu, pytest.mark.benchmark(timer=gpu_clock())]

BUDGET = SIZES.kernel_budget
GRID = jobs()
MOVES = {"gather": pages.launch_gather, "scatter": pages.launch_scatter}


class Operands:
    """A world's blocks, and the slots that they go to or come from."""

    def __init__(self, page_bytes: int, count: int, mapped: bool) -> None:
        world = World.build(page_bytes, count)
        shape = len(world.slot_ids), world.layout.slot_bytes
        where: dict[str, Any] = {"pin_memory": True} if mapped else {"device": DEVICE}
        self.table = world.layout.groups[0].table
        self.caches = world.caches
        self.slots = torch.zeros(shape, dtype=torch.uint8, **where)
        self.blocks = torch.from_numpy(world.ids(Direction.STORE)[0]).to(DEVICE)
        self.places = torch.from_numpy(world.ids(Direction.STORE)[1]).to(DEVICE)
        self.num_bytes = world.num_bytes

    def move(self, direction: str, config: KernelConfig) -> None:
        MOVES[direction](self.table, self.blocks, self.slots, self.places, 0, config)


@pytest.fixture(scope="module")
def operands() -> Any:
    """The operands asked for, kept while the same are asked for."""
    kept: dict[Any, Operands] = {}

    def get(*key: Any) -> Operands:
        if key not in kept:
            kept.clear()
            torch.cuda.empty_cache()
            kept[key] = Operands(*key)
        return kept[key]

    yield get
    kept.clear()


def record(
    benchmark: Any, kind: str, operands: Operands, job: tuple[int, int], traffic: int, **facts: Any
) -> None:
    median = benchmark.stats.stats.median
    gb_per_s = traffic * operands.num_bytes / median / 1e9
    note(
        benchmark,
        kind,
        page_bytes=job[0],
        pages=job[1],
        bytes=operands.num_bytes,
        gb_per_s=gb_per_s,
        **facts,
    )
    if "ctas" in facts:
        benchmark.extra_info["gb_per_s_per_cta"] = gb_per_s / facts["ctas"]


@pytest.mark.parametrize("name", ["gather", "scatter", "index_select", "index_copy", "plain copy"])
@pytest.mark.parametrize("job", GRID, ids=lambda job: f"{job[0]} x {job[1]}")
def test_in_device_memory(benchmark: Any, operands: Any, job: tuple[int, int], name: str) -> None:
    o: Operands = operands(*job, False)
    config = pages.choose_config(zero_copy=False)
    staging = o.slots.view(torch.int64).view(TENSORS, len(o.blocks), -1)
    caches = [cache.view(torch.int64) for cache in o.caches]
    other = torch.empty_like(o.slots) if name == "plain copy" else None

    def move() -> None:
        if name in MOVES:
            o.move(name, config)
        elif other is not None:
            other.copy_(o.slots)
        else:
            for cache, place in zip(caches, staging, strict=True):
                if name == "index_select":
                    torch.index_select(cache, 0, o.blocks, out=place)
                else:
                    cache.index_copy_(0, o.blocks, place)

    move()
    rounds = rounds_for(seconds(move), BUDGET)
    benchmark.pedantic(move, rounds=rounds, warmup_rounds=2)
    facts = {"ctas": config.programs} if name in MOVES else {}
    record(benchmark, "kernel", o, job, 2, name=name, **facts)


@pytest.mark.parametrize("direction", MOVES)
@pytest.mark.parametrize("ctas", SIZES.ctas)
@pytest.mark.parametrize("page_bytes", SIZES.swept_page_bytes)
@pytest.mark.parametrize("mapped", [False, True], ids=["device", "mapped"])
def test_ctas(
    benchmark: Any, operands: Any, mapped: bool, page_bytes: int, ctas: int, direction: str
) -> None:
    """How many CTAs the memory, or the link, needs."""
    job = page_bytes, min(100_000, SIZES.swept_bytes // page_bytes) // TENSORS * TENSORS
    o: Operands = operands(*job, mapped)
    chosen = pages.choose_config(zero_copy=mapped)
    config = KernelConfig(chosen.warps, chosen.tile_bytes, ctas)
    o.move(direction, config)
    one = seconds(lambda: o.move(direction, config))
    benchmark.pedantic(
        lambda: o.move(direction, config), rounds=rounds_for(one, BUDGET), warmup_rounds=1
    )
    where = "mapped host memory" if mapped else "device memory"
    traffic = 1 if mapped else 2
    record(benchmark, "ctas", o, job, traffic, name=direction, memory=where, ctas=ctas)
