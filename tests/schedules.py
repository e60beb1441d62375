"""Random schedules of the whole worker side on the simulated device, each from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from triton_offload.calibration import Path, PathRule, PathTable
from triton_offload.pipeline import PipelineOptions
from triton_offload.queue_manager import OffloadingQueueManager, transfer_queue
from triton_offload.specs import Direction, Ids
from triton_offload.staging import IndexRing
from triton_offload.testing import SimulatedDevice
from triton_offload.testing.engine import CacheShape, EngineMemory
from triton_offload.testing.serving import ServingEngine
from triton_offload.worker import DeviceWorker

MIN_OPERATIONS = 100
NUM_BUFFERS = 2
LANES = (("store", "load"), ("store", "expedited"), ("store", "load", "expedited"))

# Sizes that no alignment likes, pages apart, and slots apart.
ODD = CacheShape(tensors=((13, 13), (7, 9), (2, 2)), blocks_per_chunk=3, row_gap=5)
# Three groups over the same tensors: one of all, one of a few bytes, one with padded pages.
HYBRID = CacheShape(
    tensors=((16, 16), (8, 12), (24, 24)),
    groups=(((0, 16), (1, 8), (2, 24)), ((1, 8),), ((0, 9), (2, 20))),
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


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a schedule runs on. `paths`: one for all segments, or a table that mixes them."""

    shape: CacheShape
    paths: Path | PathTable
    window_chunks: int | None = None
    max_queued: int = 1024

    def options(self, slot_bytes: int) -> PipelineOptions:
        fixed = isinstance(self.paths, Path)
        return PipelineOptions(
            path=self.paths if isinstance(self.paths, Path) else None,
            paths=None if fixed else self.paths,
            buffer_bytes=slot_bytes,
            num_buffers=NUM_BUFFERS,
            max_indices=1,  # the least that it takes
            window_bytes=self.window_chunks and self.window_chunks * slot_bytes,
        )


CONFIGURATIONS = {
    "staged": Configuration(CacheShape(), Path.STAGED),
    "staged, odd sizes": Configuration(ODD, Path.STAGED),
    "staged, hybrid": Configuration(HYBRID, Path.STAGED),
    "staged, window": Configuration(SINGLE, Path.STAGED, window_chunks=2),
    "zero copy, hybrid": Configuration(HYBRID, Path.ZERO_COPY),
    "zero copy, odd sizes": Configuration(ODD, Path.ZERO_COPY),
    "copy engine, hybrid": Configuration(HYBRID, Path.COPY_ENGINE),
    "copy engine": Configuration(CacheShape(), Path.COPY_ENGINE),
    "mixed paths": Configuration(CacheShape(), MIXED_PATHS),
    "mixed paths, hybrid": Configuration(HYBRID, MIXED_PATHS),
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a schedule did. `wraps`: how often the ring that was wrapped least was."""

    operations: int
    jobs: int
    crossings: int
    wraps: float


class Rings:
    """How often the rings of some lanes have handed out memory again from their beginning."""

    def __init__(self, queue: OffloadingQueueManager, lanes: Sequence[str]) -> None:
        worker = next(iter(queue._workers.values()))
        assert isinstance(worker, DeviceWorker)
        self._lanes = [worker._pipeline._lanes[name] for name in lanes]
        self._turns = [0] * len(lanes)
        for i, lane in enumerate(self._lanes):
            lane._indices.take = self._counted(i, lane._indices)  # type: ignore[method-assign]

    def wraps(self, *, staged: bool) -> float:
        """Of the ring that was gone round least: of ids, and where all is staged, of buffers."""
        buffers = [lane.paths._ring.num_taken / NUM_BUFFERS for lane in self._lanes]
        return min([*self._turns, *buffers] if staged else self._turns)

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


def run_schedule(configuration: Configuration, seed: int) -> Facts:
    """Drive an engine until the schedule is long enough; raises AssertionError with the trace."""
    with SimulatedDevice(seed, max_queued=configuration.max_queued) as device:
        rng = random.Random(seed)
        memory = EngineMemory(device, configuration.shape)
        options = configuration.options(memory.layout.slot_bytes)
        queue = transfer_queue(memory.layout, memory.pool, options=options)
        lanes = rng.choice(LANES)
        engine = ServingEngine(memory, queue, rng, lanes)
        rings = Rings(queue, lanes)
        staged = configuration.paths is Path.STAGED
        while (
            device.num_operations < MIN_OPERATIONS
            or not engine.num_crossings
            or rings.wraps(staged=staged) < 2
        ):
            engine.step()
        if rng.random() < 0.3:
            queue.shutdown()  # under load
            device.drain()
            memory.check_reads()
        else:
            engine.settle()
            device.drain()
            memory.check_all()
            queue.shutdown()
        device.check()
        assert not device.background_names
        assert len(device.streams) == 2
        return Facts(
            device.num_operations,
            sum(engine.num_jobs.values()),
            engine.num_crossings,
            rings.wraps(staged=staged),
        )
