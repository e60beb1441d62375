"""Times real transfers on this machine: a cache, a pool, and pipelines between them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch

from triton_offload.calibration import Path
from triton_offload.closing import Closing
from triton_offload.device import Device
from triton_offload.device.base import Stream
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.paths.table import CROSSINGS
from triton_offload.transfer.pipeline import Pipeline, PipelineOptions

RIG_BYTES = 64 << 20  # 1.2 ms of a Gen5 x16 link: several segments, and more than caches hold
_TENSORS = 8
_REPEATS = 9
_TIMEOUT_SECONDS = 60.0

Name = TypeVar("Name")


def _typical(seconds: list[float]) -> float:
    """The lower quartile. What slows a turn down is other work on the machine: under load the
    choices that followed came back in 16 of 22 cases, of medians in 12, of the fastest in 14."""
    return sorted(seconds)[len(seconds) // 4]


class Rig:
    """A cache of pages of one size and a pool beside it, between which jobs are timed.

    Takes `num_bytes` on the device and on the host, and the staging buffers of each pipeline until
    `end_pipelines`: those of one direction, for which alone a pipeline is.
    Blocks are at random and slots in order: as an engine's cache has them after a while, and as
    the manager hands them out. Raises MemoryError, OSError or RuntimeError where memory is out.
    """

    def __init__(self, device: Device, page_bytes: int, num_bytes: int = RIG_BYTES) -> None:
        blocks = num_bytes // (page_bytes * _TENSORS)
        if blocks < 1:
            raise ValueError(
                f"num_bytes: expected at least {_TENSORS} pages of {page_bytes}, got {num_bytes}"
            )
        self.num_pages = blocks * _TENSORS
        self.num_bytes = self.num_pages * page_bytes
        self._device = device
        self._ids = itertools.count(1)
        self._random = np.random.default_rng(0)
        self._resources, self._pipelines = Closing(), Closing()
        # Other threads write what is made here, which inference mode would forbid them.
        with ExitStack() as undo, torch.inference_mode(False):
            undo.callback(self.close)
            self._cache = device.empty(self.num_bytes)
            self._cache.fill_(1)  # memory that was never written is not there yet
            self._layout = CacheLayout(list(self._cache.view(_TENSORS, blocks, page_bytes)))
            self.pool = HostPool.allocate(device, blocks, self._layout.slot_bytes)
            self._resources.callback(self.pool.close)
            self.pool.wait_ready(_TIMEOUT_SECONDS)
            undo.pop_all()

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every pipeline and unpin the pool. A later call tries again what raised."""
        with ExitStack() as rest:
            rest.callback(self._resources.close)
            self.end_pipelines()

    def end_pipelines(self) -> None:
        """End those that were made so far, and free what they took."""
        self._pipelines.close()

    def pipeline(
        self, direction: Direction, options: PipelineOptions, device: Device | None = None
    ) -> Pipeline:
        """A pipeline for jobs of the direction. `device`: the same card with other launches."""
        pool = self.pool
        if device is not None:
            pool = HostPool.from_tensor(device, pool.slots, pinned=pool.pinned)
        with torch.inference_mode(False):
            pipeline = Pipeline(self._layout, pool, options, (direction.value,))
        self._pipelines.callback(pipeline.shutdown, _TIMEOUT_SECONDS)
        return pipeline

    def takes(self, path: Path) -> bool:
        """Whether pipelines here take the path, if told to."""
        device, crossing = self._device, CROSSINGS[path]
        reaches_pool = device.maps_host_memory and self.pool.pinned
        mapped = reaches_pool or crossing.where_unmapped is None
        return mapped and (device.batches_copies or crossing.where_unbatched is None)

    def pipelines(self, direction: Direction, buffer_bytes: int) -> dict[Path, Pipeline]:
        """One for each path that they take."""
        return {
            path: self.pipeline(direction, PipelineOptions(path=path, buffer_bytes=buffer_bytes))
            for path in Path
            if self.takes(path)
        }

    def seconds(
        self, pipelines: Mapping[Name, Pipeline], direction: Direction, pages: int
    ) -> dict[Name, float]:
        """How long a job of `pages` pages takes in each, by the clock of the device: from where its
        first operation is queued to its end.

        A pipeline that failed, or took another path than it was told to, is left out.
        """
        took: dict[Name, list[float]] = {name: [] for name in pipelines}
        for turn in range(1 + _REPEATS):  # in turns: what drifts, drifts for all
            for name, pipeline in pipelines.items():
                seconds = self._job(pipeline, direction, pages)
                if turn and seconds is not None:  # the first turn warms up
                    took[name].append(seconds)
        return {name: _typical(times) for name, times in took.items() if len(times) == _REPEATS}

    def plain_copy(self, direction: Direction) -> float:
        """Seconds that one copy of the whole cache takes, the least for any path."""
        with self._stream() as stream:
            times = []
            for _ in range(1 + _REPEATS):
                start, end = (self._device.new_event(timed=True) for _ in range(2))
                self._device.record(start, stream)
                self._copy(direction, stream)
                self._device.record(end, stream)
                self._device.synchronize(end, None)
                times.append(self._device.elapsed(start, end))
        return _typical(times[1:])

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Keep the link busy for 0.15 s (Gen5 x16) and more, for what can be seen only then."""
        with self._stream() as stream:
            for _ in range(128):
                self._copy(Direction.LOAD, stream)
            yield

    @contextmanager
    def _stream(self) -> Iterator[Stream]:
        stream = self._device.new_stream("triton-offload-rig")
        try:
            yield stream
        finally:
            self._device.close_stream(stream)

    def _copy(self, direction: Direction, stream: Stream) -> None:
        host = self.pool.slots.view(-1)
        if direction is Direction.STORE:
            self._device.copy(host, self._cache, stream)
        else:
            self._device.copy(self._cache, host, stream)

    def _job(self, pipeline: Pipeline, direction: Direction, pages: int) -> float | None:
        blocks = pages // _TENSORS
        device_spec = GPULoadStoreSpec(self._random.permutation(self.pool.num_slots)[:blocks])
        host_spec = CPULoadStoreSpec(np.arange(blocks), fresh=True)
        job = pipeline.submit(next(self._ids), direction, device_spec, host_spec)
        pipeline.wait(job)  # with a timeout it would poll, and the job end when that is over
        pipeline.take_finished(direction)
        assert job.result is not None
        return job.result.seconds if job.result.seconds and not pipeline.broken_paths(job) else None
