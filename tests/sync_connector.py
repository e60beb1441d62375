"""The connector with loads that the step waits for, on a vLLM that makes none itself (0.32).

vLLM's scheduler knows of such loads since before: a connector that answers (tokens, False). What
vLLM 0.33 does in its own two halves beyond that is done here. Imports vllm: for engines of tests.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from triton_offload.vllm import connector
from triton_offload.vllm.connector_scheduler import TritonConnectorScheduler
from triton_offload.vllm.connector_worker import TritonConnectorWorker

SYNC_JOBS: set[int] = set()  # both halves are in one process


class SyncScheduler(TritonConnectorScheduler):
    """Every load is one that the step waits for: a lookup leaves a token to compute."""

    def get_num_new_matched_tokens(self, request: Any, computed: int, *args: Any, **kw: Any) -> Any:
        tokens, _ = super().get_num_new_matched_tokens(request, computed, *args, **kw)
        assert not tokens or computed + tokens < request.num_tokens
        return tokens, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        before = set(self._jobs)
        # The scheduler has hashed the blocks by now: 0.33 goes by their places.
        groups = [
            [block if block.is_null else KVCacheBlock(block.block_id) for block in group]
            for group in blocks.blocks
        ]
        super().update_state_after_alloc(request, KVCacheBlocks(tuple(groups)), num_external_tokens)
        for job in set(self._jobs) - before:
            status = self._jobs[job]
            names = type(status).__dataclass_fields__
            fields = {name: getattr(status, name) for name in names}
            self._jobs[job] = SimpleNamespace(**fields, is_sync_load=True)
            SYNC_JOBS.add(job)
            # 0.32 asserts that nothing is stored of a request while it is loaded.
            self._req_status[request.request_id].transfer_jobs.discard(job)

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        for job in meta.completed_jobs if meta is not None else ():
            if job in SYNC_JOBS:
                self._req_status[self._jobs[job].req_id].transfer_jobs.add(job)
        super().update_connector_output(connector_output)


class SyncWorker(TritonConnectorWorker):
    def start_kv_transfers(self, metadata: Any) -> None:
        assert self.worker is not None
        loads = {job: metadata.load_jobs.pop(job) for job in SYNC_JOBS & metadata.load_jobs.keys()}
        super().start_kv_transfers(metadata)
        for job, entry in loads.items():
            self._load_jobs[job] = None
            assert self.worker.submit_load(job, entry.src_spec, entry.dst_spec, expedited=True)
        if loads:
            self.worker.wait(loads)


def install() -> None:
    """Let connectors made from now on have these halves."""
    connector.TritonConnectorScheduler = SyncScheduler  # type: ignore[misc]
    connector.TritonConnectorWorker = SyncWorker  # type: ignore[misc]
