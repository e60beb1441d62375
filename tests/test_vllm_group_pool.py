"""How a pool is cut for groups that differ in bytes, and what that comes to.

`tests/test_vllm_spec.py` runs this file on the other supported vLLM too.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vllm's own imports warn about
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import (
        get_offloading_group_ids,
    )
    from vllm_layouts import LARGE, plan

    from triton_offload.vllm.group_bytes import bytes_of, ranges_of_groups
    from triton_offload.vllm.group_pool import GroupPool


def test_what_vllm_tells_of_the_pool_is_of_its_bytes() -> None:
    group = SimpleNamespace(
        group_id=0, tokens_per_block=32, sliding_window_size_in_chunks=None, layer_names=()
    )
    window = SimpleNamespace(
        group_id=3, tokens_per_block=32, sliding_window_size_in_chunks=2, layer_names=()
    )
    config = SimpleNamespace(
        groups=(group, window),
        cache=SimpleNamespace(blocks_per_chunk=2),
        model=SimpleNamespace(max_model_len=1000),
    )

    @dataclasses.dataclass(frozen=True)
    class Info:
        cpu_num_chunks: int = 1
        cpu_kv_cache_size_bytes: int = 1
        cpu_kv_cache_size_tokens: int | None = 1

    pool = GroupPool.fit(2 * 10 * 4096, 2, [4096, 1024])
    told = pool.described(Info(), config)
    # A request of 1,000 tokens has 16 chunks of the one, and two of the other.
    tokens = 10 * 4096 * 1000 // (16 * 4096 + 2 * 1024)
    assert told == Info(40, 2 * 10 * 4096, tokens)
    unknown = pool.described(Info(cpu_kv_cache_size_tokens=None), config)
    assert unknown.cpu_kv_cache_size_tokens is None
    assert pool.size_of_group(config.groups) == {0: 0, 3: 1}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("pool_bytes", [1 << 20, 3_000_001, (1 << 24) + 4095])
def test_all_ranks_together_have_no_more_than_was_given(pool_bytes: int, ranks: int) -> None:
    pool = GroupPool.fit(pool_bytes, ranks, [74816, 95616, 33088, 65600])
    assert pool.slabs.num_bytes <= pool.part_bytes
    assert pool.part_bytes * ranks <= pool_bytes
    assert pool.slabs.num_bytes * ranks >= 0.5 * pool_bytes, "a part of one chunk fills half of it"


@pytest.mark.parametrize("name", LARGE)
def test_the_page_says_what_slots_by_group_come_to(name: str) -> None:
    page = (Path(__file__).parent.parent / "docs" / "vllm.md").read_text()
    placed, pool_bytes = plan(LARGE[name]), 64 << 30
    found = ranges_of_groups(placed, LARGE[name].layout)
    assert found is not None
    own = [*map(bytes_of, found)]
    block_bytes = placed.kv_cache_tensors[0].size // placed.num_blocks
    before = pool_bytes // (-(-block_bytes // 4096) * 4096)  # a row of vLLM's
    pool = GroupPool.fit(pool_bytes, 1, own)
    tokens = [
        placed.kv_cache_groups[i].kv_cache_spec.block_size for i in get_offloading_group_ids(placed)
    ]
    whole = sum(block_bytes / each for each in tokens)
    needed = sum(num_bytes / each for num_bytes, each in zip(own, tokens, strict=True))
    assert f"| {whole:,.0f} | {needed:,.0f} | {whole / needed:.2f} |" in page
    if "replayed" in name:
        return
    for num_bytes, each in zip(own, tokens, strict=True):
        cut = pool.slabs.sizes[pool.sizes.index(num_bytes)]
        after = pool.slabs.num_slabs * cut.per_slab
        row = f"| {each} | {block_bytes:,} | {num_bytes:,} | {before:,} | {after:,} |"
        assert row in page, f"{name}: {row}"
