"""Workers: what moves the jobs of one kind of transfer."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from typing import Any

from triton_offload.specs import (
    CPULoadStoreSpec,
    Direction,
    GPULoadStoreSpec,
    LoadStoreSpec,
    TransferResult,
    TransferStatus,
)
from triton_offload.transfer.lane import Job
from triton_offload.transfer.pipeline import Pipeline


class OffloadingWorker(ABC):
    """Moves jobs from one kind of spec to another. Every method may be called from any thread."""

    @abstractmethod
    def transfer_async(
        self,
        job_id: int,
        src: LoadStoreSpec,
        dst: LoadStoreSpec,
        *,
        expedited: bool = False,
        stream: Any = None,
    ) -> None:
        """Accept a job and return; raises, with nothing queued, what is wrong with it.

        `expedited`: not to queue behind ordinary jobs. `stream`: see `Pipeline.submit`.
        """

    @abstractmethod
    def get_finished(self) -> list[TransferResult]:
        """The jobs that ended since the last call: every accepted job once, however it ended."""

    @abstractmethod
    def wait(self, job_ids: Iterable[int], timeout: float | None = None) -> None:
        """Block until these jobs have ended; ids that the worker does not know are ignored.

        Their results stay to be got. Raises TimeoutError.
        """

    @abstractmethod
    def cancel(self, job_ids: Iterable[int]) -> set[int]:
        """Take back those that have not started, and return their ids."""

    def cancel_together(self, job_ids: Iterable[int]) -> bool:
        """Take back all of these or none; False where one has started. Only jobs that are not
        reported yet. A worker that can't promise that takes back none of several."""
        ids = list(job_ids)
        return len(ids) < 2 and len(self.cancel(ids)) == len(ids)

    @abstractmethod
    def shutdown(self, timeout: float | None = None) -> None:
        """Refuse new jobs, cancel what has not started, drain the rest. Idempotent."""


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
    ) -> None:
        device_spec, host_spec = (src, dst) if self._direction is Direction.STORE else (dst, src)
        if not isinstance(device_spec, GPULoadStoreSpec):
            raise TypeError(f"expected a GPULoadStoreSpec, got {type(device_spec).__name__}")
        if not isinstance(host_spec, CPULoadStoreSpec):
            raise TypeError(f"expected a CPULoadStoreSpec, got {type(host_spec).__name__}")
        with self._lock:  # a job that ends at once must not be looked for before it is noted
            self._jobs[job_id] = self._pipeline.submit(
                job_id,
                self._direction,
                device_spec,
                host_spec,
                expedited=expedited,
                stream=stream,
            )

    def get_finished(self) -> list[TransferResult]:
        with self._lock:
            results = []
            for job in self._pipeline.take_finished(self._direction):
                assert job.result is not None
                results.append(job.result)
                del self._jobs[job.job_id]
            return results

    def wait(self, job_ids: Iterable[int], timeout: float | None = None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        for job in self._known(job_ids):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._pipeline.wait(job, left)

    def cancel(self, job_ids: Iterable[int]) -> set[int]:
        return {job.job_id for job in self._known(job_ids) if self._pipeline.cancel(job)}

    def cancel_together(self, job_ids: Iterable[int]) -> bool:
        return self._pipeline.cancel_all(self._known(job_ids))

    def source_released(self, job_id: int) -> bool:
        """Whether the engine may use the job's pages again (a reported job's: yes)."""
        return all(self._pipeline.released(job) for job in self._known([job_id]))

    def wait_on(self, job_id: int, stream: Any) -> None:
        """Let a stream follow the release of the job's pages, without the host."""
        for job in self._known([job_id]):
            self._pipeline.wait_on(job, stream)

    def shutdown(self, timeout: float | None = None) -> None:
        self._pipeline.shutdown(timeout)

    def _check(self) -> None:
        """Asserts that exactly those jobs are known that were not reported."""
        pipeline = self._pipeline
        with self._lock, pipeline._lock:
            pipeline._check()
            jobs = [*pipeline._unfinished(), *pipeline._finished[self._direction]]
            known = {job.job_id for job in jobs if job.direction is self._direction}
            assert self._jobs.keys() == known

    def _known(self, job_ids: Iterable[int]) -> list[Job]:
        with self._lock:
            return [self._jobs[job_id] for job_id in job_ids if job_id in self._jobs]


TransferFunction = Callable[[Any, Any], int | None]


class FunctionWorker(OffloadingWorker):
    """Runs `function(src_spec, dst_spec)` on threads: how a medium of your own is added.

    The function moves the bytes and returns how many; what it raises ends its job as failed, with
    the exception in the result, and the thread goes on.
    """

    def __init__(self, function: TransferFunction, num_threads: int = 1) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads: expected at least 1, got {num_threads}")
        self._function = function
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="triton-offload-fn")
        self._lock = threading.Lock()
        self._futures: dict[int, Future[TransferResult]] = {}
        self._closed = False

    def transfer_async(
        self,
        job_id: int,
        src: LoadStoreSpec,
        dst: LoadStoreSpec,
        *,
        expedited: bool = False,
        stream: Any = None,
    ) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("the worker is shut down")
            self._futures[job_id] = self._threads.submit(self._run, job_id, src, dst)

    def get_finished(self) -> list[TransferResult]:
        with self._lock:
            done = [job_id for job_id, future in self._futures.items() if future.done()]
            return [_result(job_id, self._futures.pop(job_id)) for job_id in done]

    def wait(self, job_ids: Iterable[int], timeout: float | None = None) -> None:
        with self._lock:
            futures = [self._futures[job_id] for job_id in job_ids if job_id in self._futures]
        if wait_for_futures(futures, timeout).not_done:
            raise TimeoutError(f"the jobs were not done within {timeout} s")

    def cancel(self, job_ids: Iterable[int]) -> set[int]:
        with self._lock:
            known = [job_id for job_id in job_ids if job_id in self._futures]
            return {job_id for job_id in known if self._futures[job_id].cancel()}

    def shutdown(self, timeout: float | None = None) -> None:
        with self._lock:
            self._closed = True
            futures = list(self._futures.values())
        self._threads.shutdown(wait=False, cancel_futures=True)
        if wait_for_futures(futures, timeout).not_done:
            raise TimeoutError(f"functions still run after {timeout} s")
        self._threads.shutdown(wait=True)

    def _run(self, job_id: int, src: LoadStoreSpec, dst: LoadStoreSpec) -> TransferResult:
        with self._lock:
            # A pool that could not start a thread raised, and kept what it was given.
            if job_id not in self._futures:
                return TransferResult(job_id, TransferStatus.CANCELLED)
        start = time.perf_counter()
        try:
            num_bytes = self._function(src, dst) or 0
        except BaseException as error:  # the job's, not the thread's
            return TransferResult(job_id, TransferStatus.FAILED, error=error)
        seconds = time.perf_counter() - start
        return TransferResult(job_id, TransferStatus.SUCCESS, num_bytes, seconds)


def _result(job_id: int, future: Future[TransferResult]) -> TransferResult:
    if future.cancelled():
        return TransferResult(job_id, TransferStatus.CANCELLED)
    return future.result()
