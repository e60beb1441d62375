"""The jobs of an offloader, from submission to result, and the end of all that they use."""

from __future__ import annotations

import itertools
import os
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Self

from triton_offload.errors import ChecksumError, PoolFullError
from triton_offload.job import OffloadJob
from triton_offload.kernels.arguments import as_seconds, shown
from triton_offload.ledger import Entry, JobLedger
from triton_offload.medium import ChunkSpec
from triton_offload.pool.host_pool import HostPool
from triton_offload.process_lock import ProcessLock
from triton_offload.scheduler.manager import CPUOffloadingManager, PrepareStoreOutput
from triton_offload.scheduler.policies import Key
from triton_offload.specs import Direction, Ids, TransferResult, TransferStatus
from triton_offload.transfer.queue_manager import OffloadingQueueManager


class OffloadingJobs:
    """Jobs between a manager's chunks and a queue's transfers: the owner of every `OffloadJob`.

    Takes over manager, queue and pool; `close` ends them, and so does the collection of one that
    was dropped. A subclass makes the jobs (`_submitting`).
    """

    def __init__(
        self, manager: CPUOffloadingManager, queue: OffloadingQueueManager, pool: HostPool
    ) -> None:
        self._manager, self._queue, self._pool = manager, queue, pool
        # Guards the manager and the jobs: a lookup and the load that follows are one step.
        self._lock = ProcessLock("offloader")
        self._ids = itertools.count(1)
        self._ledger = JobLedger()
        self._evictions = 0
        self._closed = False  # no new jobs
        self._finalizer = weakref.finalize(self, _dropped, os.getpid(), queue, pool)
        # At exit the device ends its threads by itself; draining them first may take long.
        self._finalizer.atexit = False

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- under the lock --

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the offloader is closed")

    def _reserve(
        self, keys: Sequence[Key], masks: Sequence[int] | None, size: int
    ) -> PrepareStoreOutput:
        """Slots of this size for what of these chunks is to be stored."""
        output = self._manager.prepare_store(keys, masks, size=size)
        if output is None:
            slabs = self._pool.slabs
            raise PoolFullError(
                f"host pool: expected room for {len(keys)} chunks, got a pool of "
                f"{slabs.num_slabs * slabs.sizes[size].per_slab} and {self._manager.num_pinned} "
                "chunks pinned by transfers"
            )
        if not output.all_new:  # new ones are the most recent already
            self._manager.touch(keys)
        self._evictions += len(output.evicted_keys)
        return output

    def _submitting(
        self, direction: Direction, keys: Iterable[Key], slots: Ids, follows: Iterable[Key] = ()
    ) -> _Submission:
        """For a block that submits the transfers of a new job and adds them to its entry.

        The manager has prepared `keys` in `slots` for it. `follows`: chunks that other jobs are
        storing. What the block raises passes, with the slots handed back, unless part of the job
        is under way then.
        """
        job = OffloadJob(self, next(self._ids), direction)
        return _Submission(self, Entry(job, list(keys), slots.tolist()), follows)

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
        if entry.chunks is not None and entry.job.direction is Direction.STORE and not missing:
            self._add_up(entry.chunks, entry.slots)
        if missing and all(part.success for part in entry.parts):
            error = RuntimeError(
                f"worker: expected it to write every chunk, got no bytes of {missing[0]!r}"
            )
            failed = TransferResult(entry.job.job_id, TransferStatus.FAILED, error=error)
            entry.parts.append(failed)
        self._return_slots(entry, success=all(part.success for part in entry.parts))
        self._drop_wrong(entry)
        self._ledger.moved(entry)

    def _return_slots(self, entry: Entry, *, success: bool) -> None:
        # By its slots: it may end before an older one of its keys, from before a reset.
        if entry.job.direction is Direction.LOAD:
            self._manager.complete_load(entry.keys, slots=entry.slots)
        else:
            self._manager.complete_store(entry.keys, success=success, slots=entry.slots)

    def _add_up(self, imported: ChunkSpec, slots: list[int]) -> None:
        """What a medium has written goes by no kernel: where bytes are proved, it is read again."""
        if self._queue.checksums is not None:
            blocks = [chunk.blocks for chunk in imported.chunks]
            self._queue.checksums.take_in(self._pool, slots, blocks, imported.group)

    def _drop_wrong(self, entry: Entry) -> None:
        """Chunks whose bytes were wrong are not looked up any more, from their last load on."""
        wrong: set[int] = set()
        for part in entry.parts:
            if isinstance(part.error, ChecksumError):
                wrong.update(part.error.slot_ids)
        if wrong:
            pairs = zip(entry.keys, entry.slots, strict=True)
            found = [(key, slot) for key, slot in pairs if slot in wrong]
            keys, slots = zip(*found, strict=True)
            with suppress(RuntimeError):  # of a user's policy: each load of them fails, then
                self._manager.drop(keys, slots=slots)

    def _cancel(self, entry: Entry) -> bool:
        """All of a job, if none of it has started."""
        if entry.parts:
            return False
        if entry.transfers and not self._queue.cancel_together(entry.transfers):
            return False
        self._ledger.cancelled(entry)
        self._complete(entry)
        return True

    # -- what a job asks (`JobOwner`) --

    def _released(self, job: OffloadJob) -> bool:
        return all(map(self._queue.source_released, self._transfers_of(job)))

    def _wait_on(self, job: OffloadJob, stream: Any, layer: int | None) -> None:
        for transfer in self._transfers_of(job):
            self._queue.wait_on(transfer, stream, layer)

    def _block(self, job: OffloadJob, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        self._collect()  # what is small may be over
        while job._result is None:
            self._queue.wait(self._transfers_of(job, follows=True), _left(deadline))
            self._collect()

    def _block_for_layer(self, job: OffloadJob, layer: int, timeout: float | None) -> None:
        for transfer in self._transfers_of(job):  # a load is one
            self._queue.wait_for_layer(transfer, layer, timeout)

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


class _Submission:
    # Not `contextmanager`, which takes several times as long for each job.

    __slots__ = ("_entry", "_follows", "_owner")

    def __init__(self, owner: OffloadingJobs, entry: Entry, follows: Iterable[Key]) -> None:
        self._owner, self._entry, self._follows = owner, entry, follows

    def __enter__(self) -> Entry:
        return self._entry

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        owner, entry = self._owner, self._entry
        if error is not None:
            if not entry.transfers:
                owner._return_slots(entry, success=False)
                return False
            # Part of it is under way: it ends as failed when that has ended.
            failed = TransferResult(entry.job.job_id, TransferStatus.FAILED, error=error)
            entry.parts.append(failed)
        owner._ledger.open(entry, self._follows)
        if not entry.transfers:
            owner._complete(entry)
        return True


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
