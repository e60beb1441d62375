"""A scheduler's and each rank's connector, joined as vLLM's engine joins them, without an engine.

What the engine hands them (requests, blocks, a step's output) is made here with vLLM's classes.
Imports vllm: for the tests of the plug-in alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faulty import FaultyDevice
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_offload.base import LookupResult, make_offload_key
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus
from vllm_parts import (
    BLOCKS_PER_CHUNK,
    CHUNKS,
    GROUPS,
    PAGES,
    TOKENS,
    make_config,
    random_caches,
)

from triton_offload.vllm import TritonOffloadingConnector
from triton_offload.vllm import connector as plugin_connector
from triton_offload.vllm import spec as plugin_spec
from triton_offload.vllm.group_bytes import BlockRange
from triton_offload.vllm.group_slots import GroupSlotManager

CHUNK_TOKENS = TOKENS * BLOCKS_PER_CHUNK
USED = (192, 200, 64)  # bytes of each tensor's page that groups use


def transfer_config(**changes: Any) -> Any:
    """What follows --kv-transfer-config."""
    values = {
        "kv_connector": "TritonOffloadingConnector",
        "kv_connector_module_path": "triton_offload.vllm",
        "kv_load_failure_policy": "recompute",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": CHUNKS * 4096},
    }
    return KVTransferConfig(**{**values, **changes})


def cache_config(groups: int = 2) -> Any:
    spec = FullAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32)
    return KVCacheConfig(
        num_blocks=20,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec([name], spec) for name in "ab"[:groups]],
    )


def make_request(name: str, chunks: int, prefix: str = "") -> Any:
    """What the connector reads of vLLM's request. Requests of one `prefix` have equal tokens."""
    tokens = chunks * CHUNK_TOKENS + 1
    hashes = [f"{prefix or name}-{i}".encode() for i in range(tokens // TOKENS)]
    return SimpleNamespace(
        request_id=name,
        block_hashes=hashes,
        num_tokens=tokens,
        num_prompt_tokens=tokens,
        num_computed_tokens=0,
        shared_prefix_boundary=0,
        kv_transfer_params=None,
        kv_hints=None,
        skip_reading_prefix_cache=False,
        status=RequestStatus.RUNNING,
        is_finished=lambda: False,
    )


class World:
    """One pool of `CHUNKS` chunks, `ranks` ranks, a faulty device for each of them.

    `sized`: its slots are as large as each group needs, so that there are some more.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        ranks: int = 1,
        policy: str = "lru",
        events: bool = False,
        groups: int = 2,
        sized: bool = False,
        **options: Any,
    ) -> None:
        self.groups = groups
        self.sized = sized
        if sized:
            ranges = [(BlockRange(0, sum(PAGES), sum(n for _, n in each)),) for each in GROUPS]
            monkeypatch.setattr(plugin_connector, "ranges_of_groups", lambda *_: ranges[:groups])
        self.devices = [FaultyDevice() for _ in range(ranks)]
        waiting = iter(self.devices)
        monkeypatch.setattr(plugin_spec, "device_for", lambda *args: next(waiting))
        extra = {
            "cpu_bytes_to_use": 2 * CHUNKS * 4096 if ranks == 2 else CHUNKS * 4096,
            "path": "staged",
            "eviction_policy": policy,
            "spec_name": "TritonOffloadingSpec",
            "spec_module_path": "triton_offload.vllm",
            **options,
        }
        engine_id = make_config().engine_id
        self.config = SimpleNamespace(
            kv_transfer_config=transfer_config(kv_connector_extra_config=extra),
            parallel_config=SimpleNamespace(world_size=ranks, decode_context_parallel_size=1),
            cache_config=SimpleNamespace(
                prefix_cache_retention_interval=None, enable_prefix_caching=True
            ),
            speculative_config=None,
        )

        def make(rank: int, role: Any) -> Any:
            parallel = dataclasses.replace(
                make_config().parallel, rank=rank, world_size=ranks, tp_size=ranks
            )
            made = make_config(
                extra_config=extra,
                engine_id=engine_id,
                parallel=parallel,
                enable_kv_cache_events=events,
                groups=make_config().groups[:groups],
            )
            monkeypatch.setattr(plugin_connector, "build_offloading_config", lambda *args: made)
            return TritonOffloadingConnector(self.config, role, cache_config(groups))

        # In vLLM's order: the scheduler when all ranks have their workers.
        self.ranks = [make(rank, KVConnectorRole.WORKER) for rank in range(ranks)]
        self.caches = [random_caches(rank) for rank in range(ranks)]
        for connector, caches in zip(self.ranks, self.caches, strict=True):
            del caches.group_data_refs[groups:]
            for cache, used in zip(caches.tensors, USED if sized else PAGES, strict=True):
                cache.tensor, cache.page_size_bytes = cache.tensor[:, :used], used
            connector.connector_worker._init_worker(caches)
        self.workers = [connector.connector_worker.worker for connector in self.ranks]
        self.scheduler = make(0, KVConnectorRole.SCHEDULER)
        self.manager = self.scheduler.connector_scheduler.manager
        #: of the pool, where there are tiers, too
        self.primary = getattr(self.manager, "primary_tier", self.manager)
        self._aggregator = KVOutputAggregator(ranks)

    def close(self) -> None:
        for connector in (*self.ranks, self.scheduler):
            connector.shutdown()

    # -- a step of the engine --

    def step(
        self, running: Sequence[tuple[Any, int]] = (), finished: Sequence[Any] = ()
    ) -> KVConnectorOutput:
        """`running`: requests that are computed in it, each with its first block in the device.

        Returns what the ranks told, which the scheduler has been told.
        """
        meta = self.scheduler.build_connector_meta(self._output(running, finished))
        outputs = [self._run(connector, meta) for connector in self.ranks]
        told = [ModelRunnerOutput([], {}, kv_connector_output=output) for output in outputs]
        aggregate = self._aggregator.aggregate(told)
        assert aggregate is not None
        output = aggregate.kv_connector_output
        assert output is not None
        self.scheduler.update_connector_output(output)
        return output

    def settle(self) -> KVConnectorOutput:
        """Steps until every job is reported; what all of them told of requests and blocks."""
        told = KVConnectorOutput(finished_recving=set())
        deadline = time.monotonic() + 60
        while True:
            output = self.step()
            told.finished_recving |= output.finished_recving or set()
            told.failed_recving |= output.failed_recving
            told.invalid_block_ids |= output.invalid_block_ids
            if not self.scheduler.has_pending_push_work():
                return told
            assert time.monotonic() < deadline, "a job was never reported"

    def _output(self, running: Sequence[tuple[Any, int]], finished: Sequence[Any]) -> Any:
        new = [
            SimpleNamespace(req_id=request.request_id, block_ids=self.block_ids(request, first))
            for request, first in running
        ]
        cached = SimpleNamespace(req_ids=[], new_block_ids=[], resumed_req_ids=set())
        for request in finished:
            request.is_finished = lambda: True
            request.status = RequestStatus.FINISHED_LENGTH_CAPPED
            self.scheduler.request_finished(request, [])
        return SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens={r.request_id: r.num_tokens for r, _ in running},
            finished_req_ids={request.request_id for request in finished},
            preempted_req_ids=set(),
            kv_cache_block_copies=None,
            kv_connector_block_state=None,
        )

    @staticmethod
    def _run(connector: Any, meta: Any) -> KVConnectorOutput:
        connector.handle_preemptions(meta)
        connector.bind_connector_metadata(meta)
        connector.start_load_kv(None)
        connector.wait_for_save()
        results = connector.get_transfer_results(set())
        output = KVConnectorOutput(
            finished_sending=results.finished_sending,
            finished_recving=results.finished_recving,
            failed_recving=results.failed_recving,
            invalid_block_ids=connector.get_block_ids_with_load_errors(),
            kv_connector_stats=connector.get_kv_connector_stats(),
            kv_connector_worker_meta=connector.build_connector_worker_meta(),
        )
        connector.clear_connector_metadata()
        return output

    # -- requests --

    def store(self, request: Any, first: int = 0) -> KVConnectorOutput:
        """The request runs, and what it stores ends."""
        assert self.begin(request) == 0
        self.step([(request, first)])
        return self.settle()

    def begin(self, request: Any) -> int:
        """A new request; how many of its tokens are there to load, when tiers have answered too."""
        self.scheduler.on_new_request(request)
        deadline = time.monotonic() + 60
        while (tokens := self.hit_tokens(request)) is None:
            assert time.monotonic() < deadline, "a tier did not answer"
            self.step()
        return tokens

    def block_ids(self, request: Any, first: int) -> tuple[list[int], ...]:
        return _block_ids(request, first)[: self.groups]

    def hit_tokens(self, request: Any) -> int | None:
        """How many of its tokens the scheduler would have loaded."""
        tokens, _ = self.scheduler.get_num_new_matched_tokens(request, 0)
        number: int | None = tokens
        return number

    def begin_load(self, request: Any, first: int = 0) -> int:
        """A new request is given blocks, and a job that loads them in the next step."""
        tokens = self.begin(request)
        assert tokens
        ids = self.block_ids(request, first)
        blocks = KVCacheBlocks(tuple([KVCacheBlock(i) for i in group] for group in ids))
        self.scheduler.update_state_after_alloc(request, blocks, tokens)
        return tokens

    def load(self, request: Any, first: int = 0) -> KVConnectorOutput:
        self.begin_load(request, first)
        return self.settle()

    def keys(self, request: Any) -> list[Any]:
        """Of the request's chunks, group by group."""
        hashes = request.block_hashes[BLOCKS_PER_CHUNK - 1 :: BLOCKS_PER_CHUNK]
        return [make_offload_key(each, group) for group in range(self.groups) for each in hashes]

    def found(self, request: Any) -> list[LookupResult]:
        """What the manager says of each."""
        context = self.scheduler.connector_scheduler._req_status[request.request_id].req_context
        return [self.manager.lookup(key, context) for key in self.keys(request)]

    def check(self) -> None:
        """Every slot is free or one chunk's, and no chunk is used by a transfer."""
        manager = self.primary
        if isinstance(manager, GroupSlotManager):
            manager._slots._check()
            assert not manager._slots.pinned_bytes()
            return
        chunks = [manager._policy.get(key) for key in self._all_keys()]
        slots = [chunk.chunk_id for chunk in chunks] + list(manager._free_list)
        assert sorted(slots) == list(range(manager._num_allocated_chunks))
        assert manager._num_evictable_cache_chunks == len(chunks)
        assert manager._num_write_pending_chunks == 0
        assert all(chunk.ref_cnt == 0 for chunk in chunks)

    def _all_keys(self) -> list[Any]:
        policy = self.primary._policy
        tables = [getattr(policy, name, {}) for name in ("chunks", "t1", "t2")]
        return [key for table in tables for key in table]


def _block_ids(request: Any, first: int) -> tuple[list[int], list[int]]:
    """Of both groups: the device's blocks from `first` on; block 0 is vLLM's null block."""
    number = len(request.block_hashes)
    return (
        [1 + first + i for i in range(number)],
        [1 + (first + number + i) % 19 for i in range(number)],
    )


def read_blocks(caches: Any, request: Any, first: int) -> list[torch.Tensor]:
    """The bytes of the request's blocks that its groups use."""
    return [
        caches.tensors[tensor].tensor[ids, :size].clone()
        for ids, group in zip(_block_ids(request, first), GROUPS, strict=True)
        for tensor, size in group
    ]
