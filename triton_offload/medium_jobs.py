"""Jobs between the pool and a medium of the user's: chunks leave for it, and come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

from triton_offload.job import OffloadJob
from triton_offload.jobs import OffloadingJobs
from triton_offload.medium import ChunkSpec, check_kind, check_spec
from triton_offload.pool.host_pool import HostPool
from triton_offload.request import RequestReader
from triton_offload.scheduler.manager import CPUOffloadingManager
from triton_offload.scheduler.policies import Key
from triton_offload.specs import Direction, Ids, LoadStoreSpec
from triton_offload.transfer.function_worker import TransferFunction
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.queue_manager import OffloadingQueueManager
from triton_offload.transfer.worker import OffloadingWorker


class MediumJobs(OffloadingJobs):
    """What a user's worker moves: no page takes part, and chunks go as they lie in their slots."""

    def __init__(
        self,
        layout: CacheLayout,
        manager: CPUOffloadingManager,
        queue: OffloadingQueueManager,
        pool: HostPool,
    ) -> None:
        super().__init__(manager, queue, pool)
        self._layout = layout
        self._reader = RequestReader(layout)

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
            stored = self._reader.keys(keys, group)
            check_spec("dst", dst)
            self._collect()
            # Any mask will do for what can't be loaded, and is refused by name.
            masks = [self._manager.loadable_blocks(key) or 1 for key in stored]
            slots = self._manager.prepare_load(stored, masks).slot_ids
            with self._submitting(Direction.LOAD, stored, slots) as entry:
                entry.chunks = self._chunks(stored, masks, slots, group, writing=False)
                if stored:
                    entry.transfers.add(self._queue.transfer_async(entry.chunks, dst))
            return entry.job

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
            stored = self._reader.keys(keys, group)
            check_spec("src", src)
            self._queue._worker_for(type(src), ChunkSpec)  # raises before anything is evicted
            self._collect()
            output = self._reserve(stored, blocks, self._layout.groups[group].size)
            slots = output.store_spec.slot_ids
            with self._submitting(
                Direction.STORE, output.keys_to_store, slots, output.pending_keys
            ) as entry:
                entry.chunks = self._chunks(entry.keys, output.blocks, slots, group, writing=True)
                if entry.keys:
                    entry.transfers.add(self._queue.transfer_async(src, entry.chunks))
            return entry.job

    def _chunks(
        self, keys: Sequence[Key], masks: Sequence[int], slots: Ids, group: int, *, writing: bool
    ) -> ChunkSpec:
        keys, layout = self._reader.given(keys), self._layout.groups[group]
        rows = self._pool.slabs.sizes[layout.size].rows(slots)
        pool = self._pool.slots_of(layout.size)
        sums = None
        if self._queue.checksums is not None and not writing:
            sums = [self._queue.checksums.of_slot(slot, group) for slot in slots.tolist()]
        return ChunkSpec.of(
            keys, masks, pool, rows, layout.table, group, writing=writing, sums=sums
        )
