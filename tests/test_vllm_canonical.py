"""vLLM's canonical layout: slots have the bytes that vLLM's own code puts there.

What lies where is asked of vLLM's own copy descriptors, which are carried out byte for byte; its
worker itself takes nothing but GPU tensors. `test_vllm_spec.py` runs this file on the other
supported vLLM, too.
"""

from __future__ import annotations

import ctypes
import dataclasses
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vllm's own imports warn about
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.canonical_mapping import (
        derive_canonical_mappings,
    )
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec
    from vllm.v1.kv_offload import base
    from vllm.v1.kv_offload.cpu import gpu_worker
    from vllm.v1.kv_offload.cpu import spec as cpu_spec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm_parts import blocks_of, make_config

    from triton_offload import vllm as plugin
    from triton_offload.vllm import spec as plugin_spec

pytestmark = pytest.mark.usefixtures("quick_collections")

BLOCKS, TOKENS, HEAD, CHUNKS = 12, 32, 4, 7
LAYERS = {"full.0": 0, "full.1": 0, "other.0": 1}  # the group of each
TOKEN_BYTES = 2 * HEAD * 4  # K and V of a head


@pytest.fixture(autouse=True)
def _on_the_cpu_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plugin_spec, cpu_spec):
        monkeypatch.setattr(module, "current_platform", CpuPlatform())


def _spec(heads: int) -> Any:
    return FullAttentionSpec(
        block_size=TOKENS, num_kv_heads=heads, head_size=HEAD, dtype=torch.float32
    )


def _order(tensor: torch.Tensor, heads_first: bool) -> torch.Tensor:
    """float32 [blocks, heads, tokens, K and V], the same values in the other order in memory."""
    return tensor if heads_first else tensor.transpose(1, 2).contiguous().transpose(1, 2)


class Rank:
    """One rank of `ranks`, which has its heads of the layers' `whole` pages."""

    def __init__(
        self, whole: dict[str, torch.Tensor], ranks: int, rank: int, heads_first: bool
    ) -> None:
        total = next(iter(whole.values())).shape[1]
        heads = max(1, total // ranks)
        first = rank * heads if total >= ranks else rank * total // ranks
        self.pages = {
            name: _order(pages[:, first : first + heads].contiguous(), heads_first)
            for name, pages in whole.items()
        }
        groups = [
            KVCacheGroupSpec([name for name in LAYERS if LAYERS[name] == g], _spec(heads))
            for g in range(2)
        ]
        parallel = SimpleNamespace(
            tensor_parallel_size=ranks,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            cp_kv_cache_interleave_size=1,
            world_size=ranks,
            rank=rank,
        )
        mappings = derive_canonical_mappings(
            SimpleNamespace(
                parallel_config=parallel,
                model_config=SimpleNamespace(get_total_num_kv_heads=lambda: total),
            ),
            SimpleNamespace(num_blocks=BLOCKS, kv_cache_groups=groups),
            self.pages,
        )
        page_bytes = heads * TOKENS * TOKEN_BYTES
        tensors, refs = [], [[], []]
        for i, (name, group) in enumerate(LAYERS.items()):
            raw = torch.empty(0, dtype=torch.int8)
            raw.set_(self.pages[name].untyped_storage(), 0, (BLOCKS, page_bytes), (page_bytes, 1))
            tensors.append(base.CanonicalKVCacheTensor(raw, page_bytes))
            refs[group].append(base.CanonicalKVCacheRef(i, page_bytes, mappings[name]))
        self.caches = base.CanonicalKVCaches(tensors, refs)
        self.bytes_per_block = page_bytes * len(LAYERS)
        self.parallel = dataclasses.replace(
            make_config().parallel, rank=rank, world_size=ranks, tp_size=ranks
        )

    def fill(self, value: int) -> None:
        for cache in self.caches.tensors:
            cache.tensor.fill_(value)


def _whole(heads: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (BLOCKS, heads, TOKENS, 2 * HEAD)
    return {name: torch.randn(shape, generator=generator) for name in LAYERS}


class Engine:
    """The workers of all ranks, over one region."""

    def __init__(
        self,
        folder: Path,
        heads: int,
        ranks: int,
        *,
        span: int = 2,
        path: str = "auto",
        heads_first: bool = True,
        seed: int = 1,
    ) -> None:
        self.span = span
        self.whole = _whole(heads, seed)
        self.ranks = [Rank(self.whole, ranks, rank, heads_first) for rank in range(ranks)]
        config = make_config(
            worker_kv_bytes_per_block=self.ranks[0].bytes_per_block,
            canonical_layout=True,
            kv_cache_layout="LBHNC" if heads_first else "LBNHC",
            cache=dataclasses.replace(make_config().cache, blocks_per_chunk=span),
            extra_config={
                "cpu_bytes_to_use": CHUNKS * ranks * self.ranks[0].bytes_per_block * span,
                "secondary_tiers": [{"type": "fs", "root_dir": str(folder)}],
                "path": path,
                "staging_bytes": 1,
            },
        )
        self.workers = [
            plugin.TritonTieringOffloadingSpec(
                dataclasses.replace(config, parallel=rank.parallel)
            ).get_worker(rank.caches)
            for rank in self.ranks
        ]
        pool = self.workers[0].pool
        assert pool is not None
        assert pool.num_slots == CHUNKS
        assert all(worker.pool.slots.stride(0) == pool.slots.stride(0) for worker in self.workers)
        width = pool.slots.stride(0)
        self.rows: torch.Tensor = pool.slots.as_strided((CHUNKS, width), (width, 1))
        self._jobs = 0

    def move(self, store: bool, ids: list[list[int]], first: list[int], slots: list[int]) -> None:
        blocks = blocks_of(ids, first)
        self._jobs += 1
        for worker in self.workers:
            if store:
                worker.submit_store(self._jobs, blocks, CPULoadStoreSpec(slots))
            else:
                worker.submit_load(self._jobs, CPULoadStoreSpec(slots), blocks)
        for worker in self.workers:
            worker.wait({self._jobs})
            moved = sum(len(b) * n for b, n in zip(ids, self._group_bytes(), strict=True))
            (result,) = worker.get_finished()
            assert result.transfer_size == moved

    def _group_bytes(self) -> list[int]:
        page = self.ranks[0].bytes_per_block // len(LAYERS)
        return [page * [*LAYERS.values()].count(g) for g in range(2)]

    def close(self) -> None:
        del self.rows
        for worker in self.workers:
            worker.shutdown()


def _vllms_bytes(
    engine: Engine, rows: torch.Tensor, ids: list[list[int]], first: list[int], slots: list[int]
) -> None:
    """What vLLM's own worker does to the rows, on every rank."""
    span = engine.span
    for rank in engine.ranks:
        sizes = gpu_worker._canonical_block_sizes(rank.caches.group_data_refs, len(LAYERS))
        handler = gpu_worker.SingleDirectionOffloadingHandler.__new__(
            gpu_worker.SingleDirectionOffloadingHandler
        )
        handler.gpu_to_cpu = True
        handler.layer_refs_per_group = rank.caches.group_data_refs
        handler.src_blocks_per_chunk, handler.dst_blocks_per_chunk = 1, span
        handler.src_tensors = [cache.tensor for cache in rank.caches.tensors]
        begins = np.cumsum([0, *sizes]) * span
        handler.dst_tensors = [
            rows.view(torch.int8)[:, begins[i] : begins[i + 1]] for i in range(len(sizes))
        ]
        handler._canonical_copy_plans = [
            [gpu_worker._build_copy_plan(ref, True) for ref in refs]
            for refs in rank.caches.group_data_refs
        ]
        handler._scratch_bases_src = np.empty(BLOCKS, dtype=np.uint64)
        handler._scratch_bases_dst = np.empty(BLOCKS, dtype=np.uint64)
        chunk = 0
        for group, (blocks, index) in enumerate(zip(ids, first, strict=True)):
            if not blocks:
                continue
            skip = index % span
            chunks = -(-(skip + len(blocks)) // span)
            most = handler._estimate_max_copy_ops(
                [len(blocks) if g == group else 0 for g in range(2)]
            )
            src, dst, num_bytes = (np.empty(most, dtype=np.int64) for _ in range(3))
            count, _ = handler._fill_canonical_ops(
                group,
                group_src=np.array(blocks),
                group_dst=np.array(slots[chunk : chunk + chunks]),
                group_size=len(blocks),
                src_skip_count=0,
                dst_skip_count=skip,
                all_src=src,
                all_dst=dst,
                all_sizes=num_bytes,
                op_idx=0,
            )
            for operation in zip(dst[:count], src[:count], num_bytes[:count], strict=True):
                ctypes.memmove(*map(int, operation))
            chunk += chunks


# (blocks of each group, the place of the first in its first chunk, slots): whole and partial
_STORES: list[tuple[list[list[int]], list[int], list[int]]] = [
    ([[5, 1, 8, 2, 11, 0], []], [0, 0], [4, 1, 6]),
    ([[], [3, 9, 4, 7]], [0, 0], [2, 1]),
    ([[10, 6, 2], [1]], [1, 1], [3, 5, 0]),
]


@pytest.mark.parametrize("path", ["zero_copy", "staged", "copy_engine"])
@pytest.mark.parametrize("heads_first", [True, False], ids=["HND", "NHD"])
@pytest.mark.parametrize(("heads", "ranks"), [(4, 1), (4, 2), (2, 4), (1, 2)])
def test_slots_have_the_bytes_of_vllms_own_code(
    tmp_path: Path, heads: int, ranks: int, heads_first: bool, path: str
) -> None:
    engine = Engine(tmp_path, heads, ranks, path=path, heads_first=heads_first)
    for ids, first, slots in _STORES:
        engine.rows.fill_(0x5A)  # as tiers do, between two jobs
        expected = engine.rows.clone()
        width = engine.workers[0].pool.slots.shape[1]
        expected[slots, :width] = 0  # and what a store does not cover is cleared, of its slots
        _vllms_bytes(engine, expected, ids, first, slots)
        engine.move(True, ids, first, slots)
        assert torch.equal(engine.rows, expected)
    engine.close()


@pytest.mark.parametrize("path", ["zero_copy", "staged", "copy_engine"])
@pytest.mark.parametrize("span", [1, 3])
@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 4), (4, 1)])
def test_engines_of_any_number_of_ranks_read_each_others_chunks(
    tmp_path: Path, writers: int, readers: int, span: int, path: str
) -> None:
    writer = Engine(tmp_path, 4, writers, span=span, path=path)
    reader = Engine(tmp_path, 4, readers, span=span, path=path, seed=2)
    ids, targets = [[5, 1, 8, 2], [3, 9]], [[0, 7, 11, 4], [6, 2]]
    first = [1 % span, 0]
    chunks = [-(-(f + len(b)) // span) for f, b in zip(first, ids, strict=True)]
    slots = [6, 3, 0, 5, 1, 2][: sum(chunks)]
    writer.move(True, ids, first, slots)
    assert writer.rows.shape == reader.rows.shape
    reader.rows.copy_(writer.rows)  # by way of a file
    for rank in reader.ranks:
        rank.fill(0x41)
    poisoned = [
        {name: pages.clone() for name, pages in rank.pages.items()} for rank in reader.ranks
    ]
    reader.move(False, targets, first, slots)
    for rank, wanted in zip(reader.ranks, poisoned, strict=True):
        heads = 4 // readers
        begin = rank.parallel.rank * heads
        for name, group in LAYERS.items():
            whole = writer.whole[name][:, begin : begin + heads]
            wanted[name][targets[group]] = whole[ids[group]]
            assert torch.equal(rank.pages[name], wanted[name])
    writer.close()
    reader.close()


def test_what_is_replicated_takes_the_room_of_one(tmp_path: Path) -> None:
    """As of MLA, whose pages are the same on every rank."""
    rank = Rank(_whole(1, 1), 2, 1, True)
    config = make_config(
        worker_kv_bytes_per_block=rank.bytes_per_block,
        canonical_layout=True,
        replicated_layout=True,
        kv_cache_layout="LBHNC",
        parallel=rank.parallel,
        extra_config={"cpu_bytes_to_use": CHUNKS * 12288},
    )
    spec = plugin.TritonTieringOffloadingSpec(config)
    assert spec.num_chunks == CHUNKS
    worker = spec.get_worker(rank.caches)
    assert worker.pool is not None
    assert worker.pool.slots.shape == (CHUNKS, 3 * rank.bytes_per_block)
    assert worker.pool.slots.stride(0) == 12288  # three blocks, in whole OS pages
    worker.shutdown()


def test_what_vllm_could_not_map_is_refused(tmp_path: Path) -> None:
    rank = Rank(_whole(4, 1), 1, 0, True)
    config = make_config(
        worker_kv_bytes_per_block=rank.bytes_per_block,
        canonical_layout=True,
        extra_config={"cpu_bytes_to_use": CHUNKS * 3 * rank.bytes_per_block},
    )
    small = dataclasses.replace(config, worker_kv_bytes_per_block=4096 // 3)
    with pytest.raises(ValueError, match=r"canonical chunks of at most 4096 bytes .* got 36864"):
        plugin.TritonTieringOffloadingSpec(small).get_worker(rank.caches)
    rank.caches.group_data_refs[0][0].mapping = None
    with pytest.raises(RuntimeError, match="could not be certified for canonical offload"):
        plugin.TritonTieringOffloadingSpec(config).get_worker(rank.caches)
