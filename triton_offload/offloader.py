"""KVOffloader: manager and workers behind one object, for a program that is its own engine."""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from triton_offload.calibration import Calibration
from triton_offload.device import Device, device_for
from triton_offload.job import OffloadJob
from triton_offload.kernels.table import check_ids
from triton_offload.pool.host_pool import HostPool
from triton_offload.scheduler.chunks import ChunkSpan, runs_to_store
from triton_offload.scheduler.manager import CPUOffloadingManager, OffloadingEvent
from triton_offload.scheduler.policies import Key
from triton_offload.sizes import parse_bytes
from triton_offload.specs import (
    CPULoadStoreSpec,
    Direction,
    GPULoadStoreSpec,
    Ids,
    TransferResult,
    TransferStatus,
    as_ids,
)
from triton_offload.stats import DirectionStats, OffloadingStats
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.transfer.queue_manager import transfer_queue
from triton_offload.tuning.calibrate import calibration_for

BlockIds = Sequence[int] | npt.NDArray[np.integer]


class PoolFullError(RuntimeError):
    """No room in the host pool that is not pinned by transfers under way."""


class KVOffloader:
    """Offloads chunks of a KV cache to host memory under keys, and loads them back.

    Args:
        kv_caches: `[num_blocks, ...]` tensors, all on one device: a list, or a dict by name. They
            stay the caller's. A block is one page in every tensor of its group.
        host_bytes: size of the host pool, an int or a string ("8GiB").
        blocks_per_chunk: consecutive blocks that are offloaded, looked up and evicted together.
        groups: for hybrid models, the tensors of each KV cache group, by name (dict) or index
            (list); None: one group of all.
        path: "staged", "zero_copy", "copy_engine", or "auto".
        policy: which chunks are evicted, "lru" or "arc".
        enable_events: record what is stored and removed for `take_events`.
        calibration: what was measured of this machine. "auto": what is kept in the user's cache;
            where that is nothing, a GPU is measured here and now, once, for some seconds, and CPU
            memory keeps its defaults. "off": published figures. Else a file that
            `triton-offload calibrate --output` wrote, or a `Calibration`.
        options: sizes of the worker side; what they give, the calibration does not decide.
        device: the seam to transfer by, uncalibrated; None: by where the tensors lie. Tests give a
            `triton_offload.testing.SimulatedDevice`.

    Every method may be called from any thread. A key (bytes) names one chunk of one group and must
    stand for the same content for ever: engines use a hash of all tokens up to the chunk's end.
    """

    def __init__(
        self,
        kv_caches: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
        host_bytes: int | str,
        blocks_per_chunk: int = 1,
        *,
        groups: Sequence[Sequence[int | str]] | None = None,
        path: str = "auto",
        policy: str = "lru",
        enable_events: bool = False,
        calibration: Calibration | str | os.PathLike[str] = "auto",
        options: PipelineOptions | None = None,
        device: Device | None = None,
    ) -> None:
        self._layout = CacheLayout.named(kv_caches, blocks_per_chunk, groups)
        size = parse_bytes("host_bytes", host_bytes)
        num_chunks = size // self._layout.slot_bytes
        if num_chunks < 1:
            raise ValueError(
                f"host_bytes: expected room for at least one chunk of {self._layout.slot_bytes} "
                f"bytes, got {size}"
            )
        self._manager = CPUOffloadingManager(
            num_chunks,
            policy=policy,
            blocks_per_chunk=blocks_per_chunk,
            enable_events=enable_events,
        )
        measured = None
        if device is None:
            measured = calibration_for(self._layout.device, calibration)
        self._pool = HostPool.allocate(
            device or device_for(self._layout.device, measured),
            num_chunks,
            self._layout.slot_bytes,
        )
        try:
            self._queue = transfer_queue(self._layout, self._pool, path, options, measured)
        except BaseException:
            self._pool.close()
            raise
        # Guards the manager and the jobs: a lookup and the load that follows are one step.
        self._lock = threading.RLock()
        self._ids = itertools.count(1)
        self._jobs: dict[int, OffloadJob] = {}  # by transfer
        self._waiting: list[OffloadJob] = []  # for other jobs alone
        self._storing: dict[Key, OffloadJob] = {}
        self._finished: list[TransferResult] = []
        self._totals = {direction: DirectionStats() for direction in Direction}
        self._lookups = self._hits = self._evictions = 0
        self._closed = False  # no new jobs
        self._freed = False  # no threads and no pinned memory either

    @property
    def num_chunks(self) -> int:
        """How many chunks the host pool holds."""
        return self._pool.num_slots

    def store(
        self,
        keys: Sequence[bytes],
        block_ids: BlockIds,
        *,
        first_block: int = 0,
        group: int = 0,
        stream: Any = None,
    ) -> OffloadJob:
        """Offload blocks under one key a chunk, and return at once.

        `block_ids`: consecutive blocks of a request, the first at `first_block` of it; a first or
        last chunk may be incomplete, and a later store may add what it lacks. The pages are read
        after what is queued on `stream` now (default: the current stream). Chunks that are stored
        already are not moved again; those that another job is storing, the job waits for.

        Raises PoolFullError where nothing more can be evicted, ValueError for wrong arguments,
        RuntimeError when closed; nothing has changed then. Raises what the device does, too, where
        it refuses the store; no more has changed then than that chunks may have been evicted.
        """
        with self._lock:
            span, ids = self._request(keys, block_ids, first_block, group, distinct=False)
            stored = self._offload_keys(keys, group)
            output = self._manager.prepare_store(stored, span.masks())
            if output is None:
                raise PoolFullError(
                    f"host pool: expected room for {len(keys)} chunks, got {self.num_chunks} "
                    f"chunks of which {self._manager.num_pinned} are pinned by transfers"
                )
            job = OffloadJob(self, next(self._ids), Direction.STORE, list(output.keys_to_store))
            job._others = [
                self._storing[key] for key in output.pending_keys if key in self._storing
            ]
            self._manager.touch(stored)
            self._evictions += len(output.evicted_keys)
            place = {key: i for i, key in enumerate(stored)}
            chunks = [place[key] for key in output.keys_to_store]
            assert output.store_spec.fresh is not None
            try:
                for run in runs_to_store(span, chunks, output.blocks):
                    transfer = self._queue.transfer_async(
                        self._device_spec(ids[run.blocks], run.first, group),
                        CPULoadStoreSpec(
                            output.store_spec.slot_ids[run.chunks],
                            output.store_spec.fresh[run.chunks],
                        ),
                        stream=stream,
                    )
                    self._add(job, transfer)
            except BaseException as error:
                if not job._transfers:
                    self._manager.complete_store(job._keys, success=False, latest=True)
                    raise
                # Part of it is under way: it ends as failed when that has ended.
                job._parts.append(TransferResult(job.job_id, TransferStatus.FAILED, error=error))
            self._storing.update(dict.fromkeys(job._keys, job))
            self._settle(job)
            return job

    def load(
        self,
        keys: Sequence[bytes],
        block_ids: BlockIds,
        *,
        first_block: int = 0,
        group: int = 0,
        expedited: bool = False,
        stream: Any = None,
    ) -> OffloadJob:
        """Load the chunks of `keys` into blocks, and return at once.

        `block_ids`, `first_block`, `group`, `stream`: as for `store`; blocks are written after
        what is queued on the stream now. `expedited`: do not queue behind other loads.

        Raises UnknownKeyError, PendingKeyError (being stored), UnwrittenBlocksError (blocks of a
        partial chunk that no store wrote), ValueError, RuntimeError when closed; nothing has
        changed then.
        """
        with self._lock:
            span, ids = self._request(keys, block_ids, first_block, group, distinct=True)
            stored = self._offload_keys(keys, group)
            spec = self._manager.prepare_load(stored, span.masks())
            self._manager.touch(stored)
            job = OffloadJob(self, next(self._ids), Direction.LOAD, list(stored))
            try:
                if len(ids):
                    transfer = self._queue.transfer_async(
                        spec,
                        self._device_spec(ids, span.first, group),
                        expedited=expedited,
                        stream=stream,
                    )
                    self._add(job, transfer)
            except BaseException:
                self._manager.complete_load(stored, latest=True)
                raise
            self._settle(job)
            return job

    def lookup(
        self,
        keys: Sequence[bytes],
        *,
        num_blocks: int | None = None,
        first_block: int = 0,
        group: int = 0,
    ) -> int:
        """How many leading chunks of `keys` can be loaded now.

        A chunk of which any block was stored counts; with `num_blocks`, only one of which all the
        blocks were that a load of `num_blocks` blocks from `first_block` on needs.
        """
        with self._lock:
            self._check_open()
            self._collect()
            masks = None
            if num_blocks is not None:
                masks = self._span(keys, num_blocks, first_block).masks()
            hits = self._manager.lookup(self._offload_keys(keys, group), masks)
            self._lookups += len(keys)
            self._hits += hits
            return hits

    def touch(self, keys: Sequence[bytes], *, group: int = 0) -> None:
        """Mark chunks as used now, so that they are evicted late. Loads and stores do so too."""
        with self._lock:
            self._check_open()
            self._manager.touch(self._offload_keys(keys, group))

    def get_finished(self) -> list[TransferResult]:
        """Jobs that ended since the last call, each once; jobs that were waited for too.

        Results are kept until this is called: a program that only waits calls it now and then.
        """
        with self._lock:
            self._collect()
            finished, self._finished = self._finished, []
            return finished

    def cancel(self, job: OffloadJob) -> bool:
        """Take a job back if none of it has started; it ends as cancelled."""
        with self._lock:
            transfers = tuple(job._transfers)
            taken = self._queue.cancel(transfers)
            self._collect()
            return bool(transfers) and len(taken) == len(transfers)

    def take_events(self) -> list[OffloadingEvent]:
        """What was stored and removed since the last call (`enable_events`)."""
        with self._lock:
            return list(self._manager.take_events())

    def reset(self) -> None:
        """Forget every key. Transfers under way end as they would have."""
        with self._lock:
            self._check_open()
            self._manager.reset()

    def stats(self) -> OffloadingStats:
        with self._lock:
            self._collect()
            return OffloadingStats(
                self._totals[Direction.STORE],
                self._totals[Direction.LOAD],
                self._lookups,
                self._hits,
                self._evictions,
                self._manager.num_chunks,
                self._manager.num_used,
                self._manager.num_pinned,
            )

    def close(self, timeout: float | None = None) -> None:
        """Cancel what has not started, drain the rest, free the pool. Idempotent.

        Jobs keep their results. Raises TimeoutError where the device does not finish; a later call
        tries again. Other errors of the device are raised when all that can be freed is.
        """
        with self._lock:
            if self._freed:
                return
            self._closed = True
            transfers = list(self._jobs)
            self._queue.cancel(transfers)
        self._queue.wait(transfers, timeout)
        with self._lock:
            self._collect()
        try:
            self._queue.shutdown(timeout)
        finally:
            self._pool.close()  # every job has ended, whatever else went wrong
        self._freed = True

    def __enter__(self) -> KVOffloader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- under the lock --

    def _request(
        self,
        keys: Sequence[bytes],
        block_ids: BlockIds,
        first_block: int,
        group: int,
        *,
        distinct: bool,
    ) -> tuple[ChunkSpan, Ids]:
        """The blocks of a call, all checked before anything is evicted or pinned for it."""
        self._check_open()
        if self._pool.device.capturing():
            raise RuntimeError("the current stream captures a graph: expected no transfers in it")
        if not 0 <= group < len(self._layout.groups):
            raise ValueError(f"group: expected 0 to {len(self._layout.groups) - 1}, got {group}")
        ids = as_ids("block_ids", block_ids)
        check_ids("block_ids", ids, self._layout.groups[group].table.num_blocks, distinct=distinct)
        span = self._span(keys, len(ids), first_block)
        self._collect()
        return span, ids

    def _span(self, keys: Sequence[bytes], num_blocks: int, first_block: int) -> ChunkSpan:
        span = ChunkSpan.of(first_block, num_blocks, self._layout.blocks_per_chunk)
        if len(keys) != span.num_chunks:
            raise ValueError(
                f"keys: expected {span.num_chunks} for {num_blocks} blocks from {first_block} on "
                f"at {self._layout.blocks_per_chunk} blocks a chunk, got {len(keys)}"
            )
        return span

    def _offload_keys(self, keys: Sequence[bytes], group: int) -> list[bytes]:
        """Keys as the manager knows them: where there are several groups, with the group's number
        behind, as vLLM does."""
        for key in keys:
            if not isinstance(key, bytes):
                raise ValueError(f"keys: expected bytes, got {type(key).__name__}")
        if len(self._layout.groups) == 1:
            return list(keys)
        suffix = group.to_bytes(4, "big")
        return [key + suffix for key in keys]

    def _device_spec(self, ids: Ids, first: int, group: int) -> GPULoadStoreSpec:
        count = len(self._layout.groups)
        sizes = [len(ids) if i == group else 0 for i in range(count)]
        return GPULoadStoreSpec(ids, sizes, [first] * count)

    def _add(self, job: OffloadJob, transfer: int) -> None:
        job._transfers.add(transfer)
        self._jobs[transfer] = job

    def _collect(self) -> None:
        """Take in what has ended: release pins, make stored keys loadable."""
        with self._lock:
            for result in self._queue.get_finished():
                job = self._jobs.pop(result.job_id)
                job._transfers.discard(result.job_id)
                job._parts.append(result)
                self._settle(job)
            for job in [job for job in self._waiting if all(o._result for o in job._others)]:
                self._waiting.remove(job)
                self._finish(job)

    def _settle(self, job: OffloadJob) -> None:
        """Complete a job of which nothing is under way any more."""
        if job._transfers:
            return
        success = all(part.success for part in job._parts)
        if job.direction is Direction.LOAD:
            self._manager.complete_load(job._keys)
        else:
            self._manager.complete_store(job._keys, success=success)
            for key in job._keys:
                if self._storing.get(key) is job:
                    del self._storing[key]
        if all(other._result for other in job._others):
            self._finish(job)
        else:
            self._waiting.append(job)

    def _finish(self, job: OffloadJob) -> None:
        parts = job._parts + [other._result for other in job._others if other._result]
        bad = next((part for part in parts if not part.success), None)
        if bad is not None:
            result = TransferResult(job.job_id, bad.status, error=bad.error)
        else:
            result = TransferResult(
                job.job_id,
                TransferStatus.SUCCESS,
                sum(part.num_bytes for part in job._parts),
                sum(part.seconds for part in job._parts),
            )
        job._result = result
        self._totals[job.direction] = self._totals[job.direction].add(result)
        self._finished.append(result)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the offloader is closed")

    def _check(self) -> None:
        """Asserts that transfers, jobs, keys and pins belong together."""
        with self._lock:
            self._manager._check()
            self._queue._check()
            assert self._jobs.keys() == self._queue._worker_of.keys()
            under_way = set(self._jobs.values())
            pinned: dict[Direction, Counter[Key]] = {each: Counter() for each in Direction}
            for job in under_way:
                assert job._result is None
                assert job._transfers == {t for t, owner in self._jobs.items() if owner is job}
                pinned[job.direction].update(job._keys)
            # Every pin is that of a job under way, and the other way round.
            assert self._manager._pins() == (pinned[Direction.LOAD], pinned[Direction.STORE])
            for key, job in self._storing.items():
                assert job in under_way, "a job that ended is still storing"
                assert key in job._keys
            for job in self._waiting:
                assert not job._transfers
                assert job._result is None
                assert any(other._result is None for other in job._others)
