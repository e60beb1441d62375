"""The connector's half on each rank: which requests and jobs failed there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import (
    get_offloading_group_ids,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import (
    OffloadingConnectorWorker,
)

from triton_offload.vllm.group_bytes import GroupRanges, own_caches
from triton_offload.vllm.layer_loads import LayerLoads, tensors_by_layer
from triton_offload.vllm.tolerant_worker import FailedJob, TolerantWorker
from triton_offload.vllm.worker_metadata import TritonWorkerMetadata


class TritonConnectorWorker(OffloadingConnectorWorker):  # type: ignore[misc]  # vllm is untyped
    """vLLM's, and what failed: requests and blocks for the engine, jobs for the scheduler.

    `groups`: of each group its own bytes of a block; None: as vLLM registers caches.
    """

    worker: TolerantWorker | None

    def __init__(
        self,
        spec: Any,
        vllm_config: Any,
        kv_cache_config: Any,
        groups: Sequence[GroupRanges] | None = None,
    ) -> None:
        super().__init__(spec, vllm_config, kv_cache_config)
        self._groups = groups
        self._failed_jobs: set[int] = set()
        self._failed_requests: set[str] = set()
        self._failed_blocks: set[int] = set()

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """`kv_caches`: the layers' tensors, by name. Of those whose blocks groups share, each group
        has its own bytes, where they are known."""
        if self._groups is None:
            super().register_kv_caches(kv_caches)
            return
        self._start(*own_caches(kv_caches, self.kv_cache_config, self._groups))

    def _init_worker(self, kv_caches: Any) -> None:
        ids = get_offloading_group_ids(self.kv_cache_config)
        groups = [self.kv_cache_config.kv_cache_groups[i] for i in ids]
        self._start(kv_caches, tensors_by_layer(groups, kv_caches))

    def _start(self, kv_caches: Any, tensors: Mapping[str, Sequence[int]]) -> None:
        """`tensors`: of each layer, as `LayerLoads` has them."""
        transfers = self.spec.get_worker(kv_caches)
        by_layers = bool(tensors) and self.spec.extra_config.get("load_by_layers", True)
        layer_loads = LayerLoads(transfers, tensors) if by_layers else None
        self.worker = TolerantWorker(transfers, layer_loads)

    @property
    def layer_loads(self) -> LayerLoads | None:
        """The loads of the step that its layers wait for; None where they never do."""
        return None if self.worker is None else self.worker.layer_loads

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        """vLLM's (finished_sending, finished_recving): failed loads are among them."""
        assert self.worker is not None
        if self.layer_loads is not None:
            self.layer_loads.end()
        requests = dict(self._load_jobs)  # vLLM's own call forgets those that ended
        finished: tuple[set[str], set[str]] = super().get_finished(finished_req_ids)
        for failed in self.worker.take_failed():
            self._failed_jobs.add(failed.job_id)
            self._note_blocks(failed)
            request = requests.get(failed.job_id)
            if request is not None:  # a store, or a load that its step waited for
                self._failed_requests.add(request)
        return finished

    def take_failed_requests(self) -> set[str]:
        """Those whose load failed, of what `get_finished` returned since the last call."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def take_failed_blocks(self) -> set[int]:
        """The blocks of loads that failed and that a step waited for."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def build_connector_worker_meta(self) -> TritonWorkerMetadata | None:
        """What ended since the last call, and what of that failed."""
        meta = super().build_connector_worker_meta()
        if meta is None:
            return None
        failed, self._failed_jobs = self._failed_jobs, set()
        return TritonWorkerMetadata(meta.completed_jobs, meta.transfer_stats, failed)

    def shutdown(self) -> None:
        self._failed_jobs.clear()
        self._failed_requests.clear()
        self._failed_blocks.clear()
        super().shutdown()

    def _note_blocks(self, failed: FailedJob) -> None:
        groups = len(self.kv_cache_config.kv_cache_groups)
        if failed.blocks and groups > 1:
            raise RuntimeError(
                f"KV offloading: load {failed.job_id}, which its step waited for, failed, and vLLM "
                f"can't recompute blocks of a model with {groups} KV cache groups: set "
                "sync_load_budget_bytes to 0, and such a failure costs a recompute"
            )
        self._failed_blocks.update(failed.blocks)
