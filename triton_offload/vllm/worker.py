"""The worker side: vLLM's jobs, moved by this package's queue manager."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

from vllm.v1.kv_offload import base as vllm_base

from triton_offload.closing import Closing
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import (
    CPULoadStoreSpec,
    Direction,
    GPULoadStoreSpec,
    TransferResult,
    TransferStatus,
)
from triton_offload.stats import DirectionStats, DirectionTotals
from triton_offload.transfer.layers import Layers
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.queue_manager import OffloadingQueueManager

# Less than a step of any model takes on a CPU, and enough for some 10 MB of copies.
_GIVE_WAY_SECONDS = 0.002


#: what who reads of a failure that ended the engine should know
SURVIVED_BY = (
    'the connector of "kv_connector": "TritonOffloadingConnector", "kv_connector_module_path": '
    '"triton_offload.vllm" goes on after this'
)


class JobFailedError(RuntimeError):
    """A job that was accepted did not move all of its bytes; its cause says why."""

    def __init__(self, job_id: int, direction: Direction, result: TransferResult) -> None:
        super().__init__(
            f"KV offloading {direction.value} {job_id} ended as {result.status.value}: "
            f"{result.error!r}; {SURVIVED_BY}"
        )
        self.job_id = job_id
        self.direction = direction
        self.__cause__ = result.error


class TritonOffloadingWorker(vllm_base.OffloadingWorker):  # type: ignore[misc]  # vllm is untyped
    """One rank's transfers. vLLM calls every method from the thread that runs the model.

    `resources`: what `shutdown` closes, the queue manager and the pool among it.
    """

    def __init__(
        self,
        manager: OffloadingQueueManager,
        pool: HostPool,
        layout: CacheLayout,
        resources: Closing,
    ) -> None:
        self.pool: HostPool | None = pool
        self._manager: OffloadingQueueManager | None = manager
        self._layout: CacheLayout | None = layout
        self._resources = resources
        self._ours: dict[int, int] = {}  # vLLM's job id -> ours, until it is reported
        self._theirs: dict[int, tuple[int, Direction]] = {}
        self._totals = {direction: DirectionTotals() for direction in Direction}
        self._reports: list[Any] = []
        self._failures: deque[JobFailedError] = deque()

    @property
    def stores(self) -> DirectionStats:
        """What the stores came to that ended, or were refused."""
        return self._totals[Direction.STORE].stats()

    @property
    def loads(self) -> DirectionStats:
        """The same of the loads."""
        return self._totals[Direction.LOAD].stats()

    @property
    def broken_paths(self) -> tuple[str, ...]:
        """The names of paths that could not be queued, for which others stand in."""
        return () if self._manager is None else self._manager.broken_paths

    @property
    def num_in_flight(self) -> int:
        """Jobs that were submitted and are not reported yet."""
        return len(self._ours)

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Queue device to host. Returns True, or raises with nothing queued.

        vLLM writes a chunk's slot once, with all that the chunk will ever hold: what a partial
        chunk leaves is cleared, for tiers would persist whatever was there.
        """
        self._submit(job_id, _pages(src_spec), _slots(dst_spec, fresh=True), Direction.STORE)
        return True

    def submit_load(
        self,
        job_id: int,
        src_spec: Any,
        dst_spec: Any,
        expedited: bool = False,
        layers: Layers | None = None,
    ) -> bool:
        """Queue host to device; `expedited`: the step waits for it, with `layers` (of `layers`)
        layer by layer. Returns True, or raises."""
        src, dst = _slots(src_spec), _pages(dst_spec)
        self._submit(job_id, src, dst, Direction.LOAD, expedited=expedited, layers=layers)
        return True

    def layers(self, tensors: Sequence[Sequence[int]]) -> Layers:
        """Layers for `submit_load`: of each the tensors, by their numbers in vLLM's
        CanonicalKVCaches, in the order in which layers are computed."""
        assert self._layout is not None
        return Layers(self._layout, tensors)

    def get_finished(self) -> list[Any]:
        """vLLM's TransferResult of each job that ended since the last call, each job once.

        Raises JobFailedError for a job that failed: vLLM's own connector can't do without its
        bytes, and reported as a success it would be a wrong hit. The other jobs are reported by
        the next calls.
        """
        if self._manager is None:
            return []
        self._give_way(self._manager)
        for result in self._manager.get_finished():
            job_id, direction = self._theirs.pop(result.job_id)
            del self._ours[job_id]
            self._totals[direction].add(result)
            if result.status is not TransferStatus.SUCCESS:
                self._failures.append(JobFailedError(job_id, direction, result))
                continue
            self._reports.append(
                vllm_base.TransferResult(
                    job_id=job_id,
                    success=True,
                    transfer_size=result.num_bytes,
                    transfer_time=result.seconds,
                )
            )
        if self._failures:
            raise self._failures.popleft()
        reports, self._reports = self._reports, []
        return reports

    def wait(self, job_ids: Collection[int]) -> None:
        """Block until these jobs have ended, without consuming their results.

        Ids that were never submitted here are ignored: ranks that don't write are asked too.
        """
        if self._manager is not None:
            self._manager.wait([self._ours[job] for job in job_ids if job in self._ours])

    def wait_for_layer(self, job_id: int, layer: int) -> None:
        """Let the current stream, or the host where there is none, wait for the pages of a layer;
        whether they are right the job's end tells."""
        ours = self._ours.get(job_id)
        if self._manager is None or self.pool is None or ours is None:
            return
        stream = self.pool.device.current_stream()
        if stream is None:
            self._manager.wait_for_layer(ours, layer)
        else:
            self._manager.wait_on(ours, stream, layer)

    def shutdown(self) -> None:
        """End every transfer and give the pool back. Idempotent.

        What a step raises is raised when all have run; a later call tries those again.
        """
        self._manager = self.pool = self._layout = None  # nothing here holds memory from now on
        self._ours.clear()
        self._theirs.clear()
        self._reports.clear()
        self._failures.clear()
        self._resources.close()

    def _give_way(self, manager: OffloadingQueueManager) -> None:
        """On the host device, let the oldest loads use the interpreter for a moment.

        An engine that has nothing to do but wait for a load calls `get_finished` in a tight loop.
        On the host device the transfers run in Python threads of the same process, which such a
        loop keeps from the interpreter lock: 60 MB took 1.5 s instead of 10 ms.
        """
        if self.pool is None or not self.pool.device.needs_interpreter:
            return
        loads = [ours for ours, (_, way) in self._theirs.items() if way is Direction.LOAD]
        with suppress(TimeoutError):
            manager.wait(loads, _GIVE_WAY_SECONDS)

    def _submit(
        self,
        job_id: int,
        src: GPULoadStoreSpec | CPULoadStoreSpec,
        dst: GPULoadStoreSpec | CPULoadStoreSpec,
        direction: Direction,
        expedited: bool = False,
        layers: Layers | None = None,
    ) -> None:
        if self._manager is None:
            raise RuntimeError("the offloading worker is shut down")
        if job_id in self._ours:
            raise ValueError(f"job_id: expected an id that is not in flight, got {job_id}")
        try:
            ours = self._manager.transfer_async(src, dst, expedited=expedited, layers=layers)
        except Exception as error:
            refused = TransferResult(job_id, TransferStatus.FAILED, error=error)
            self._totals[direction].add(refused)
            error.add_note(SURVIVED_BY)
            raise
        self._ours[job_id] = ours
        self._theirs[ours] = (job_id, direction)


def _pages(spec: Any) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(spec.block_ids, spec.group_sizes, spec.block_indices)


def _slots(spec: Any, fresh: bool | None = None) -> CPULoadStoreSpec:
    return CPULoadStoreSpec(spec.block_ids, fresh)
