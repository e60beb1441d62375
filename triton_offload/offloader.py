"""KVOffloader: manager and workers behind one object, for a program that is its own engine."""

from __future__ import annotations

import itertools
import os
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch

from triton_offload.calibration import Calibration, PathChoice
from triton_offload.device import Device, device_for
from triton_offload.errors import PoolFullError
from triton_offload.job import OffloadJob
from triton_offload.kernels.arguments import as_integer, as_seconds, shown
from triton_offload.kernels.table import check_ids
from triton_offload.ledger import Entry, JobLedger
from triton_offload.medium import ChunkSpec, check_kind, check_spec
from triton_offload.pool.host_pool import HostPool
from triton_offload.pool.memory_limits import check_memory
from triton_offload.process_lock import ProcessLock
from triton_offload.scheduler.chunks import ChunkSpan, runs_to_store
from triton_offload.scheduler.manager import (
    CPUOffloadingManager,
    OffloadingEvent,
    PrepareStoreOutput,
)
from triton_offload.scheduler.policies import Key, PolicyChoice
from triton_offload.sizes import parse_bytes
from triton_offload.specs import (
    CPULoadStoreSpec,
    Direction,
    GPULoadStoreSpec,
    Ids,
    LoadStoreSpec,
    TransferResult,
    TransferStatus,
    as_ids,
)
from triton_offload.stats import OffloadingStats
from triton_offload.transfer.function_worker import TransferFunction
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.transfer.queue_manager import OffloadingQueueManager, transfer_queue
from triton_offload.transfer.worker import OffloadingWorker
from triton_offload.tuning.calibrate import calibration_for

_BYTES = frozenset({bytes})

BlockIds = Sequence[int] | npt.NDArray[np.integer] | torch.Tensor


class KVOffloader:
    """Offloads chunks of a KV cache to host memory under keys, and loads them back.

    Args:
        kv_caches: `[num_blocks, ...]` tensors, all on one device: a list, or a dict by name. They
            stay the caller's. A block is one page in every tensor of its group. Of a layer whose K
            and V are one tensor `[2, num_blocks, ...]`, give the two:
            `[half for tensor in tensors for half in tensor]`. Its first dimension would be taken
            for two blocks otherwise.
        host_bytes: size of the host pool, an int or a string ("8GiB").
        blocks_per_chunk: consecutive blocks that are offloaded, looked up and evicted together.
        groups: for hybrid models, the tensors of each KV cache group, by name (dict) or index
            (list); None: one group of all.
        path: "staged", "zero_copy", "copy_engine", or "auto".
        policy: which chunks are evicted: "lru", "arc", or a class or function of your own that
            makes an `EvictionPolicy` of the number of chunks. Where that one raises, or names what
            may not be evicted, a store that needs room raises RuntimeError, with nothing changed,
            until a `reset`; everything else works on.
        enable_events: record what is stored and removed for `take_events`.
        calibration: what was measured of this machine. "auto": what is kept in the user's cache;
            where that is nothing, a GPU is measured here and now, once, for some seconds, and CPU
            memory keeps its defaults. "off": published figures. Else a file that
            `triton-offload calibrate --output` wrote, or a `Calibration`.
        options: sizes of the worker side; what they give, the calibration does not decide.
        device: the seam to transfer by, uncalibrated; None: by where the tensors lie. Tests give a
            `triton_offload.testing.SimulatedDevice`.

    Every method may be called from any thread of the process that made it; in a fork of it they
    raise RuntimeError. What a call was given (ids, keys) is the caller's again when it returns. A
    key (bytes) names one chunk of one group and must stand for the same content for ever: engines
    use a hash of all tokens up to the chunk's end.

    Use it in a `with` statement, or call `close`. One that is dropped without is closed in the
    background, with a ResourceWarning.
    """

    def __init__(
        self,
        kv_caches: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
        host_bytes: int | str,
        blocks_per_chunk: int = 1,
        *,
        groups: Sequence[Sequence[int | str]] | None = None,
        path: PathChoice = "auto",
        policy: PolicyChoice = "lru",
        enable_events: bool = False,
        calibration: Calibration | str | os.PathLike[str] = "auto",
        options: PipelineOptions | None = None,
        device: Device | None = None,
    ) -> None:
        self._layout = CacheLayout.named(kv_caches, blocks_per_chunk, groups)
        if device is not None and (isinstance(device, type) or not hasattr(device, "check_stream")):
            raise TypeError(f"device: expected a Device or None, got {shown(device)}")
        size = parse_bytes("host_bytes", host_bytes)
        check_memory("host_bytes", size)  # before anything grows with it
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
        self._lock = ProcessLock("offloader")
        self._ids = itertools.count(1)
        self._ledger = JobLedger()
        self._lookups = self._hits = self._evictions = 0
        self._closed = False  # no new jobs
        self._finalizer = weakref.finalize(self, _dropped, os.getpid(), self._queue, self._pool)
        # At exit the device ends its threads by itself; draining them first may take long.
        self._finalizer.atexit = False

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
        RuntimeError when closed or where a policy of yours failed; nothing has changed then. Raises
        what the device does, too, where it refuses the store; no more has changed then than that
        chunks may have been evicted.
        """
        with self._lock:
            stored, span, ids = self._request(
                keys, block_ids, first_block, group, stream, distinct=False
            )
            output = self._reserve(stored, span.masks())
            entry = self._entry(Direction.STORE, output.keys_to_store, output.store_spec.slot_ids)
            place = {key: i for i, key in enumerate(stored)}
            chunks = [place[key] for key in output.keys_to_store]
            try:
                runs = runs_to_store(span, chunks, output.blocks)
                for run in runs:
                    spec = output.store_spec
                    if len(runs) > 1:
                        assert spec.fresh is not None
                        spec = CPULoadStoreSpec(spec.slot_ids[run.chunks], spec.fresh[run.chunks])
                    device_spec = self._device_spec(ids[run.blocks], run.first, group)
                    transfer = self._queue.transfer_async(device_spec, spec, stream=stream)
                    entry.transfers.add(transfer)
            except BaseException as error:
                if not entry.transfers:
                    self._manager.complete_store(entry.keys, success=False, slots=entry.slots)
                    raise
                # Part of it is under way: it ends as failed when that has ended.
                failed = TransferResult(entry.job.job_id, TransferStatus.FAILED, error=error)
                entry.parts.append(failed)
            return self._open(entry, output.pending_keys)

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
            stored, span, ids = self._request(
                keys, block_ids, first_block, group, stream, distinct=True
            )
            spec = self._manager.prepare_load(stored, span.masks())
            self._manager.touch(stored)
            entry = self._entry(Direction.LOAD, stored, spec.slot_ids)
            try:
                if len(ids):
                    transfer = self._queue.transfer_async(
                        spec,
                        self._device_spec(ids, span.first, group),
                        expedited=expedited,
                        stream=stream,
                    )
                    entry.transfers.add(transfer)
            except BaseException:
                self._manager.complete_load(stored, slots=entry.slots)
                raise
            return self._open(entry)

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
            stored = self._offload_keys(keys, group)
            masks = None
            if num_blocks is not None:
                masks = self._span(len(stored), num_blocks, first_block).masks()
            hits = self._manager.lookup(stored, masks)
            self._lookups += len(stored)
            self._hits += hits
            return hits

    def touch(self, keys: Sequence[bytes], *, group: int = 0) -> None:
        """Mark chunks as used now, so that they are evicted late. Loads and stores do so too."""
        with self._lock:
            self._check_open()
            self._manager.touch(self._offload_keys(keys, group))

    def get_finished(self) -> list[TransferResult]:
        """Jobs that ended since the last call, each once; jobs that were waited for too.

        Of a program that only waits and never calls this, the latest 65,536 results are kept.
        """
        with self._lock:
            self._collect()
            return self._ledger.take_finished()

    def cancel(self, job: OffloadJob) -> bool:
        """Take a job back, all of it or nothing.

        True: none of it had started, and none of it ever will; it has ended as cancelled. What a
        store would have added is not loadable, what was stored before is, and what was evicted for
        it is gone. False: it has ended, or part of it has started, or another store waits for
        chunks that it is storing; it ends as it would have.

        Raises ValueError for a job of another offloader.
        """
        if not isinstance(job, OffloadJob):
            raise TypeError(f"job: expected an OffloadJob, got {shown(job)}")
        with self._lock:
            self._collect()
            entry = self._ledger.entry_of(job)
            if entry is None:
                if job._owner is not None:
                    raise ValueError(f"job: expected one of this offloader, got {job!r} of another")
                return False
            return not entry.followed_by and self._cancel(entry)

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
        """What was done since construction, and how it stands now; after `close` too."""
        with self._lock:
            self._collect()
            slot_bytes = self._pool.slot_bytes if self._finalizer.alive else 0
            return OffloadingStats(
                self._ledger.totals[Direction.STORE].stats(),
                self._ledger.totals[Direction.LOAD].stats(),
                self._lookups,
                self._hits,
                self._evictions,
                self._manager.num_chunks,
                self._manager.num_used,
                self._manager.num_pinned,
                self._manager.num_chunks * slot_bytes,
                self._manager.num_used * slot_bytes,
                self._pool.pinned,
                self._pool.pin_failure,
                self._queue.broken_paths,
                imported=self._ledger.medium_totals[Direction.STORE].stats(),
                exported=self._ledger.medium_totals[Direction.LOAD].stats(),
                limits=(*self._pool.device.limits, *self._pool.notes),
            )

    def close(self, timeout: float | None = None) -> None:
        """Cancel what has not started, drain the rest, free the pool. Idempotent.

        `timeout`: seconds in all. Jobs keep their results. Raises TimeoutError where the device
        does not finish; a later call tries again. Other errors of the device are raised when all
        that can be freed is. Does nothing in a fork of the process that made the offloader.
        """
        timeout = as_seconds("timeout", timeout)
        if self._lock.foreign or not self._finalizer.alive:
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._closed = True
            self._collect()
            for entry in reversed(self._ledger.entries):  # those that follow others before these
                self._cancel(entry)
            transfers = [t for entry in self._ledger.entries for t in entry.transfers]
        self._queue.wait(transfers, _left(deadline))
        with self._lock:
            self._collect()
        with ExitStack() as rest:
            rest.callback(self._pool.close)  # every job has ended, whatever else goes wrong
            rest.callback(self._queue.shutdown, _left(deadline))
        self._finalizer.detach()  # all is freed, and nothing is left to do

    # -- a medium of the user's --

    def register_worker(
        self,
        src_cls: type[LoadStoreSpec],
        dst_cls: type[LoadStoreSpec],
        worker: OffloadingWorker | TransferFunction,
        num_threads: SupportsIndex = 1,
    ) -> None:
        """Let `worker` move chunks between the pool and a medium of your own, a disk say.

        `src_cls`, `dst_cls`: `ChunkSpec` and a subclass of LoadStoreSpec of yours, which says where
        chunks lie in your medium: `(ChunkSpec, YourSpec)` for `export_chunks`, `(YourSpec,
        ChunkSpec)` for `import_chunks`.

        `worker`: a function `(src_spec, dst_spec)`, called by `num_threads` threads of its own. It
        reads `chunk.data` or calls `chunk.write` for each of the ChunkSpec's `chunks`, and returns
        how many bytes it moved (True, None: not counted). False, anything else, and what it raises
        end the job as failed. It may call the offloader, but neither close it nor wait for jobs
        that its own threads have to run. For a medium with streams of its own, an
        `OffloadingWorker`; the offloader shuts it down.

        Raises TypeError or ValueError for wrong arguments, and for a second worker of a kind;
        RuntimeError when closed.
        """
        with self._lock:
            self._check_open()
            check_kind(src_cls, dst_cls)
            self._queue.register_worker(src_cls, dst_cls, worker, num_threads)

    def export_chunks(
        self, keys: Sequence[bytes], dst: LoadStoreSpec, *, group: int = 0
    ) -> OffloadJob:
        """Hand the chunks of `keys` to the worker of `(ChunkSpec, type(dst))`; return at once.

        They stay in the pool, and are not evicted before the job has ended; it is no use of them
        that would keep them longer. Of partial chunks the blocks that can be loaded now are handed
        over (`Chunk.blocks`).

        Raises UnknownKeyError, PendingKeyError, TypeError or ValueError, RuntimeError when closed;
        nothing has changed then.
        """
        with self._lock:
            self._check_open()
            stored = self._offload_keys(keys, group)
            check_spec("dst", dst)
            self._collect()
            # Any mask will do for what can't be loaded, and is refused by name.
            masks = [self._manager.loadable_blocks(key) or 1 for key in stored]
            slots = self._manager.prepare_load(stored, masks).slot_ids
            entry = self._entry(Direction.LOAD, stored, slots)
            try:
                entry.chunks = self._chunks(stored, masks, slots, group, writing=False)
                if stored:
                    entry.transfers.add(self._queue.transfer_async(entry.chunks, dst))
            except BaseException:
                self._manager.complete_load(entry.keys, slots=entry.slots)
                raise
            return self._open(entry)

    def import_chunks(
        self,
        keys: Sequence[bytes],
        src: LoadStoreSpec,
        *,
        blocks: Sequence[int] | None = None,
        group: int = 0,
    ) -> OffloadJob:
        """Let the worker of `(type(src), ChunkSpec)` fill chunks of the pool; return at once.

        They can be loaded when the job has ended well, which is when the worker wrote every one of
        them; else those of the job are forgotten, but what the pool held before is there. `blocks`:
        a bitmask per key, as `Chunk.blocks` of the export had it; None: whole chunks. What the pool
        holds already is not asked for again (`ChunkSpec.chunks` has fewer chunks than `keys`, or
        fewer blocks); what another job is storing, the job waits for.

        Raises as `store` does, and TypeError for a `src` that is no spec of yours.
        """
        with self._lock:
            self._check_open()
            stored = self._offload_keys(keys, group)
            check_spec("src", src)
            self._queue._worker_for(type(src), ChunkSpec)  # raises before anything is evicted
            self._collect()
            output = self._reserve(stored, blocks)
            slots = output.store_spec.slot_ids
            entry = self._entry(Direction.STORE, output.keys_to_store, slots)
            try:
                entry.chunks = self._chunks(entry.keys, output.blocks, slots, group, writing=True)
                if entry.keys:
                    entry.transfers.add(self._queue.transfer_async(src, entry.chunks))
            except BaseException:
                self._manager.complete_store(entry.keys, success=False, slots=entry.slots)
                raise
            return self._open(entry, output.pending_keys)

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
        stream: Any,
        *,
        distinct: bool,
    ) -> tuple[list[Key], ChunkSpan, Ids]:
        """The blocks of a call, all checked before anything is evicted or pinned for it."""
        self._check_open()
        self._pool.device.check_stream(stream)
        if self._pool.device.capturing(stream):
            which = "the current stream" if stream is None else "stream"
            raise RuntimeError(f"{which} captures a graph: expected no transfers in it")
        stored = self._offload_keys(keys, group)
        ids = as_ids("block_ids", block_ids)
        check_ids("block_ids", ids, self._layout.groups[group].table.num_blocks, distinct=distinct)
        span = self._span(len(stored), len(ids), first_block)
        self._collect()
        return stored, span, ids

    def _span(
        self, num_keys: int, num_blocks: SupportsIndex, first_block: SupportsIndex
    ) -> ChunkSpan:
        span = ChunkSpan.of(first_block, num_blocks, self._layout.blocks_per_chunk)
        if num_keys != span.num_chunks:
            raise ValueError(
                f"keys: expected {span.num_chunks} for {num_blocks} blocks from {first_block} on "
                f"at {self._layout.blocks_per_chunk} blocks a chunk, got {num_keys}"
            )
        return span

    def _offload_keys(self, keys: Sequence[bytes], group: int) -> list[bytes]:
        """Keys as the manager knows them: where there are several groups, with the group's number
        behind, as vLLM does."""
        count = len(self._layout.groups)
        number = as_integer("group", group)
        if number >= count:
            raise ValueError(f"group: expected 0 to {count - 1}, got {group}")
        if isinstance(keys, (bytes, str)) or not isinstance(keys, Iterable):
            raise ValueError(f"keys: expected one key (bytes) a chunk, got {type(keys).__name__}")
        keys = list(keys)
        if not _BYTES.issuperset(map(type, keys)):  # no loop where all are just that
            for key in keys:
                if not isinstance(key, bytes):
                    raise ValueError(f"keys: expected bytes, got {type(key).__name__}")
        if count == 1:
            return keys
        suffix = number.to_bytes(4, "big")
        return [key + suffix for key in keys]

    def _device_spec(self, ids: Ids, first: int, group: int) -> GPULoadStoreSpec:
        count = len(self._layout.groups)
        sizes = [len(ids) if i == group else 0 for i in range(count)]
        return GPULoadStoreSpec(ids, sizes, [first] * count)

    def _reserve(self, keys: Sequence[Key], masks: Sequence[int] | None) -> PrepareStoreOutput:
        """Slots for what of these chunks is to be stored."""
        output = self._manager.prepare_store(keys, masks)
        if output is None:
            raise PoolFullError(
                f"host pool: expected room for {len(keys)} chunks, got {self.num_chunks} "
                f"chunks of which {self._manager.num_pinned} are pinned by transfers"
            )
        self._manager.touch(keys)
        self._evictions += len(output.evicted_keys)
        return output

    def _chunks(
        self, keys: Sequence[Key], masks: Sequence[int], slots: Ids, group: int, *, writing: bool
    ) -> ChunkSpec:
        if len(self._layout.groups) > 1:  # without the group's number
            keys = [key[:-4] for key in keys]
        table = self._layout.groups[group].table
        return ChunkSpec.of(keys, masks, self._pool.slots, slots, table, group, writing=writing)

    def _entry(self, direction: Direction, keys: Iterable[Key], slots: Ids) -> Entry:
        return Entry(OffloadJob(self, next(self._ids), direction), list(keys), slots.tolist())

    def _open(self, entry: Entry, follows: Iterable[Key] = ()) -> OffloadJob:
        self._ledger.open(entry, follows)
        if not entry.transfers:
            self._complete(entry)
        return entry.job

    def _collect(self) -> None:
        """Take in what has ended: release pins, make stored keys loadable."""
        with self._lock:
            if not self._ledger.awaits_any:
                return
            for result in self._queue.get_finished():
                entry = self._ledger.take(result)
                if entry is not None:
                    self._complete(entry)

    def _complete(self, entry: Entry) -> None:
        """Nothing that a job moves itself is under way any more."""
        missing = entry.chunks.end() if entry.chunks is not None else []
        if missing and all(part.success for part in entry.parts):
            error = RuntimeError(
                f"worker: expected it to write every chunk, got no bytes of {missing[0]!r}"
            )
            failed = TransferResult(entry.job.job_id, TransferStatus.FAILED, error=error)
            entry.parts.append(failed)
        # By its slots: it may end before an older one of its keys, from before a reset.
        if entry.job.direction is Direction.LOAD:
            self._manager.complete_load(entry.keys, slots=entry.slots)
        else:
            success = all(part.success for part in entry.parts)
            self._manager.complete_store(entry.keys, success=success, slots=entry.slots)
        self._ledger.moved(entry)

    def _cancel(self, entry: Entry) -> bool:
        """All of a job, if none of it has started."""
        if entry.parts:
            return False
        if entry.transfers and not self._queue.cancel_together(entry.transfers):
            return False
        self._ledger.cancelled(entry)
        self._complete(entry)
        return True

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the offloader is closed")

    # -- what a job asks --

    def _released(self, job: OffloadJob) -> bool:
        return all(map(self._queue.source_released, self._transfers_of(job)))

    def _wait_on(self, job: OffloadJob, stream: Any) -> None:
        for transfer in self._transfers_of(job):
            self._queue.wait_on(transfer, stream)

    def _block(self, job: OffloadJob, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        self._collect()  # what is small may be over
        while job._result is None:
            self._queue.wait(self._transfers_of(job, follows=True), _left(deadline))
            self._collect()

    def _transfers_of(self, job: OffloadJob, follows: bool = False) -> list[int]:
        """The job's transfers under way, and those of the jobs that it follows."""
        with self._lock:
            entry = self._ledger.entry_of(job)
            if entry is None:
                return []
            entries = [entry, *entry.follows] if follows else [entry]
            return [transfer for each in entries for transfer in each.transfers]

    def _check(self) -> None:
        """Asserts that transfers, jobs, keys and pins belong together."""
        with self._lock:
            self._manager._check()
            self._queue._check()
            self._ledger._check()
            known = self._ledger._of_transfer.keys() | self._ledger._cancelled
            assert known == self._queue._worker_of.keys()
            pinned: dict[Direction, Counter[Key]] = {each: Counter() for each in Direction}
            for entry in self._ledger.entries:
                if not entry.moved:
                    pinned[entry.job.direction].update(entry.keys)
            # Every pin is that of a job under way, and the other way round.
            assert self._manager._pins() == (pinned[Direction.LOAD], pinned[Direction.STORE])


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _dropped(pid: int, queue: OffloadingQueueManager, pool: HostPool) -> None:
    """An offloader was collected without `close`."""
    if os.getpid() != pid:  # a fork's copy, of which nothing runs here
        return

    def free() -> None:
        with ExitStack() as rest:
            rest.callback(pool.close)
            rest.callback(queue.shutdown)

    # Not here: whoever's allocation started the collection may hold any lock, and the device may
    # take its time.
    threading.Thread(target=free, name="triton-offload-dropped", daemon=True).start()
    warnings.warn(
        "a KVOffloader was dropped without close(): expected `with KVOffloader(...)`, or a call",
        ResourceWarning,
        stacklevel=2,
    )
