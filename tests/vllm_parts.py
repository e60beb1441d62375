"""Configurations and caches as vLLM hands them to the plug-in, made without an engine.

Imports vllm: for the tests of the plug-in alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.kv_offload import base, config
from vllm.v1.kv_offload.cpu import spec as cpu_spec

from triton_offload.vllm import spec as plugin_spec

TOKENS = 32  # of a block
BLOCKS_PER_CHUNK = 3
PAGES = (192, 256, 64)  # padded page bytes of the three tensors
# Both groups lie over tensor 0; group 0 uses 200 of the 256 bytes of tensor 1's page.
GROUPS = (((0, 192), (1, 200)), ((0, 192), (2, 64)))
SLOT = BLOCKS_PER_CHUNK * sum(PAGES)
BLOCKS = 20
CHUNKS = 10


def make_config(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "groups": tuple(
            config.OffloadingGroupConfig(tokens_per_block=TOKENS, layer_names=(name,), group_id=i)
            for i, name in enumerate("ab")
        ),
        "worker_kv_bytes_per_block": sum(PAGES),
        "enable_kv_cache_events": False,
        "extra_config": {"cpu_bytes_to_use": CHUNKS * 4096},
        "engine_id": f"test-{os.getpid()}-{time.monotonic_ns()}",
        "model": config.OffloadingModelConfig(name="model", dtype="float32"),
        "cache": config.OffloadingCacheConfig(
            tokens_per_hash=32, blocks_per_chunk=BLOCKS_PER_CHUNK
        ),
        "parallel": config.OffloadingParallelConfig(
            rank=0,
            **dict.fromkeys(("world_size", "tp_size", "pp_size", "pcp_size", "dcp_size"), 1),
            data_parallel_index=0,
            data_parallel_size=1,
            data_parallel_rank_local=None,
            is_parallelism_agnostic=False,
        ),
    }
    return config.OffloadingConfig(**{**values, **changes})


def random_caches(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randint(-128, 128, (BLOCKS, page), dtype=torch.int8, generator=generator)
        for page in PAGES
    ]
    return base.CanonicalKVCaches(
        [base.CanonicalKVCacheTensor(t, t.shape[1]) for t in tensors],
        [[base.CanonicalKVCacheRef(i, n) for i, n in group] for group in GROUPS],
    )


def pretend_cuda(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Make the platform CUDA, so that there is a shared region, of which nothing is pinned.

    `set_attribute`: setattr, or a monkeypatch's.
    """
    cuda = SimpleNamespace(
        is_cuda=lambda: True,
        is_cpu=lambda: False,
        is_cuda_alike=lambda: True,
        is_rocm=lambda: False,
        is_xpu=lambda: False,
    )
    for module in (plugin_spec, cpu_spec):
        set_attribute(module, "current_platform", cuda)
    set_attribute(plugin_spec, "PIN_MEMORY", False)


def blocks_of(ids: list[list[int]], first: list[int]) -> Any:
    flat = [block for group in ids for block in group]
    return base.GPULoadStoreSpec(flat, group_sizes=[*map(len, ids)], block_indices=first)


# Group 0 begins in the middle of its first chunk and ends in the middle of its second, group 1
# begins at the last block of its first chunk.
STORED = [[7, 3, 11, 4], [2, 9, 14, 0]]
FIRST = [4, 2]
SLOTS = [5, 1, 8, 6]
MOVED = sum(len(b) * sum(n for _, n in g) for b, g in zip(STORED, GROUPS, strict=True))


def store_by_hand(
    pool: torch.Tensor, caches: Any, ids: list[list[int]], first: list[int], slots: list[int]
) -> None:
    """What a store does to the pool, built page by page from the slot format."""
    pool[slots] = 0
    chunk = 0
    for blocks, index, group in zip(ids, first, GROUPS, strict=True):
        start = index % BLOCKS_PER_CHUNK
        for i, block in enumerate(blocks):
            slot, place = (
                slots[chunk + (start + i) // BLOCKS_PER_CHUNK],
                (start + i) % BLOCKS_PER_CHUNK,
            )
            for tensor, size in group:
                offset = BLOCKS_PER_CHUNK * sum(PAGES[:tensor]) + place * PAGES[tensor]
                page = caches.tensors[tensor].tensor[block, :size]
                pool[slot, offset : offset + size] = page.view(torch.uint8)
        chunk += -(-(start + len(blocks)) // BLOCKS_PER_CHUNK) if blocks else 0
