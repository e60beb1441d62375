"""The worker of a device: stores or loads, over a pipeline."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from triton_offload.calibration import Path
from triton_offload.specs import (
    CPULoadStoreSpec,
    Direction,
    GPULoadStoreSpec,
    Ids,
    LoadStoreSpec,
    TransferResult,
)
from triton_offload.transfer.job import Job
from triton_offload.transfer.layers import Layers
from triton_offload.transfer.pipeline import Pipeline
from triton_offload.transfer.worker import OffloadingWorker, check_new


class DeviceWorker(OffloadingWorker):
    """Stores or loads, over a pipeline that the worker of the other direction shares."""

    def __init__(self, pipeline: Pipeline, direction: Direction) -> None:
        self._pipeline = pipeline
        self._direction = direction
        self._lock = threading.Lock()
        self._jobs: dict[int, Job] = {}  # not reported yet

    def transfer_async(
        self,
        job_id: int,
        src: LoadStoreSpec,
        dst: LoadStoreSpec,
        *,
        expedited: bool = False,
        stream: Any = None,
        layers: Layers | None = None,
    ) -> None:
        device_spec, host_spec = (src, dst) if self._direction is Direction.STORE else (dst, src)
        if not isinstance(device_spec, GPULoadStoreSpec):
            raise TypeError(f"expected a GPULoadStoreSpec, got {type(device_spec).__name__}")
        if not isinstance(host_spec, CPULoadStoreSpec):
            raise TypeError(f"expected a CPULoadStoreSpec, got {type(host_spec).__name__}")
        with self._lock:  # a job that ends at once must not be looked for before it is noted
            check_new(job_id, self._jobs)
            self._jobs[job_id] = self._pipeline.submit(
                job_id,
                self._direction,
                device_spec,
                host_spec,
                expedited=expedited,
                stream=stream,
                layers=layers,
            )

    @property
    def broken_paths(self) -> frozenset[Path]:
        """The paths that could not be queued, for which others stand in; none after `shutdown`."""
        return self._pipeline.all_broken_paths

    def get_finished(self) -> list[TransferResult]:
        if not self._jobs:  # the pipeline's other worker asks for its own
            return []
        with self._lock:
            results = []
            for job in self._pipeline.take_finished(self._direction):
                assert job.result is not None
                # Where submitting it was interrupted, its caller knows of no job.
                if self._jobs.pop(job.job_id, None) is not None:
                    results.append(job.result)
            return results

    def wait(self, job_ids: Iterable[int], timeout: float | None = None) -> None:
        now = self._pipeline.monotonic
        deadline = None if timeout is None else now() + timeout
        for job in self._known(job_ids):
            left = None if deadline is None else max(0.0, deadline - now())
            self._pipeline.wait(job, left)

    def wait_for_slots(self, slot_ids: Ids, *, writing: bool) -> None:
        """Block until the jobs submitted so far that write these slots of the pool have ended,
        and where `writing` those that read them too."""
        self._pipeline.wait_for_slots(slot_ids, writing=writing)

    def cancel(self, job_ids: Iterable[int]) -> set[int]:
        return {job.job_id for job in self._known(job_ids) if self._pipeline.cancel(job)}

    def cancel_together(self, job_ids: Iterable[int]) -> bool:
        ids = list(job_ids)
        jobs = self._known(ids)
        return len(jobs) == len(ids) and self._pipeline.cancel_all(jobs)

    def source_released(self, job_id: int) -> bool:
        """Whether the engine may use the job's pages again (a reported job's: yes)."""
        return all(self._pipeline.released(job) for job in self._known([job_id]))

    def wait_on(self, job_id: int, stream: Any, layer: int | None = None) -> None:
        """Let a stream follow the release of the job's pages, or of a layer's, without the host."""
        for job in self._known([job_id], layer):
            self._pipeline.wait_on(job, stream, layer=layer)

    def wait_for_layer(self, job_id: int, layer: int, timeout: float | None = None) -> None:
        """Block until the release of a layer's pages; raises TimeoutError."""
        for job in self._known([job_id], layer):
            self._pipeline.wait_for_layer(job, layer, timeout)

    def shutdown(self, timeout: float | None = None) -> None:
        self._pipeline.shutdown(timeout)

    def _check(self) -> None:
        """Asserts that exactly those jobs are known that were not reported."""
        pipeline = self._pipeline
        with self._lock, pipeline._lock:
            pipeline._check()
            jobs = [*pipeline._jobs.of(), *pipeline._finished[self._direction]]
            known = {job.job_id for job in jobs if job.direction is self._direction}
            assert self._jobs.keys() == known

    def _known(self, job_ids: Iterable[int], layer: int | None = None) -> list[Job]:
        ids = list(job_ids)
        with self._lock:
            jobs = [self._jobs[job_id] for job_id in ids if job_id in self._jobs]
        if layer is not None:
            for job in jobs:
                count = len(job.run_of_layer)
                if not 0 <= layer < count:
                    raise ValueError(
                        f"layer: expected one of {count} of job {job.job_id}, got {layer}"
                    )
        return jobs
