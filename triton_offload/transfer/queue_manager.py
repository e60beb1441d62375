"""The queue manager: hands each job to the worker of its kind of transfer."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from triton_offload.calibration import Calibration, Path
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import (
    CPULoadStoreSpec,
    Direction,
    GPULoadStoreSpec,
    LoadStoreSpec,
    TransferResult,
)
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.pipeline import Pipeline, PipelineOptions
from triton_offload.transfer.worker import (
    DeviceWorker,
    FunctionWorker,
    OffloadingWorker,
    TransferFunction,
)


class OffloadingQueueManager:
    """Routes transfers by the types of their specs. Every method may be called from any thread.

    A job id is drawn here and belongs to one job for the manager's life.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._workers: dict[tuple[type, type], OffloadingWorker] = {}
        self._worker_of: dict[int, OffloadingWorker] = {}  # jobs not reported yet
        self._ended: list[TransferResult] = []  # got from a worker, not handed on yet
        self._closed = False

    def register_worker(
        self,
        src_cls: type[LoadStoreSpec],
        dst_cls: type[LoadStoreSpec],
        worker: OffloadingWorker | TransferFunction,
        num_threads: int = 1,
    ) -> None:
        """Let `worker` move jobs from `src_cls` to `dst_cls`.

        A function is called as `worker(src_spec, dst_spec)` by `num_threads` threads (see
        `FunctionWorker`). The manager shuts the worker down. Raises ValueError where that kind of
        transfer has a worker already.
        """
        kind = (src_cls, dst_cls)
        with self._lock:
            self._check_open()
            if kind in self._workers:
                raise ValueError(
                    f"worker: expected one for each kind of transfer, got a second for "
                    f"{src_cls.__name__} to {dst_cls.__name__}"
                )
            if not isinstance(worker, OffloadingWorker):
                worker = FunctionWorker(worker, num_threads)
            self._workers[kind] = worker

    def transfer_async(
        self,
        src_spec: LoadStoreSpec,
        dst_spec: LoadStoreSpec,
        *,
        expedited: bool = False,
        stream: Any = None,
    ) -> int:
        """Submit a job and return its id. Raises, with nothing queued, what is wrong with it."""
        with self._lock:
            self._check_open()
            worker = self._workers.get((type(src_spec), type(dst_spec)))
            if worker is None:
                raise ValueError(
                    f"src_spec, dst_spec: expected a kind of transfer with a registered worker, "
                    f"got {type(src_spec).__name__} to {type(dst_spec).__name__}"
                )
            job_id = next(self._ids)
            self._worker_of[job_id] = worker
        try:
            worker.transfer_async(job_id, src_spec, dst_spec, expedited=expedited, stream=stream)
        except BaseException:
            with self._lock:
                del self._worker_of[job_id]
            raise
        return job_id

    def get_finished(self) -> list[TransferResult]:
        """What ended since the last call: every accepted job once. Empty after `shutdown`."""
        with self._lock:
            if self._closed:
                return []
            workers = list(self._workers.values())
        for worker in workers:
            ended = worker.get_finished()
            with self._lock:  # at once: where the next worker raises, these are for the next call
                self._ended += ended
        with self._lock:
            results, self._ended = self._ended, []
            for result in results:
                self._worker_of.pop(result.job_id, None)
        return results

    def wait(self, job_ids: Iterable[int], timeout: float | None = None) -> None:
        """Block until these jobs have ended. Ids that are unknown or reported are ignored.

        Results stay to be got. Raises TimeoutError, never returns early.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for worker, ids in self._by_worker(job_ids):
            worker.wait(ids, None if deadline is None else max(0.0, deadline - time.monotonic()))

    def cancel(self, job_ids: Iterable[int]) -> set[int]:
        """Take back the jobs that have not started and return their ids; they are reported as
        cancelled."""
        taken: set[int] = set()
        for worker, ids in self._by_worker(job_ids):
            taken |= worker.cancel(ids)
        return taken

    def cancel_together(self, job_ids: Iterable[int]) -> bool:
        """Take back all of these jobs of one worker, or none where one of them has started.

        Raises ValueError for jobs of several workers.
        """
        groups = self._by_worker(job_ids)
        if len(groups) > 1:
            raise ValueError(f"job_ids: expected jobs of one worker, got {len(groups)} workers'")
        return all(worker.cancel_together(ids) for worker, ids in groups)

    def source_released(self, job_id: int) -> bool:
        """Whether the engine may use the job's pages again."""
        return all(
            worker.source_released(job_id)
            for worker, _ in self._by_worker([job_id])
            if isinstance(worker, DeviceWorker)
        )

    def wait_on(self, job_id: int, stream: Any) -> None:
        """Let `stream` follow the release of the job's pages, without the host."""
        for worker, _ in self._by_worker([job_id]):
            if isinstance(worker, DeviceWorker):
                worker.wait_on(job_id, stream)

    def shutdown(self, timeout: float | None = None) -> None:
        """Cancel what has not started, drain the rest, join every thread. Idempotent.

        Results that nobody got are gone. Raises TimeoutError where a device does not finish. What
        one worker raises is raised when the others are shut down too.
        """
        with self._lock:
            self._closed = True
            workers = list(self._workers.values())
        deadline = None if timeout is None else time.monotonic() + timeout

        def shut_down(worker: OffloadingWorker) -> None:
            worker.shutdown(None if deadline is None else max(0.0, deadline - time.monotonic()))

        with ExitStack() as rest:
            for worker in reversed(workers):
                rest.callback(shut_down, worker)

    def _by_worker(self, job_ids: Iterable[int]) -> list[tuple[OffloadingWorker, list[int]]]:
        with self._lock:
            groups: dict[OffloadingWorker, list[int]] = {}
            for job_id in job_ids:
                worker = self._worker_of.get(job_id)
                if worker is not None:
                    groups.setdefault(worker, []).append(job_id)
            return list(groups.items())

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the queue manager is shut down")

    def _check(self) -> None:
        """Asserts that each device worker knows exactly the jobs that were handed to it."""
        with self._lock:
            owners = dict(self._worker_of)
            workers = list(self._workers.values())
        for worker in workers:
            if isinstance(worker, DeviceWorker):
                worker._check()
                assert worker._jobs.keys() == {i for i, owner in owners.items() if owner is worker}


def transfer_queue(
    layout: CacheLayout,
    pool: HostPool,
    path: str = "auto",
    options: PipelineOptions | None = None,
    calibration: Calibration | None = None,
) -> OffloadingQueueManager:
    """A queue manager that stores from and loads into `layout`, with `pool` on the host side.

    `path`: "staged", "zero_copy", "copy_engine", or "auto" for the rule. `zero_copy` needs a
    pinned pool; until that is so, segments are staged. `calibration`: the rule, and the size of
    staging buffers, where `options` does not give them; None: published figures.
    """
    names = [choice.value for choice in Path]
    if path != "auto" and path not in names:
        raise ValueError(f"path: expected one of {['auto', *names]}, got {path!r}")
    if options is None:
        options = PipelineOptions(path=None if path == "auto" else Path(path))
        if calibration is not None:
            options = replace(options, buffer_bytes=calibration.buffer_bytes)
    elif path != "auto":
        raise ValueError("path: expected it in `options` where they are given")
    if calibration is not None and options.paths is None:
        options = replace(options, paths=calibration.paths)
    pipeline = Pipeline(layout, pool, options)
    manager = OffloadingQueueManager()
    store, load = DeviceWorker(pipeline, Direction.STORE), DeviceWorker(pipeline, Direction.LOAD)
    manager.register_worker(GPULoadStoreSpec, CPULoadStoreSpec, store)
    manager.register_worker(CPULoadStoreSpec, GPULoadStoreSpec, load)
    return manager
