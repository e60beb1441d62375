"""A pipeline alone, on any device, between a small cache and a pool."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch

from triton_offload.device.base import Device
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec
from triton_offload.transfer.job import Job
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.pipeline import Pipeline, PipelineOptions

NUM_BLOCKS = 32


@dataclass
class PipelineWorld:
    """`tensors[i]`: uint8 [NUM_BLOCKS, page]; as many slots of the pool as blocks."""

    device: Device
    tensors: list[torch.Tensor]
    layout: CacheLayout
    pool: HostPool
    pipeline: Pipeline
    _ids: itertools.count[int] = field(default_factory=itertools.count)

    @classmethod
    def build(
        cls,
        device: Device,
        *,
        pages: tuple[int, ...] = (64,),
        groups: list[list[tuple[int, int]]] | None = None,
        blocks_per_chunk: int = 1,
        **options: Any,
    ) -> PipelineWorld:
        options.setdefault("buffer_bytes", 1 << 10)
        options.setdefault("max_indices", 1 << 10)
        tensors = []
        for i, page in enumerate(pages):
            tensor = device.empty(NUM_BLOCKS * page).view(NUM_BLOCKS, page)
            fill(tensor, i)
            tensors.append(tensor)
        layout = CacheLayout(tensors, blocks_per_chunk, groups)
        pool = HostPool.allocate(device, NUM_BLOCKS, layout.slot_bytes)
        pool.wait_ready(60)
        pipeline = Pipeline(layout, pool, PipelineOptions(**options))
        return cls(device, tensors, layout, pool, pipeline)

    def store(self, blocks: range, slots: range, *, group: int = 0, **kwargs: Any) -> Job:
        """Whole chunks, into fresh slots."""
        spec = CPULoadStoreSpec(slots, True)
        return self._submit(Direction.STORE, self.pages(blocks, group), spec, **kwargs)

    def load(self, blocks: range, slots: range, *, group: int = 0, **kwargs: Any) -> Job:
        spec = CPULoadStoreSpec(slots)
        return self._submit(Direction.LOAD, self.pages(blocks, group), spec, **kwargs)

    def pages(self, blocks: range, group: int) -> GPULoadStoreSpec:
        count = len(self.layout.groups)
        sizes = [len(blocks) if g == group else 0 for g in range(count)]
        return GPULoadStoreSpec(blocks, sizes, [0] * count)

    def finish(self, *jobs: Job) -> None:
        for job in jobs:
            self.pipeline.wait(job, 60)

    def reported(self) -> list[int]:
        """Ids of the jobs that ended since the last call: stores first."""
        return [
            job.job_id for direction in Direction for job in self.pipeline.take_finished(direction)
        ]

    def close(self) -> None:
        self.pipeline.shutdown(60)
        self.pool.close()

    def _submit(self, direction: Direction, pages: Any, slots: Any, **kwargs: Any) -> Job:
        return self.pipeline.submit(next(self._ids), direction, pages, slots, **kwargs)


def fill(tensor: torch.Tensor, seed: int) -> None:
    options = {"generator": torch.Generator(device="cpu").manual_seed(seed), "device": "cpu"}
    tensor.copy_(torch.randint(0, 256, tensor.shape, dtype=torch.uint8, **options))
