"""What scenarios run on: a cache, a pool and a queue on a simulated device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from schedules import NUM_BUFFERS

from triton_offload.calibration import Path, PathTable
from triton_offload.specs import CPULoadStoreSpec, GPULoadStoreSpec, TransferResult
from triton_offload.testing import SimulatedDevice
from triton_offload.testing.engine import CacheShape, EngineMemory
from triton_offload.testing.schedule import Stream
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.transfer.queue_manager import transfer_queue

SMALL = CacheShape()


class Bench:
    """A cache, a pool and a queue on a simulated device."""

    def __init__(
        self,
        device: SimulatedDevice,
        seed: int,
        shape: CacheShape = SMALL,
        paths: Path | PathTable = Path.STAGED,
        *,
        max_indices: int = 1,
        window_chunks: int | None = None,
    ) -> None:
        self.device = device
        self.rng = random.Random(seed)
        self.memory = EngineMemory(device, shape)
        size = self.memory.layout.slot_bytes
        options = PipelineOptions(
            paths=paths if isinstance(paths, PathTable) else PathTable(paths),
            buffer_bytes=size,
            num_buffers=NUM_BUFFERS,
            max_indices=max_indices,
            window_bytes=window_chunks and window_chunks * size,
        )
        self.queue = transfer_queue(self.memory.layout, self.memory.pool, options=options)
        self._num_groups = len(self.memory.layout.groups)

    def fill(self) -> None:
        """Let the engine write every page."""
        for block in range(self.memory.shape.num_blocks):
            self.memory.write(0, [block], self.rng)

    def store(
        self, blocks: range, slots: range, *, group: int = 0, stream: Stream | None = None
    ) -> int:
        """Whole chunks, into fresh slots."""
        pages, chunks = np.array(blocks), np.array(slots)
        self.memory.model_store(group, pages, chunks, 0, np.ones(len(chunks), dtype=np.bool_))
        spec = CPULoadStoreSpec(chunks, True)
        return self.queue.transfer_async(self._pages(blocks, group), spec, stream=stream)

    def load(
        self,
        blocks: range,
        slots: range,
        *,
        expedited: bool = False,
        stream: Stream | None = None,
    ) -> int:
        self.memory.model_load(0, np.array(blocks), np.array(slots), 0)
        return self.queue.transfer_async(
            CPULoadStoreSpec(slots), self._pages(blocks, 0), expedited=expedited, stream=stream
        )

    def end(self, *job_ids: int) -> dict[int, TransferResult]:
        """Wait for these jobs; what was reported up to then."""
        self.queue.wait(job_ids)
        return {result.job_id: result for result in self.queue.get_finished()}

    def poll(self, job_id: int) -> TransferResult:
        """The job's result, as soon as it is reported, by a host that only asks."""
        for _ in range(2000):
            for result in self.queue.get_finished():
                if result.job_id == job_id:
                    return result
            self.device.sleep(0.001)
        raise AssertionError(f"job {job_id} was never reported")

    def _pages(self, blocks: range, group: int) -> GPULoadStoreSpec:
        sizes = [len(blocks) if g == group else 0 for g in range(self._num_groups)]
        return GPULoadStoreSpec(blocks, sizes, [0] * self._num_groups)


@contextmanager
def bench(seed: int, shape: CacheShape = SMALL, **options: object) -> Iterator[Bench]:
    """A bench whose pages are written, and on which everything is checked at the end."""
    with SimulatedDevice(seed) as device:
        made = Bench(device, seed, shape, **options)  # type: ignore[arg-type]
        made.fill()
        yield made
