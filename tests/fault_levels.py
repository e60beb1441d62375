"""The levels of the package that a scenario of faults drives."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from fault_worlds import GROUPS, NUM_CHUNKS, PADDED, SLOT_BYTES, SPAN, FaultWorld

import triton_offload.pool.host_pool as host_pool_module
from triton_offload.calibration import Path
from triton_offload.offloader import KVOffloader
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import CPULoadStoreSpec, GPULoadStoreSpec, TransferStatus
from triton_offload.transfer import layers
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.pipeline import Pipeline
from triton_offload.transfer.queue_manager import transfer_queue


# Some pieces are registered already when the registration of another fails.
def in_pieces(slots: int) -> Any:
    """Pools are pinned so many slots at a time."""
    return patch.object(host_pool_module, "_piece_slots", lambda num_slots, slot_bytes: slots)


class QueueWorld(FaultWorld):
    """Queue manager and pool: a slot for every chunk, and a group whose pages are padded."""

    used = PADDED

    @in_pieces(2)
    def open(self) -> None:
        self.layout = CacheLayout(
            self.tensors, SPAN, [[(i, PADDED[i]) for i in group] for group in GROUPS]
        )
        self.pool = HostPool.allocate(self.device, len(GROUPS) * NUM_CHUNKS, SLOT_BYTES)
        try:
            self.queue = transfer_queue(self.layout, self.pool, options=self.options)
        except BaseException:
            self.pool.close()
            raise

    def close_once(self, timeout: float | None = None) -> None:
        self.queue.shutdown(timeout)
        self.pool.close()
        assert self.queue.get_finished() == []

    @property
    def pipeline(self) -> Pipeline:
        return next(iter(self.queue._workers.values()))._pipeline

    def slot_of(self, group: int, chunk: int) -> int:
        return group * NUM_CHUNKS + chunk

    def drop(self) -> None:
        del self.queue

    def after_step(self) -> None:
        pending = {job.handle for job in self.jobs if job.result is None}
        assert pending <= set(self.queue._worker_of)

    def check_idle(self) -> None:
        assert not self.queue._worker_of
        assert not self.pipeline._jobs.of()

    def _store(self, group, chunks, blocks, first):
        slots = [self.slot_of(group, chunk) for chunk in chunks]
        fresh = [(group, chunk) not in self.have for chunk in chunks]
        device = self._device_spec(group, blocks, first)
        return self.queue.transfer_async(device, CPULoadStoreSpec(slots, fresh))

    def _load(self, group, chunks, blocks, first, expedited):
        slots = [self.slot_of(group, chunk) for chunk in chunks]
        device = self._device_spec(group, blocks, first)
        return self.queue.transfer_async(CPULoadStoreSpec(slots), device, expedited=expedited)

    def _wait(self, jobs, timeout):
        self.queue.wait([job.handle for job in jobs], timeout)

    def _finished(self):
        return [(result.job_id, result) for result in self.queue.get_finished()]

    def _follow(self, job):
        self.queue.wait_on(job.handle, self.device.compute_stream)

    @staticmethod
    def _device_spec(group, blocks, first):
        sizes = [len(blocks) if i == group else 0 for i in range(len(GROUPS))]
        return GPULoadStoreSpec(blocks, sizes, [first] * len(GROUPS))


class OffloaderWorld(FaultWorld):
    """KVOffloader, with room for fewer chunks than there are; it loads by layers."""

    host_bytes = 6 * SLOT_BYTES

    @in_pieces(1)
    def open(self) -> None:
        self._slots: dict[tuple[int, int], int] = {}
        self._removed = 0
        self.offloader = KVOffloader(
            self.tensors,
            self.host_bytes,
            SPAN,
            groups=[list(group) for group in GROUPS],
            enable_events=True,
            options=self.options,
            device=self.device,
        )
        self.pool, self.layout = self.offloader._pool, self.offloader._layout

    def close_once(self, timeout: float | None = None) -> None:
        self.offloader.close(timeout)

    @property
    def pipeline(self) -> Pipeline:
        return next(iter(self.offloader._queue._workers.values()))._pipeline

    def slot_of(self, group: int, chunk: int) -> int:
        slot = self.offloader._manager._slot_of.get(self._full_key(group, chunk))
        if slot is not None:
            self._slots[group, chunk] = slot
        return self._slots[group, chunk]

    def drop(self) -> None:
        del self.offloader

    def after_step(self) -> None:
        """The manager is sound, and nothing that was stored is gone but what was evicted."""
        manager = self.offloader._manager
        manager._check()
        for event in self.offloader.take_events():
            if event.removed:
                self._removed += len(event.keys)
                for key in event.keys:
                    del self.have[key[-1], key[0]]
        assert self._removed == self.offloader._evictions
        for group, chunk in self.have:
            assert self._full_key(group, chunk) in manager._slot_of

    def check_idle(self) -> None:
        stats = self.offloader.stats()
        assert (stats.num_pinned, stats.num_used) == (0, len(self.have))
        assert not self.offloader._ledger._storing
        for group, chunk in self.have:
            assert self.offloader.lookup([bytes([chunk])], group=group) == 1

    @staticmethod
    def _full_key(group: int, chunk: int) -> bytes:
        return bytes([chunk]) + group.to_bytes(4, "big")

    def _store(self, group, chunks, blocks, first):
        keys = [bytes([chunk]) for chunk in chunks]
        return self.offloader.store(keys, blocks, first_block=first, group=group)

    def _load(self, group, chunks, blocks, first, expedited):
        keys = [bytes([chunk]) for chunk in chunks]
        with patch.object(layers, "LEAST_BYTES", 1):  # a band for each tensor
            return self.offloader.load(
                keys, blocks, group=group, expedited=expedited, layers=len(GROUPS[group])
            )

    def _wait(self, jobs, timeout):
        for job in jobs:
            job.handle.block(timeout)

    def _finished(self):
        handles = {job.handle.job_id: job.handle for job in self.jobs}
        results = self.offloader.get_finished()
        for result in results:
            assert handles[result.job_id].result is result
            assert result.status is not TransferStatus.CANCELLED
        return [(handles[result.job_id], result) for result in results]

    def _follow(self, job):
        for layer in range(len(GROUPS[job.group])):
            job.handle.wait_on(self.device.compute_stream, layer=layer)


LEVELS: dict[str, type[FaultWorld]] = {"queue manager": QueueWorld, "offloader": OffloaderWorld}


def begun(level: str, seed: int, path: Path) -> FaultWorld:
    """A world with chunks in its pool."""
    world = LEVELS[level](seed, path)
    world.begin()
    return world
