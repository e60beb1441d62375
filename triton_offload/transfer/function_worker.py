"""The worker of a medium of your own: a function, on threads."""

from __future__ import annotations

import inspect
import operator
import reprlib
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import numpy as np

from triton_offload.specs import LoadStoreSpec, TransferResult, TransferStatus
from triton_offload.transfer.slot_order import SlotOrder, Turn
from triton_offload.transfer.worker import (
    OffloadingWorker,
    check_new,
    deadline_after,
    seconds_until,
)

TransferFunction = Callable[[Any, Any], int | bool | None]


@dataclass(slots=True, eq=False)
class _FunctionJob:
    job_id: int
    src: LoadStoreSpec
    dst: LoadStoreSpec
    turn: Turn
    started: bool = False
    thread: int = 0  # that runs it
    ended: threading.Event = field(default_factory=threading.Event)


class FunctionWorker(OffloadingWorker):
    """Runs `function(src_spec, dst_spec)` on threads: how a medium of your own is added.

    The function moves the bytes and returns how many. True and None are a success of which nobody
    counted the bytes; False is a failure. Anything else that it returns, and what it raises, ends
    its job as failed, with the exception in the result, and the thread goes on. A function must not
    shut its own worker down, nor wait for its own job.

    Jobs start in the order of their submission, up to `num_threads` at a time. Of those that use
    the same slots of the pool (CPULoadStoreSpec, on either side) in one queue manager:

    * A function that reads slots starts when the jobs submitted before it that write any of them
      have ended; one that writes slots, when those have ended that read them, too. That holds for
      jobs of the device and of functions. It is order and no more: whether the bytes are good that
      an earlier job was to leave there, that job's result says.
    * A device's job is refused (RuntimeError, nothing queued) while a function's job that has not
      ended writes one of its slots, or, if it is a store, reads one. Wait for that job first: the
      streams of a device do not stand still for a function.

    Pages (GPULoadStoreSpec) have no such order: a function that touches them waits for the engine
    itself, and the pages are its own until its job has ended. Nor have jobs that a worker of
    another class moves.
    """

    def __init__(self, function: TransferFunction, num_threads: int = 1) -> None:
        check_function("function", function)
        self._function = function
        self._threads = ThreadPoolExecutor(
            check_num_threads(num_threads), thread_name_prefix="triton-offload-fn"
        )
        self._order, self._shares = SlotOrder(), False
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._busy: set[int] = set()  # threads that have a job
        self._jobs: dict[int, _FunctionJob] = {}  # not ended yet
        self._ended: list[TransferResult] = []  # not reported yet
        self._closed = False

    def share_order(self, order: SlotOrder) -> None:
        """Keep the order of slots together with all who share it, from the next job on."""
        with self._lock:
            if self._shares and order is not self._order:
                raise ValueError("worker: expected one that no other queue manager has")
            self._order, self._shares = order, True

    def transfer_async(
        self,
        job_id: int,
        src: LoadStoreSpec,
        dst: LoadStoreSpec,
        *,
        expedited: bool = False,
        stream: Any = None,
    ) -> None:
        with self._lock:  # threads take jobs up in the order in which they entered
            if self._closed:
                raise RuntimeError("the worker is shut down")
            check_new(job_id, self._jobs)
            job = _FunctionJob(job_id, src, dst, self._order.enter(job_id, src, dst))
            self._jobs[job_id] = job
            try:
                self._threads.submit(self._run, job)
            except BaseException:
                # A pool that could not start a thread keeps what it was given: `_run` passes by.
                del self._jobs[job_id]
                job.turn.leave()
                raise

    def get_finished(self) -> list[TransferResult]:
        with self._lock:
            results, self._ended = self._ended, []
            return results

    def wait(self, job_ids: Iterable[int], timeout: float | None = None) -> None:
        deadline = deadline_after(timeout)
        ids = list(job_ids)
        with self._lock:
            jobs = [self._jobs[job_id] for job_id in ids if job_id in self._jobs]
        for job in jobs:
            if job.thread == threading.get_ident():
                raise RuntimeError(f"job {job.job_id}: a function can't wait for its own job")
            if not job.ended.wait(seconds_until(deadline)):
                raise TimeoutError(f"job {job.job_id} was not done within {timeout} s")

    def cancel(self, job_ids: Iterable[int]) -> set[int]:
        ids = list(job_ids)
        with self._lock:
            return {job_id for job_id in ids if self._cancel(job_id)}

    def shutdown(self, timeout: float | None = None) -> None:
        with self._lock:
            if threading.get_ident() in self._busy:
                raise RuntimeError("the worker can't be shut down by its own function")
            self._closed = True
            for job_id in list(self._jobs):
                self._cancel(job_id)
        self._threads.shutdown(wait=False, cancel_futures=True)
        left = seconds_until(deadline_after(timeout))
        with self._idle:
            if not self._idle.wait_for(lambda: not self._busy, left):
                raise TimeoutError(f"functions still run after {timeout} s")
        self._threads.shutdown(wait=True)

    def _run(self, job: _FunctionJob) -> None:
        """On a thread of the pool; raises nothing."""
        thread = threading.get_ident()
        with self._lock:
            self._busy.add(thread)
        result = self._call(job)
        with self._lock:
            if self._jobs.get(job.job_id) is job:
                self._end(job, result)
            self._busy.discard(thread)
            self._idle.notify_all()

    def _call(self, job: _FunctionJob) -> TransferResult:
        try:
            job.turn.wait()
            with self._lock:  # it may have been cancelled, or refused for want of a thread
                job.started = self._jobs.get(job.job_id) is job
                job.thread = threading.get_ident()
            if not job.started:
                return TransferResult(job.job_id, TransferStatus.CANCELLED)
            start = time.perf_counter()
            num_bytes = bytes_moved(self._function(job.src, job.dst))
            seconds = time.perf_counter() - start
            return TransferResult(job.job_id, TransferStatus.SUCCESS, num_bytes, seconds)
        except BaseException as error:  # the job's, not the thread's
            return TransferResult(job.job_id, TransferStatus.FAILED, error=error)

    # -- under the lock --

    def _cancel(self, job_id: int) -> bool:
        job = self._jobs.get(job_id)
        if job is None or job.started:
            return False
        self._end(job, TransferResult(job_id, TransferStatus.CANCELLED))
        return True

    def _end(self, job: _FunctionJob, result: TransferResult) -> None:
        job.turn.leave()  # first: who has waited for the job may use its slots
        del self._jobs[job.job_id]
        self._ended.append(result)
        job.ended.set()


def bytes_moved(returned: object) -> int:
    """What a function's job has moved, by what it returned; raises where it failed."""
    if returned is None:
        return 0
    if isinstance(returned, bool | np.bool_):
        if not returned:
            raise RuntimeError("the function returned False: it did not move the bytes")
        return 0
    if isinstance(returned, int | np.integer) and operator.index(returned) >= 0:
        return operator.index(returned)
    raise TypeError(
        f"worker: expected a function that returns a number of bytes, True, False or None, "
        f"got {reprlib.repr(returned)}"
    )


def check_function(name: str, function: object) -> None:
    """Raises TypeError unless a thread can call it for its result."""
    if isinstance(function, type) and issubclass(function, OffloadingWorker):
        raise TypeError(
            f"{name}: expected an instance, got the class {function.__name__}; "
            f"pass {function.__name__}(...)"
        )
    if isinstance(function, type) or not callable(function):
        raise TypeError(
            f"{name}: expected an OffloadingWorker or a function (src_spec, dst_spec) -> bytes, "
            f"got {reprlib.repr(function)}"
        )
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{name}: expected a function that blocks, got the coroutine {function!r}")


def check_num_threads(num_threads: SupportsIndex) -> int:
    try:
        number = operator.index(num_threads)
    except TypeError:
        number = 0
    if isinstance(num_threads, bool) or number < 1:
        raise ValueError(
            f"num_threads: expected an integer of at least 1, got {reprlib.repr(num_threads)}"
        )
    return number
