"""The queue manager: hands each job to the worker of its kind of transfer."""

from __future__ import annotations

import itertools
import logging
import operator
import reprlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, SupportsIndex

from triton_offload.calibration import Calibration, Path, PathChoice
from triton_offload.kernels.arguments import shown
from triton_offload.pool.host_pool import HostPool
from triton_offload.process_lock import ProcessLock
from triton_offload.specs import (
    CPULoadStoreSpec,
    Direction,
    GPULoadStoreSpec,
    LoadStoreSpec,
    TransferResult,
)
from triton_offload.transfer.checksums import Checksums
from triton_offload.transfer.device_worker import DeviceWorker
from triton_offload.transfer.function_worker import (
    FunctionWorker,
    TransferFunction,
    check_function,
    check_num_threads,
)
from triton_offload.transfer.layers import Layers
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.options import Verify, check_verify
from triton_offload.transfer.pipeline import Pipeline, PipelineOptions
from triton_offload.transfer.slot_order import SlotOrder
from triton_offload.transfer.worker import OffloadingWorker, deadline_after, seconds_until

_log = logging.getLogger(__name__)


class OffloadingQueueManager:
    """Routes transfers by the types of their specs. Every method may be called from any thread.

    A job id is drawn here and belongs to one job for the manager's life. In a child after `fork`
    every call raises RuntimeError, for the threads that move the bytes are not there; `shutdown`
    does nothing then.
    """

    def __init__(self) -> None:
        self._lock = ProcessLock("queue manager")
        self._ids = itertools.count(1)
        self._workers: dict[tuple[type, type], OffloadingWorker] = {}
        self._distinct: list[OffloadingWorker] = []  # for one may move several kinds
        self._worker_of: dict[int, OffloadingWorker] = {}  # jobs not reported yet
        self._ended: list[TransferResult] = []  # got from a worker, not handed on yet
        self._order = SlotOrder()
        self._closed = False
        #: what the chunks of the device's pool add up to; None: nobody asked for that
        self.checksums: Checksums | None = None

    def register_worker(
        self,
        src_cls: type[LoadStoreSpec],
        dst_cls: type[LoadStoreSpec],
        worker: OffloadingWorker | TransferFunction,
        num_threads: SupportsIndex = 1,
    ) -> None:
        """Let `worker` move jobs from `src_cls` to `dst_cls`, subclasses of LoadStoreSpec.

        A function is called as `worker(src_spec, dst_spec)` by `num_threads` threads; what it
        returns, and the order of its jobs with others on the same slots, see `FunctionWorker`. The
        manager shuts the worker down.

        Specs of subclasses find the worker too. Where several workers fit, the nearest class of
        the source decides (in the order of its `__mro__`), then that of the destination.

        Raises TypeError or ValueError for wrong arguments, and where that kind of transfer has a
        worker already.
        """
        for name, cls in (("src_cls", src_cls), ("dst_cls", dst_cls)):
            if not isinstance(cls, type) or not issubclass(cls, LoadStoreSpec):
                raise TypeError(
                    f"{name}: expected a subclass of LoadStoreSpec, got {reprlib.repr(cls)}"
                )
        number = check_num_threads(num_threads)
        if not isinstance(worker, OffloadingWorker):
            check_function("worker", worker)
        elif number != 1:
            raise ValueError(
                f"num_threads: expected it beside a function only, got {number} beside a "
                f"{type(worker).__name__}, which has threads of its own"
            )
        kind = (src_cls, dst_cls)
        with self._lock:
            self._check_open()
            if kind in self._workers:
                raise ValueError(
                    f"worker: expected one for each kind of transfer, got a second for "
                    f"{src_cls.__name__} to {dst_cls.__name__}"
                )
            if not isinstance(worker, OffloadingWorker):
                worker = FunctionWorker(worker, number)
            if isinstance(worker, FunctionWorker):
                worker.share_order(self._order)
            elif isinstance(worker, DeviceWorker):
                self._order.waits_for_device.append(worker.wait_for_slots)
            self._workers[kind] = worker
            if all(worker is not other for other in self._distinct):
                self._distinct.append(worker)

    def transfer_async(
        self,
        src_spec: LoadStoreSpec,
        dst_spec: LoadStoreSpec,
        *,
        expedited: bool = False,
        stream: Any = None,
        layers: Layers | None = None,
    ) -> int:
        """Submit a job and return its id. Raises, with nothing queued, what is wrong with it.

        `layers`: a device's load brings the pages of the first layers first, and a wait may be for
        one layer.
        A device's job is refused where a function's job on the same slots has to end first (see
        `FunctionWorker`): RuntimeError.
        """
        with self._lock:
            self._check_open()
            worker = self._worker_for(type(src_spec), type(dst_spec))
            job_id = next(self._ids)
            self._worker_of[job_id] = worker
        submit = partial(
            worker.transfer_async, job_id, src_spec, dst_spec, expedited=expedited, stream=stream
        )
        if layers is not None:  # which other workers do not take
            submit = partial(submit, layers=layers)
        try:
            if isinstance(worker, DeviceWorker):
                self._order.submit_to_device(src_spec, dst_spec, submit)
            else:
                submit()
        except BaseException:
            with self._lock:
                self._worker_of.pop(job_id, None)
            raise
        return job_id

    def get_finished(self) -> list[TransferResult]:
        """What ended since the last call: every accepted job once. Empty after `shutdown`."""
        with self._lock:
            if self._closed:
                return []
            workers = list(self._distinct)
        for worker in workers:
            ended = worker.get_finished()
            if not ended:
                continue
            with self._lock:  # at once: where the next worker raises, these are for the next call
                self._ended += ended
        if not self._ended:
            return []
        with self._lock:
            results, self._ended = self._ended, []
            for result in results:
                self._worker_of.pop(result.job_id, None)
        return results

    @property
    def broken_paths(self) -> tuple[str, ...]:
        """The names of paths that a device's worker could not queue, for which others stand in;
        none after `shutdown`."""
        with self._lock:
            workers = list(self._distinct)
        broken = {p.value for w in workers if isinstance(w, DeviceWorker) for p in w.broken_paths}
        return tuple(sorted(broken))

    def wait(self, job_ids: Iterable[SupportsIndex], timeout: float | None = None) -> None:
        """Block until these jobs have ended. Ids that are unknown or reported are ignored.

        Results stay to be got. Raises TimeoutError, never returns early.
        """
        deadline = deadline_after(timeout)
        for worker, ids in self._by_worker(job_ids):
            worker.wait(ids, seconds_until(deadline))

    def cancel(self, job_ids: Iterable[SupportsIndex]) -> set[int]:
        """Take back the jobs that have not started and return their ids; they are reported as
        cancelled."""
        taken: set[int] = set()
        for worker, ids in self._by_worker(job_ids):
            taken |= worker.cancel(ids)
        return taken

    def cancel_together(self, job_ids: Iterable[SupportsIndex]) -> bool:
        """Take back all of these jobs of one worker, or none where one of them has started.

        Raises ValueError for jobs of several workers.
        """
        groups = self._by_worker(job_ids)
        if len(groups) > 1:
            raise ValueError(f"job_ids: expected jobs of one worker, got {len(groups)} workers'")
        return all(worker.cancel_together(ids) for worker, ids in groups)

    def source_released(self, job_id: SupportsIndex) -> bool:
        """Whether the engine may use the job's pages again."""
        return all(worker.source_released(i) for worker, (i,) in self._by_worker([job_id]))

    def wait_on(self, job_id: SupportsIndex, stream: Any, layer: int | None = None) -> None:
        """Let `stream` follow the release of the job's pages: a device's job without the host,
        another's by blocking until it has ended. `layer`: of that layer's pages, where the job was
        submitted with `layers`."""
        for worker, (i,) in self._by_worker([job_id]):
            if isinstance(worker, DeviceWorker):
                worker.wait_on(i, stream, layer)
            else:
                worker.wait_on(i, stream)

    def wait_for_layer(
        self, job_id: SupportsIndex, layer: int, timeout: float | None = None
    ) -> None:
        """Block until the release of a layer's pages, whether they are right or not; the result of
        the job tells. Raises TimeoutError."""
        for worker, (i,) in self._by_worker([job_id]):
            if isinstance(worker, DeviceWorker):
                worker.wait_for_layer(i, layer, timeout)
            else:
                worker.wait([i], timeout)

    def shutdown(self, timeout: float | None = None) -> None:
        """Cancel what has not started, drain the rest, join every thread. Idempotent.

        Results that nobody got are gone. Raises TimeoutError where that takes longer than `timeout`
        in all. What one worker raises is raised when the others are shut down too; a later call
        tries all of them again. Does nothing in a child after `fork`.
        """
        if self._lock.foreign:
            return
        with self._lock:
            self._closed = True
            workers = list(self._distinct)
        deadline = deadline_after(timeout)
        with ExitStack() as rest:
            for worker in reversed(workers):
                rest.callback(lambda worker: worker.shutdown(seconds_until(deadline)), worker)
        with self._lock:
            self._worker_of.clear()
            self._ended.clear()

    def _worker_for(self, src_cls: type, dst_cls: type) -> OffloadingWorker:
        for src in src_cls.__mro__:
            for dst in dst_cls.__mro__:
                worker = self._workers.get((src, dst))
                if worker is not None:
                    return worker
        raise ValueError(
            f"src_spec, dst_spec: expected a kind of transfer with a registered worker, "
            f"got {src_cls.__name__} to {dst_cls.__name__}"
        )

    def _by_worker(
        self, job_ids: Iterable[SupportsIndex]
    ) -> list[tuple[OffloadingWorker, list[int]]]:
        """The known ones among them, each once."""
        try:
            ids = dict.fromkeys(map(operator.index, job_ids))
        except TypeError:
            raise TypeError(
                f"job_ids: expected an iterable of integers, got {reprlib.repr(job_ids)}"
            ) from None
        with self._lock:
            groups: dict[int, tuple[OffloadingWorker, list[int]]] = {}
            for job_id in ids:
                worker = self._worker_of.get(job_id)
                if worker is not None:
                    groups.setdefault(id(worker), (worker, []))[1].append(job_id)
            return list(groups.values())

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the queue manager is shut down")

    def _check(self) -> None:
        """Asserts that each device worker knows exactly the jobs that were handed to it."""
        with self._lock:
            owners = dict(self._worker_of)
            workers = list(self._distinct)
        for worker in workers:
            if isinstance(worker, DeviceWorker):
                worker._check()
                assert worker._jobs.keys() == {i for i, owner in owners.items() if owner is worker}


def transfer_queue(
    layout: CacheLayout,
    pool: HostPool,
    path: PathChoice = "auto",
    options: PipelineOptions | None = None,
    calibration: Calibration | None = None,
    verify: Verify = "off",
) -> OffloadingQueueManager:
    """A queue manager that stores from and loads into `layout`, with `pool` on the host side.

    `path`: "staged", "zero_copy", "copy_engine", or "auto" for the rule. `zero_copy` needs a
    pinned pool; until that is so, segments are staged. `calibration`: the rule, and the size of
    staging buffers, where `options` does not give them; None: published figures. `verify`: as in
    `PipelineOptions`; "off" leaves that to `options`.
    """
    names = [choice.value for choice in Path]
    if path != "auto" and path not in names:
        raise ValueError(f"path: expected one of {['auto', *names]}, got {shown(path)}")
    if not isinstance(options, PipelineOptions | None):
        raise TypeError(f"options: expected PipelineOptions, got {shown(options)}")
    if options is None:
        options = PipelineOptions(path=None if path == "auto" else Path(path))
        if calibration is not None:
            options = replace(options, buffer_bytes=calibration.buffer_bytes)
    elif path != "auto":
        raise ValueError("path: expected it in `options` where they are given")
    if calibration is not None and options.paths is None:
        options = replace(options, paths=calibration.paths)
    check_verify(verify)
    if verify != "off":
        options = replace(options, verify=verify)
    pipeline = Pipeline(layout, pool, options)
    if not pool.device.batches_copies:
        _log.warning(
            "%s takes no batches of copies: the path copy_engine is not to be had, and chunks of "
            "many small runs are copied one by one; `triton-offload doctor` says why",
            pool.device.name,
        )
    manager = OffloadingQueueManager()
    manager.checksums = pipeline.checksums
    store, load = DeviceWorker(pipeline, Direction.STORE), DeviceWorker(pipeline, Direction.LOAD)
    manager.register_worker(GPULoadStoreSpec, CPULoadStoreSpec, store)
    manager.register_worker(CPULoadStoreSpec, GPULoadStoreSpec, load)
    return manager
