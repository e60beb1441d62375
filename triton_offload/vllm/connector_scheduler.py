"""The connector's half beside the scheduler: what becomes of the chunks of failed jobs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
)

from triton_offload.specs import Direction
from triton_offload.vllm.failed_stores import FailedStores
from triton_offload.vllm.lost_chunks import LostChunks
from triton_offload.vllm.metrics import LOST_CHUNKS, RECOMPUTED_REQUESTS
from triton_offload.vllm.worker_metadata import TritonWorkerMetadata


class TritonConnectorScheduler(OffloadingConnectorScheduler):  # type: ignore[misc]  # vllm is untyped
    """vLLM's, which completes every job as a success, for jobs that may fail.

    A store that failed on a rank is forgotten, so that its keys look up as missing. The chunks of
    a load that failed are dropped, and its request looks nothing up any more until it has ended:
    it would find the chunks of a lasting fault again and again.
    """

    def __init__(self, spec: Any, vllm_config: Any, kv_cache_config: Any) -> None:
        super().__init__(spec, vllm_config, kv_cache_config)
        self._failed_jobs: set[int] = set()  # that not all ranks have reported yet
        self._lost = LostChunks(self.manager)
        self._failed_stores = FailedStores(self.manager)

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, TritonWorkerMetadata):
            # What a reset of the cache has made stale is not there any more.
            self._failed_jobs |= meta.failed_jobs & self._jobs.keys()
            with self._exclusive():
                self._end_failed(meta.completed_jobs)
        super().update_connector_output(connector_output)
        with self._exclusive():  # vLLM has unpinned them by now
            self._count_lost(Direction.LOAD, self._lost.drop_idle())

    def reset_cache(self) -> None:
        super().reset_cache()
        self._failed_jobs.clear()
        self._lost.clear()

    def _end_failed(self, reports: dict[int, int]) -> None:
        """`reports`: of how many ranks, by job. Until all ranks have reported a job, one of them
        may still write where its chunks lie."""
        last = [
            i for i, n in reports.items() if i in self._jobs and self._jobs[i].pending_count == n
        ]
        for job_id in last:
            # A synchronous load, since 0.33: the steps under way go on with bytes that are not
            # right, and what they store, of any request that shares these blocks, is not either.
            if job_id in self._failed_jobs and getattr(self._jobs[job_id], "is_sync_load", False):
                self._failed_jobs.update(i for i, job in self._jobs.items() if job.is_store)
        for job_id in last:
            if job_id in self._failed_jobs:
                self._failed_jobs.discard(job_id)
                self._end_failed_job(self._jobs[job_id])

    def _end_failed_job(self, job: Any) -> None:
        request = self._req_status[job.req_id]
        if job.is_store:
            self._failed_stores.add(job.keys)
            self._count_lost(Direction.STORE, len(job.keys))
            return
        self._lost.add(job.keys)
        self._connector_stats.increase_counter(RECOMPUTED_REQUESTS)
        request.max_load_tokens = 0
        for group in request.group_states:  # what is recomputed is stored anew
            group.next_stored_chunk_idx = 0

    def _count_lost(self, direction: Direction, number: int) -> None:
        if number:
            self._connector_stats.increase_counter(LOST_CHUNKS, number, (direction.value,))

    def _exclusive(self) -> AbstractContextManager[Any]:
        """What vLLM since 0.33 has its manager called under."""
        return getattr(self, "_manager_locked", nullcontext)()
