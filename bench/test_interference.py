"""What a transfer costs the model that computes beside it, and what the model's own copies wait.

    python bench/run.py interference

The model runs again and again while transfers are under way; its time is the median over the
repetitions that ended before they did. On the host device the model and the transfers share the
CPU's cores and its memory: the figures say nothing of a GPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contenders import Contender, Ours
from results import ONE_COPY
from sizes import HAS_GPU, SIZES
from stage import OURS, Stage
from timing import DEVICE, device_seconds, needs_gpu, note, seconds, synchronize
from units import KIB, MIB
from world import World

from triton_offload.kernels import pages
from triton_offload.specs import Direction
from triton_offload.transfer.ranges import SLICE_BYTES

# Jobs are queued one behind the other until they last as long as so many repetitions.
OUTLAST = SIZES.outlast
MOST_JOBS = 64
PAGE_BYTES = 32 * KIB
BURST_PAGE_BYTES = 64 * KIB
SMALL_BYTES = 4 * KIB
WINDOWS = [None, 256 * MIB, 64 * MIB, 16 * MIB]

Model = Callable[[], object]


def matrix_product() -> Model:
    """Bound by arithmetic: every SM (every core) is wanted."""
    size, repeats = SIZES.product
    dtype = torch.bfloat16 if HAS_GPU else torch.float32
    a, b = (torch.ones(size, size, dtype=dtype, device=DEVICE) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: [torch.mm(a, b, out=out) for _ in range(repeats)]


def decode() -> Model:
    """Bound by memory: weights of 512 MiB (on the CPU 64) read for eight tokens."""
    size, repeats = SIZES.weights
    dtype = torch.bfloat16 if HAS_GPU else torch.float32
    weights = torch.ones(size, size, dtype=dtype, device=DEVICE)
    tokens = torch.ones(8, size, dtype=dtype, device=DEVICE)
    return lambda: [torch.nn.functional.linear(tokens, weights) for _ in range(repeats)]


def small_kernels() -> Model:
    """A chain of kernels that each wait for the one before."""
    x = torch.ones(4096, device=DEVICE)

    def run() -> None:
        for _ in range(SIZES.kernels):
            x.add_(1)

    return run


MODELS = {"matrix product": matrix_product, "decode": decode, "small kernels": small_kernels}


def beside(
    model: Model, contender: Contender, direction: Direction, jobs: int
) -> tuple[list[float], float]:
    """(times of the model while transfers were under way, seconds that all of them took)."""
    times: list[float] = []
    synchronize()
    begin = time.perf_counter()
    for _ in range(jobs):
        contender.start(direction)
    while True:
        took = device_seconds(model)
        if not contender.pending():
            break  # it may have ended in the middle of this one
        times.append(took)
    contender.finish()
    return times, time.perf_counter() - begin


@pytest.mark.parametrize("name", [*OURS, "index_select", "batched copy", "vLLM", ONE_COPY])
@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
@pytest.mark.parametrize("model_name", MODELS)
def test_slowdown(
    benchmark: Any, stage: Stage, model_name: str, direction: Direction, name: str
) -> None:
    if name not in OURS and not HAS_GPU:
        pytest.skip("on the CPU peers do their work on the caller's thread: nothing runs beside it")
    job = PAGE_BYTES, SIZES.beside_bytes // PAGE_BYTES, "adjacent"
    world, _ = stage.world(*job)
    contender = stage.contender(name)
    model = MODELS[model_name]()
    for _ in range(3):
        model()
    contender.run(direction)
    one_job = seconds(lambda: contender.run(direction))
    one_model = statistics.median(device_seconds(model) for _ in range(5))
    jobs = max(2, min(MOST_JOBS, math.ceil(OUTLAST * one_model / one_job)))
    alone_transfer = seconds(lambda: contender.run(*[direction] * jobs))
    alone: list[float] = []
    during: list[float] = []
    transfers: list[float] = []

    def round_of() -> None:
        alone.extend(device_seconds(model) for _ in range(4))
        times, took = beside(model, contender, direction, jobs)
        during.extend(times)
        transfers.append(took)

    benchmark.pedantic(round_of, rounds=3)
    if not during:
        pytest.skip("the transfers ended before the model had run once beside them")
    before, after = statistics.median(alone), statistics.median(during)
    num_bytes = jobs * world.num_bytes
    note(
        benchmark,
        "interference",
        model=model_name,
        contender=name,
        direction=direction.value,
        alone_seconds=before,
        beside_seconds=after,
        repetitions=len(during),
        slowdown=after / before,
        share=1 - before / after,
        transfer_gb_per_s=num_bytes / statistics.median(transfers) / 1e9,
        transfer_alone_gb_per_s=num_bytes / alone_transfer / 1e9,
    )


class SmallCopy:
    """The engine's own copy of a few inputs to the device, on its own stream."""

    def __init__(self) -> None:
        self._host = torch.ones(SMALL_BYTES, dtype=torch.uint8, pin_memory=True)
        self._device = torch.empty_like(self._host, device=DEVICE)
        self._stream = torch.cuda.Stream()

    def seconds(self) -> float:
        start = time.perf_counter()
        with torch.cuda.stream(self._stream):
            self._device.copy_(self._host, non_blocking=True)
        self._stream.synchronize()
        return time.perf_counter() - start


@needs_gpu
@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: f"{(window or 0) >> 20} MiB")
def test_small_copy_during_a_load(benchmark: Any, stage: Stage, window: int | None) -> None:
    """4 KiB to the device while a load of 4 GiB is queued ahead, for several windows."""
    stage.clear()
    world = World.build(BURST_PAGE_BYTES, SIZES.burst_bytes // BURST_PAGE_BYTES)
    loads = Ours(world, "staged", window)
    small = SmallCopy()
    loads.run(Direction.LOAD)
    alone = statistics.median(small.seconds() for _ in range(50))
    during: list[float] = []

    def burst() -> None:
        loads.start(Direction.LOAD)
        while True:
            took = small.seconds()
            during.append(took)
            if not loads.pending():
                during.pop()  # the load may have ended before the copy did
                return
            time.sleep(0.0005)

    benchmark.pedantic(burst, rounds=3)
    loads.close()
    load_seconds = benchmark.stats.stats.median
    gb_per_s = world.num_bytes / load_seconds / 1e9
    note(
        benchmark,
        "small copy",
        window_bytes=window,
        alone_seconds=alone,
        during_seconds=during,
        load_seconds=load_seconds,
        load_gb_per_s=gb_per_s,
        slice_seconds=SLICE_BYTES / gb_per_s / 1e9,
    )


@needs_gpu
@pytest.mark.parametrize("priority", [0, -1], ids=["no priority", "priority"])
def test_scatter_behind_compute(benchmark: Any, stage: Stage, priority: int) -> None:
    """From queueing a scatter of 8 MiB on an idle stream to its end, while the compute stream has
    a hundred large products queued."""
    stage.clear()
    world = World.build(PAGE_BYTES, 8 * MIB // PAGE_BYTES)
    table = world.layout.groups[0].table
    shape = len(world.slot_ids), world.layout.slot_bytes
    slots = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
    blocks, places = (torch.from_numpy(ids).to(DEVICE) for ids in world.ids(Direction.LOAD))
    config = pages.choose_config(zero_copy=False)
    stream = torch.cuda.Stream(priority=priority)
    size, repeats = SIZES.busy_products
    a = torch.ones(size, size, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty_like(a)
    waits: list[float] = []

    def scatter() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            start.record()
            pages.launch_scatter(table, blocks, slots, places, 0, config)
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    alone = statistics.median(scatter() for _ in range(10))

    def busy() -> None:
        for _ in range(repeats):
            torch.mm(a, a, out=out)

    benchmark.pedantic(
        lambda: waits.append(scatter()),
        setup=busy,
        teardown=torch.cuda.synchronize,
        rounds=SIZES.repeats,
    )
    note(
        benchmark,
        "scatter latency",
        priority=priority,
        alone_seconds=alone,
        behind_seconds=statistics.median(waits),
        longest_seconds=max(waits),
        product_seconds=seconds(lambda: torch.mm(a, a, out=out)),
    )
