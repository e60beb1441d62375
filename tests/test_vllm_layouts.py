"""Every byte of every kind of cache that vLLM lays out, stored and loaded without an engine.

`tests/test_vllm_spec.py` runs this file on the other supported vLLM too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vllm's own imports warn about
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.kv_offload.cpu import spec as cpu_spec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm_layouts import BLOCKS, BLOCKS_EACH, FAMILIES, LOST, POISON, STALE, LaidOut, finish
    from vllm_parts import blocks_of

    from triton_offload.vllm import spec as plugin_spec


@pytest.fixture(autouse=True)
def _on_the_cpu_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plugin_spec, cpu_spec):
        monkeypatch.setattr(module, "current_platform", CpuPlatform())


@contextmanager
def _connected(laid_out: LaidOut) -> Iterator[Any]:
    worker = laid_out.connect()
    try:
        yield worker
    finally:
        worker.shutdown()


def _leave_stale_bytes(
    worker: Any, laid_out: LaidOut, slots: list[int], blocks_per_chunk: int
) -> None:
    """Store chunks of the last group into the slots: the other groups' pages lie elsewhere."""
    before = laid_out.memory.clone()
    laid_out.memory.fill_(STALE)
    num_groups = len(laid_out.groups)
    blocks = [i % BLOCKS for i in range(len(slots) * blocks_per_chunk)]
    stale = blocks_of([*[[]] * (num_groups - 1), blocks], [0] * num_groups)
    assert worker.submit_store(0, stale, CPULoadStoreSpec(slots))
    finish(worker, 0)
    assert (worker.pool.slots[slots] == STALE).any()
    laid_out.memory.copy_(before)


@pytest.mark.parametrize("blocks_per_chunk", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_groups_own_bytes_come_back_and_nothing_else_changes(
    name: str, blocks_per_chunk: int
) -> None:
    family = FAMILIES[name]
    laid_out = LaidOut(family, blocks_per_chunk)
    memory = laid_out.memory
    generator = torch.Generator().manual_seed(0)
    memory.random_(1, STALE, generator=generator)
    before = memory.clone()
    sources, targets = laid_out.drawn(1), laid_out.drawn(2)
    # Groups begin at each place of a chunk, and their last chunk is not full.
    first = [i % blocks_per_chunk for i in range(len(sources))]
    num_chunks = sum(-(-(start + BLOCKS_EACH) // blocks_per_chunk) for start in first)

    wanted = torch.full_like(memory, POISON)
    moved = 0
    for layers, source, target in zip(laid_out.groups, sources, targets, strict=True):
        if family.whole_blocks:
            wanted.view(BLOCKS, -1)[target] = before.view(BLOCKS, -1)[source]
            moved += BLOCKS_EACH * memory.numel() // BLOCKS
        for layer in layers:
            places = laid_out.places(layer)
            wanted[places[target]] = before[places[source]]
            moved += 0 if family.whole_blocks else places[source].numel()

    with _connected(laid_out) as worker:
        pool = worker.pool.slots
        shuffled = torch.randperm(len(pool), generator=generator).tolist()
        slots, others = shuffled[:num_chunks], shuffled[num_chunks:]
        assert len(slots) == num_chunks
        _leave_stale_bytes(worker, laid_out, slots, blocks_per_chunk)
        assert worker.submit_store(1, blocks_of(sources, first), CPULoadStoreSpec(slots))
        assert finish(worker, 1).transfer_size == moved
        assert torch.equal(memory, before), "a store changed pages"
        assert not (pool[others] != 0).any(), "a store changed other slots"
        assert not (pool[slots] == STALE).any(), "what a slot held before is still there"
        assert int((pool[slots] != 0).sum()) == moved, "more than the groups' own bytes"
        stored = pool.clone()

        memory.fill_(POISON)
        assert worker.submit_load(2, CPULoadStoreSpec(slots), blocks_of(targets, first))
        assert finish(worker, 2).transfer_size == moved
        assert torch.equal(memory, wanted)
        assert torch.equal(pool, stored), "a load changed the pool"


def test_the_families_differ_as_they_should() -> None:
    """What makes each of them worth a test is there."""
    laid_out = {name: LaidOut(family, 1) for name, family in FAMILIES.items()}
    for name in ("sliding windows", "Mamba states padded to attention", "DeepSeek V4"):
        groups = [each.kv_cache_spec for each in laid_out[name].placed.kv_cache_groups]
        assert len(groups) >= 3, name
        shared = [laid_out[name].places(layers[0])[1] for layers in laid_out[name].groups]
        assert all(each[0] == shared[0][0] for each in shared), f"{name}: groups do not overlay"
    assert len({len(g) for g in laid_out["sliding windows"].groups}) > 1
    padded = laid_out["Mamba states padded to attention"]
    pages = {layer: padded.places(layer).shape[1] for layer in padded.caches}
    assert pages["mamba.0"] < pages["attention.0"]
    padded = laid_out["attention padded to Mamba states"]
    pages = {layer: padded.places(layer).shape[1] for layer in padded.caches}
    assert pages["mamba.0"] > pages["attention.0"]
    v4 = laid_out["DeepSeek V4"]
    replayed = laid_out["DeepSeek V4, windows replayed"]
    assert len(replayed.groups) < len(replayed.placed.kv_cache_groups)
    assert len({v4.places(layer).shape[1] for layer in v4.caches}) >= 4
    assert len({group.kv_cache_spec.block_size for group in v4.placed.kv_cache_groups}) >= 3


@pytest.mark.parametrize("name", LOST)
def test_blocks_of_which_vllm_would_move_a_part_are_refused(name: str) -> None:
    laid_out = LaidOut(LOST[name], 2)
    with pytest.raises(ValueError, match=r"kv_caches: expected .* VLLM_KV_CACHE_LAYOUT"):
        laid_out.connect()


@pytest.mark.parametrize(
    ("use_mla", "prefix_caching", "refused"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_mla_is_refused_where_vllm_answers_wrongly_after_a_hit(
    use_mla: bool, prefix_caching: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid_out = LaidOut(FAMILIES["MLA with an indexer"], 1)
    config = laid_out.engine_config
    config.model_config.use_mla = use_mla
    config.cache_config.enable_prefix_caching = prefix_caching
    monkeypatch.setattr(plugin_spec, "get_current_vllm_config_or_none", lambda: config)
    if refused:
        with pytest.raises(ValueError, match="enable_prefix_caching: expected True for MLA"):
            laid_out.connect()
    else:
        with _connected(laid_out):
            pass
