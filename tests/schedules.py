"""Random schedules of the whole worker side on the simulated device, each from a seed."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch

from triton_offload.calibration import Path, PathRule, PathTable
from triton_offload.specs import Direction, Ids
from triton_offload.testing import SimulatedDevice
from triton_offload.testing.engine import CacheShape, EngineMemory
from triton_offload.testing.layered import LayeredEngine
from triton_offload.testing.serving import ServingEngine
from triton_offload.transfer import layers as transfer_layers
from triton_offload.transfer.device_worker import DeviceWorker
from triton_offload.transfer.options import Verify
from triton_offload.transfer.paths import staged
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.transfer.queue_manager import OffloadingQueueManager, transfer_queue
from triton_offload.transfer.staging import IndexRing

MIN_OPERATIONS = 100
MOST_STEPS = 5000  # far more than any schedule takes
NUM_BUFFERS = 2
LANES = (("store", "load"), ("store", "expedited"), ("store", "load", "expedited"))

# Sizes that no alignment likes, pages apart, and slots apart.
ODD = CacheShape(tensors=((13, 13), (7, 9), (2, 2)), blocks_per_chunk=3, row_gap=5)
# Three groups over the same tensors: one of all, one of a few bytes, one with padded pages.
HYBRID = CacheShape(
    tensors=((16, 16), (8, 12), (24, 24)),
    groups=(((0, 16), (1, 8), (2, 24)), ((1, 8),), ((0, 9), (2, 20))),
)
# Chunks of few bytes, many to a segment: scattered ones leave in batches.
MANY = CacheShape(tensors=((8, 8), (4, 4)), blocks_per_chunk=1, num_blocks=40, num_slots=20)
# Five layers, in bands of one, two and two.
LAYERS = CacheShape(tensors=((8, 8), (4, 4), (6, 8), (4, 4), (6, 6)))
# Slots of 32, 48 and 16 bytes in slabs of 100: none divides it, and the last has padded pages.
SIZES = CacheShape(
    tensors=((16, 16), (8, 12), (16, 16)),
    groups=(((0, 16),), ((1, 8), (2, 16)), ((1, 5),)),
    slab_bytes=100,
)
SINGLE = CacheShape(tensors=((32, 32),), blocks_per_chunk=1)

# Big jobs by the copy engine, loads on mapped memory where they are small: neighbours differ.
MIXED_PATHS = PathTable(
    Path.STAGED,
    (
        PathRule(Direction.LOAD, 0, 0, Path.ZERO_COPY),
        PathRule(Direction.LOAD, 0, 6, Path.STAGED),
        PathRule(Direction.STORE, 0, 8, Path.COPY_ENGINE),
    ),
)

# Neighbours end on different streams, both ways.
CROSSING_PATHS = PathTable(
    Path.STAGED,
    (
        PathRule(Direction.LOAD, 0, 0, Path.COPY_ENGINE),
        PathRule(Direction.LOAD, 0, 6, Path.STAGED),
        PathRule(Direction.STORE, 0, 0, Path.ZERO_COPY),
        PathRule(Direction.STORE, 0, 8, Path.STAGED),
    ),
)


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a schedule runs on. `paths`: one for all segments, or a table that mixes them."""

    shape: CacheShape
    paths: Path | PathTable
    window_chunks: int | None = None
    buffer_chunks: int = 1
    pinned: bool = True
    deferred: bool = False
    layers: bool = False
    verify: Verify = "off"

    def options(self, slot_bytes: int) -> PipelineOptions:
        fixed = isinstance(self.paths, Path)
        return PipelineOptions(
            path=self.paths if isinstance(self.paths, Path) else None,
            paths=None if fixed else self.paths,
            buffer_bytes=self.buffer_chunks * slot_bytes,
            num_buffers=NUM_BUFFERS,
            max_indices=8 * self.buffer_chunks,  # or the least that it takes
            window_bytes=self.window_chunks and self.window_chunks * slot_bytes,
            verify=self.verify,
        )


CONFIGURATIONS = {
    "staged": Configuration(CacheShape(), Path.STAGED),
    "staged, odd sizes": Configuration(ODD, Path.STAGED),
    "staged, hybrid": Configuration(HYBRID, Path.STAGED),
    "staged, window": Configuration(SINGLE, Path.STAGED, window_chunks=2),
    "staged, batches": Configuration(MANY, Path.STAGED, buffer_chunks=5),
    "staged, pageable": Configuration(CacheShape(), Path.STAGED, pinned=False),
    "staged, deferred": Configuration(CacheShape(), Path.STAGED, pinned=False, deferred=True),
    "mixed paths, deferred": Configuration(HYBRID, MIXED_PATHS, pinned=False, deferred=True),
    "zero copy, hybrid": Configuration(HYBRID, Path.ZERO_COPY),
    "zero copy, odd sizes": Configuration(ODD, Path.ZERO_COPY),
    "copy engine, hybrid": Configuration(HYBRID, Path.COPY_ENGINE),
    "copy engine": Configuration(CacheShape(), Path.COPY_ENGINE),
    "mixed paths": Configuration(CacheShape(), MIXED_PATHS),
    "crossing paths": Configuration(CacheShape(), CROSSING_PATHS),
    "mixed paths, hybrid": Configuration(HYBRID, MIXED_PATHS),
    "staged, layers": Configuration(LAYERS, Path.STAGED, layers=True),
    "staged, layers, window": Configuration(LAYERS, Path.STAGED, window_chunks=1, layers=True),
    "staged, layers, deferred": Configuration(
        HYBRID, Path.STAGED, pinned=False, deferred=True, layers=True
    ),
    "zero copy, layers, odd sizes": Configuration(ODD, Path.ZERO_COPY, layers=True),
    "copy engine, layers, hybrid": Configuration(HYBRID, Path.COPY_ENGINE, layers=True),
    "crossing paths, layers": Configuration(LAYERS, CROSSING_PATHS, layers=True),
    "staged, sizes": Configuration(SIZES, Path.STAGED),
    "zero copy, sizes": Configuration(SIZES, Path.ZERO_COPY),
    "copy engine, sizes": Configuration(SIZES, Path.COPY_ENGINE),
    "mixed paths, sizes": Configuration(SIZES, MIXED_PATHS, buffer_chunks=3),
    "mixed paths, sizes, layers": Configuration(SIZES, MIXED_PATHS, layers=True),
    "staged, verified": Configuration(CacheShape(), Path.STAGED, verify="load"),
    "mixed paths, hybrid, verified": Configuration(HYBRID, MIXED_PATHS, verify="load"),
    "mixed paths, sizes, layers, verified": Configuration(
        SIZES, MIXED_PATHS, layers=True, verify="load"
    ),
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a schedule did. `wraps`: how often the ring that was wrapped least was."""

    operations: int
    jobs: int
    crossings: int
    wraps: float


class Rings:
    """How often the rings of some lanes have handed out memory again from their beginning, since
    `restart`."""

    def __init__(
        self, queue: OffloadingQueueManager, lanes: Sequence[str], *, staged: bool
    ) -> None:
        worker = next(iter(queue._workers.values()))
        assert isinstance(worker, DeviceWorker)
        self._lanes = [worker._pipeline._lanes[name] for name in lanes]
        self._staged = staged
        for i, lane in enumerate(self._lanes):
            lane._indices.take = self._counted(i, lane._indices)  # type: ignore[method-assign]
        self.restart()

    def restart(self) -> None:
        self._turns = [0] * len(self._lanes)
        self._taken = [lane.streams._ring.num_taken for lane in self._lanes]

    def wraps(self) -> float:
        """Of the ring that was gone round least: of ids, and where all is staged, of buffers."""
        taken = [lane.streams._ring.num_taken for lane in self._lanes]
        buffers = [(now - then) / NUM_BUFFERS for now, then in zip(taken, self._taken, strict=True)]
        return min([*self._turns, *buffers] if self._staged else self._turns)

    def _counted(self, i: int, ring: IndexRing) -> Callable[..., list[torch.Tensor] | None]:
        take, last = ring.take, 0

        def counted(*parts: Ids) -> list[torch.Tensor] | None:
            nonlocal last
            tensors = take(*parts)
            if tensors is not None:
                begin = ring._taken[-1][0]
                self._turns[i] += begin <= last
                last = begin
            return tensors

        return counted


@contextmanager
def small_sizes() -> Iterator[None]:
    """What is of MiB elsewhere is of bytes: one chunk is short, of segments of three and more; and
    every load by layers has three bands."""
    with (
        patch.object(staged, "SHORT_BYTES", 1),
        patch.object(transfer_layers, "LEAST_BYTES", 1),
        patch.object(transfer_layers, "MOST_BANDS", 2),
    ):
        yield


def run_schedule(configuration: Configuration, seed: int) -> Facts:
    """One schedule in a world of its own; raises AssertionError with the trace."""
    return run_schedules(configuration, range(seed, seed + 1))[0]


def run_schedules(configuration: Configuration, seeds: range) -> list[Facts]:
    """A schedule for each seed, one after the other in one world (building it takes a third of a
    schedule's time). The same range replays them."""
    with SimulatedDevice(seeds[0]) as device, small_sizes():
        rng = random.Random(seeds[0])
        device.blocks_on_pageable = configuration.deferred
        memory = EngineMemory(device, configuration.shape, pinned=configuration.pinned)
        options = configuration.options(memory.layout.slot_bytes)
        queue = transfer_queue(memory.layout, memory.pool, options=options)
        lanes = rng.choice(LANES)
        made = LayeredEngine if configuration.layers else ServingEngine
        engine = made(memory, queue, rng, lanes)
        rings = Rings(queue, lanes, staged=configuration.paths is Path.STAGED)
        facts = []
        for seed in seeds:
            if seed != seeds[0]:
                device.reseed(seed)
                rng.seed(seed)
                rings.restart()
            steps = itertools.count(1)
            before = device.num_operations, sum(engine.num_jobs.values()), engine.num_crossings
            while (
                device.num_operations < before[0] + MIN_OPERATIONS
                or engine.num_crossings == before[2]
                or rings.wraps() < 2
            ):
                engine.step()
                assert next(steps) < MOST_STEPS, "the engine does not get on"
            facts.append(
                Facts(
                    device.num_operations - before[0],
                    sum(engine.num_jobs.values()) - before[1],
                    engine.num_crossings - before[2],
                    rings.wraps(),
                )
            )
            if seed == seeds[-1] and rng.random() < 0.3:
                break
            engine.settle()
            device.drain()
            memory.check_all()
            device.check()
        queue.shutdown()  # under load, where the last one broke off
        device.drain()
        memory.check_reads()
        device.check()
        assert device.num_blocked == 0 or not configuration.deferred
        assert not device.background_names
        assert len(device.streams) == 2
        return facts


if __name__ == "__main__":
    first = int(sys.argv[2])
    end = int(sys.argv[3]) if len(sys.argv) > 3 else first + 1
    for facts in run_schedules(CONFIGURATIONS[sys.argv[1]], range(first, end)):
        print(facts)
