"""Each group's own bytes of a block, in slots as large: what the connector's two halves agree on.

KV caches as vLLM's own code lays them out, without an engine. `tests/test_vllm_spec.py` runs this
file on the other supported vLLM too.
"""

from __future__ import annotations

import dataclasses
import mmap
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from schedules import small_sizes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vllm's own imports warn about
    from vllm.config import CUDAGraphMode
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.kv_offload.base import ReqContext, make_offload_key
    from vllm.v1.kv_offload.cpu import spec as cpu_spec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
    from vllm_layouts import BLOCKS, BLOCKS_EACH, FAMILIES, LOST, POISON, STALE, LaidOut, finish
    from vllm_parts import blocks_of, pretend_cuda

    from triton_offload.vllm import spec as plugin_spec
    from triton_offload.vllm.group_bytes import bytes_of, own_caches, ranges_of_groups
    from triton_offload.vllm.group_slots import GroupSlotManager

# Bytes that groups have of a block, where that is less than all of it.
OWN = {
    "sliding windows": [16384] * 5 + [8192, 16384],
    "sliding windows, cross-layer blocks": [16384] * 5 + [8192, 16384],
    "Mamba states padded to attention": [5056, 5056, 16384],
    "Mamba states in cross-layer blocks": [5056, 5056, 16384],
    "attention padded to Mamba states": [2528, 2528, 2528, 2048],
    "pages of an alignment, cross-layer blocks": [16384],
    "DeepSeek V4": [74816, 74816, 95616, 33088, 65600],
    "DeepSeek V4, windows replayed": [95616, 33088, 65600],
}


@pytest.fixture(autouse=True)
def _on_the_cpu_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plugin_spec, cpu_spec):
        monkeypatch.setattr(module, "current_platform", CpuPlatform())


@contextmanager
def _connected(laid_out: LaidOut, **options: Any) -> Iterator[tuple[Any, Any]]:
    """The scheduler's manager, and the worker of a rank."""
    with ExitStack() as stack:
        rank = laid_out.connector(KVConnectorRole.WORKER, **options)
        stack.callback(rank.shutdown)
        scheduler = laid_out.connector(KVConnectorRole.SCHEDULER, **options)
        stack.callback(scheduler.shutdown)
        yield scheduler.connector_scheduler.manager, rank.connector_worker.worker


def _finish(worker: Any, job_id: int) -> Any:
    result = finish(worker, job_id)
    assert not worker.take_failed()
    return result


def _keys(laid_out: LaidOut, chunks: list[int], prefix: str = "") -> list[Any]:
    """Of so many chunks of each group, group by group."""
    return [
        make_offload_key(f"{prefix}{i}".encode(), group)
        for group, number in zip(laid_out.group_ids, chunks, strict=True)
        for i in range(number)
    ]


def _leave_stale_bytes(laid_out: LaidOut, manager: Any, worker: Any, span: int) -> None:
    """Fill the pool with chunks of every group, and forget them."""
    before = laid_out.memory.clone()
    laid_out.memory.fill_(STALE)
    first = [0] * len(laid_out.groups)
    for number in range(200):
        keys = _keys(laid_out, [1] * len(first), f"stale{number}-")
        output = manager.prepare_store(keys, ReqContext("stale"))
        if output is None or output.evicted_keys:
            break
        blocks = blocks_of([[i % BLOCKS for i in range(span)]] * len(first), first)
        assert worker.submit_store(1000 + number, blocks, output.store_spec)
        _finish(worker, 1000 + number)
        manager.complete_store(keys, ReqContext("stale"))
    pool = worker.transfers.pool.slots
    assert (pool == STALE).float().mean() > 0.5
    manager.reset_cache()
    laid_out.memory.copy_(before)


def _check_blocks(
    laid_out: LaidOut, before: torch.Tensor, sources: list[list[int]], targets: list[list[int]]
) -> None:
    """All that the groups have of these blocks is there, and no more than padding beside it."""
    memory = laid_out.memory
    untouched = torch.ones_like(memory, dtype=torch.bool)
    for layers, source, target in zip(laid_out.groups, sources, targets, strict=True):
        for here, there in zip(source, target, strict=True):
            places = [
                (laid_out.places(each)[here], laid_out.places(each)[there]) for each in layers
            ]
            for old, new in places:
                assert torch.equal(memory[new], before[old])
                untouched[new] = False
            if laid_out.is_packed:
                # Beside the pages of its block: padding, less than a sixteenth of them.
                block = slice(there * len(memory) // BLOCKS, (there + 1) * len(memory) // BLOCKS)
                used = sum(len(new) for _, new in places)
                assert int((memory[block] != POISON).sum()) <= used * 17 // 16
                untouched[block] = False
    assert (memory[untouched] == POISON).all(), "another's bytes were written"


@pytest.mark.parametrize("blocks_per_chunk", [1, 3])
@pytest.mark.parametrize("name", OWN)
def test_each_groups_own_bytes_come_back_and_nothing_else_changes(
    name: str, blocks_per_chunk: int
) -> None:
    _store_and_load(LaidOut(FAMILIES[name], blocks_per_chunk), name, blocks_per_chunk)


@pytest.mark.parametrize("options", [{"path": "staged"}, {"verify": "load"}], ids=str)
def test_so_they_do_on_every_path_and_with_sums(options: dict[str, Any]) -> None:
    _store_and_load(LaidOut(FAMILIES["DeepSeek V4"], 3), "DeepSeek V4", 3, **options)


def _store_and_load(laid_out: LaidOut, name: str, span: int, **options: Any) -> None:
    memory = laid_out.memory
    memory.random_(1, STALE, generator=torch.Generator().manual_seed(0))
    before = memory.clone()
    sources, targets = laid_out.drawn(1), laid_out.drawn(2)
    # Groups begin at each place of a chunk, and their last chunk is not full.
    first = [i % span for i in range(len(sources))]
    chunks = [-(-(start + BLOCKS_EACH) // span) for start in first]
    moved = BLOCKS_EACH * sum(OWN[name])
    keys, context = _keys(laid_out, chunks), ReqContext("request")

    with _connected(laid_out, **options) as (manager, worker):
        pool = worker.transfers.pool.slots
        _leave_stale_bytes(laid_out, manager, worker, span)
        others = pool.clone()
        output = manager.prepare_store(keys, context)
        assert output.keys_to_store == keys
        assert worker.submit_store(1, blocks_of(sources, first), output.store_spec)
        assert _finish(worker, 1).transfer_size == moved
        manager.complete_store(keys, context)
        assert torch.equal(memory, before), "a store changed pages"
        changed = pool != others
        slot_bytes = [n * span for n in OWN[name]]
        written = sum(n * size for n, size in zip(chunks, slot_bytes, strict=True))
        assert int(changed.sum()) <= written, "a store wrote beside its slots"
        assert int((changed & (pool != 0)).sum()) == moved
        stored = pool.clone()

        memory.fill_(POISON)
        spec = manager.prepare_load(keys, context)
        assert spec.block_ids.tolist() == output.store_spec.block_ids.tolist()
        assert worker.submit_load(2, spec, blocks_of(targets, first))
        assert _finish(worker, 2).transfer_size == moved
        manager.complete_load(keys, context)
        _check_blocks(laid_out, before, sources, targets)
        assert torch.equal(pool, stored), "a load changed the pool"


def test_a_flipped_byte_in_a_slot_of_any_size_fails_its_load() -> None:
    laid_out = LaidOut(FAMILIES["DeepSeek V4"], 1)
    laid_out.memory.random_(1, STALE, generator=torch.Generator().manual_seed(0))
    groups = len(laid_out.groups)
    keys, context = _keys(laid_out, [1] * groups), ReqContext("request")
    with _connected(laid_out, verify="load") as (manager, worker):
        output = manager.prepare_store(keys, context)
        blocks = blocks_of([[i] for i in range(groups)], [0] * groups)
        worker.submit_store(1, blocks, output.store_spec)
        _finish(worker, 1)
        pool = worker.transfers.pool
        for group, slot in enumerate(output.store_spec.block_ids.tolist()):
            size = pool.slabs.sizes_of(torch.tensor([slot]).numpy())[0]
            row = pool.slabs.sizes[size].rows(torch.tensor([slot]).numpy())[0]
            place = pool.slots_of(size)[row]
            place[-1] ^= 1
            one = [[group] if i == group else [] for i in range(groups)]
            worker.submit_load(10 + group, CPULoadStoreSpec([slot]), blocks_of(one, [0] * groups))
            finish(worker, 10 + group)
            assert [failed.job_id for failed in worker.take_failed()] == [10 + group]
            place[-1] ^= 1


@pytest.mark.parametrize("name", [*FAMILIES, *LOST])
def test_scheduler_and_ranks_work_out_the_same_bytes(name: str) -> None:
    """From the copy of the configuration that each has."""
    laid_out = LaidOut({**FAMILIES, **LOST}[name], 1)
    layout = laid_out.engine_config.cache_config.kv_cache_layout
    ranges = ranges_of_groups(laid_out.placed, layout)
    assert ranges == ranges_of_groups(laid_out.schedulers, layout)
    assert (ranges and [*map(bytes_of, ranges)]) == OWN.get(name)
    if ranges is not None:
        caches, tensors = own_caches(laid_out.caches, laid_out.placed, ranges)
        for layers, refs in zip(laid_out.groups, caches.group_data_refs, strict=True):
            numbers = {ref.tensor_idx for ref in refs}
            assert {number for name in layers for number in tensors[name]} == numbers


def test_where_groups_are_alike_all_is_vllms() -> None:
    laid_out = LaidOut(FAMILIES["one group"], 2)
    with _connected(laid_out) as (manager, worker):
        assert type(manager) is CPUOffloadingManager
        assert len(worker.transfers.pool.slabs.sizes) == 1
        assert worker.transfers.pool.num_slots == manager._num_chunks


def test_one_size_that_is_less_than_a_block_has_vllms_manager() -> None:
    laid_out = LaidOut(FAMILIES["pages of an alignment, cross-layer blocks"], 2)
    with _connected(laid_out) as (manager, worker):
        assert type(manager) is CPUOffloadingManager
        assert manager._num_chunks == worker.transfers.pool.num_slots
        assert worker.transfers.pool.slot_bytes == 2 * 16384


def test_it_can_be_switched_off() -> None:
    laid_out = LaidOut(FAMILIES["DeepSeek V4"], 2)
    with _connected(laid_out, group_slots=False) as (manager, worker):
        assert type(manager) is CPUOffloadingManager
        assert worker.transfers.pool.slot_bytes == 2 * 95616
    with pytest.raises(ValueError, match="group_slots: expected true or false"):
        laid_out.connector(KVConnectorRole.SCHEDULER, group_slots="no")


def test_in_pipelines_all_is_vllms() -> None:
    """The layers of a group are spread unevenly over stages, and the scheduler knows the first."""
    laid_out = LaidOut(FAMILIES["DeepSeek V4"], 2)
    laid_out.engine_config.parallel_config.pipeline_parallel_size = 2
    with _connected(laid_out) as (manager, worker):
        assert type(manager) is CPUOffloadingManager
        assert worker.transfers.pool.slot_bytes == 2 * 95616


def test_a_pool_of_the_same_bytes_has_more_chunks() -> None:
    laid_out = LaidOut(FAMILIES["DeepSeek V4"], 2)
    pool_bytes = 64 << 20
    with _connected(laid_out, cpu_bytes_to_use=pool_bytes) as (manager, worker):
        assert isinstance(manager, GroupSlotManager)
        slabs = worker.transfers.pool.slabs
        assert pool_bytes * 0.97 < slabs.num_bytes <= pool_bytes
        number_of = {cut.num_bytes: slabs.num_slabs * cut.per_slab for cut in slabs.sizes}
        whole = pool_bytes // (2 * 95616)
        for num_bytes, number in number_of.items():
            assert number >= 0.94 * whole * 2 * 95616 / num_bytes


def test_bytes_that_are_not_where_the_scheduler_thinks_are_refused() -> None:
    laid_out = LaidOut(FAMILIES["DeepSeek V4"], 1)
    layer = "0.compressor"
    cache = laid_out.caches[layer]
    moved = cache.as_strided(cache.shape, cache.stride(), 33088 // 4)  # behind what its group has
    elsewhere = laid_out.memory.clone().view(cache.dtype)
    elsewhere = elsewhere.as_strided(cache.shape, cache.stride(), cache.storage_offset())
    for wrong in (moved, elsewhere):
        laid_out.caches[layer] = wrong
        with pytest.raises(ValueError, match=r"kv_caches\['0.compressor'\]: expected its bytes in"):
            laid_out.connector(KVConnectorRole.WORKER)


def test_caches_of_other_sizes_than_the_slots_are_refused() -> None:
    laid_out = LaidOut(FAMILIES["DeepSeek V4"], 1)
    connector = laid_out.connector(KVConnectorRole.WORKER)
    spec = connector.connector_worker.spec
    connector.shutdown()
    ranges = ranges_of_groups(laid_out.placed, "BLHNC")
    assert ranges is not None
    other = (1, *spec.group_pool.slot_bytes[1:])
    spec.group_pool = dataclasses.replace(spec.group_pool, slot_bytes=other)
    with pytest.raises(ValueError, match=r"expected chunks of .* as the scheduler has slots for"):
        spec.create_worker(own_caches(laid_out.caches, laid_out.placed, ranges)[0])


def test_a_pool_without_room_for_the_largest_chunk_is_refused() -> None:
    laid_out = LaidOut(FAMILIES["DeepSeek V4"], 1)
    connector = laid_out.connector(KVConnectorRole.WORKER)
    with pytest.raises(ValueError, match=r"cpu_bytes_to_use: expected .* chunk of 1099511627776 "):
        connector.connector_worker.spec.size_slots([1 << 40])
    connector.shutdown()


@pytest.mark.parametrize("name", ["sliding windows", "DeepSeek V4"])
def test_each_layer_waits_for_the_bytes_it_reads(name: str) -> None:
    """Of whole blocks a layer waits for what its group has."""
    laid_out = LaidOut(FAMILIES[name], 1)
    memory = laid_out.memory
    memory.random_(1, STALE, generator=torch.Generator().manual_seed(0))
    before = memory.clone()
    blocks = laid_out.drawn(1)
    first = [0] * len(blocks)
    keys, context = _keys(laid_out, [BLOCKS_EACH] * len(blocks)), ReqContext("request")
    step = SimpleNamespace(attn_metadata={}, cudagraph_runtime_mode=CUDAGraphMode.NONE)
    with small_sizes(), _connected(laid_out) as (manager, worker):
        output = manager.prepare_store(keys, context)
        worker.submit_store(1, blocks_of(blocks, first), output.store_spec)
        _finish(worker, 1)
        layers = sorted(name for group in laid_out.groups for name in group)
        loads = worker.layer_loads
        for layer in layers:  # a step without loads, in which all of them ask
            loads.wait_for(layer)
        loads.begin(step)
        assert loads.layers is not None
        memory.fill_(POISON)
        worker.submit_load(2, output.store_spec, blocks_of(blocks, first), expedited=True)
        assert loads.jobs == {2}
        for layer in layers:
            loads.wait_for(layer)
            (group,) = (i for i, names in enumerate(laid_out.groups) if layer in names)
            places = laid_out.places(layer)[blocks[group]]
            assert torch.equal(memory[places], before[places])
        loads.end()
        _finish(worker, 2)


def test_on_cuda_each_rank_has_one_part_of_vllms_region(monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out = LaidOut(FAMILIES["DeepSeek V4"], 1)
    parallel = laid_out.engine_config.parallel_config
    parallel.world_size = parallel.tensor_parallel_size = 2
    parallel.rank = 1
    pretend_cuda(monkeypatch.setattr)
    monkeypatch.setattr(cpu_spec, "_all_workers_barrier", lambda: None)
    regions = []
    create_region = plugin_spec.TritonOffloadingSpec._create_region

    def note_region(self: Any) -> Any:
        regions.append(create_region(self))
        return regions[-1]

    monkeypatch.setattr(plugin_spec.TritonOffloadingSpec, "_create_region", note_region)
    pool_bytes = 8 << 20
    rank = laid_out.connector(KVConnectorRole.WORKER, cpu_bytes_to_use=pool_bytes)
    (region,) = regions
    memory = region.base_tensor.view(torch.uint8)
    assert 0.9 * pool_bytes < len(memory) <= pool_bytes
    mine, others = memory[len(memory) // 2 :], memory[: len(memory) // 2]
    others.fill_(0x55)
    worker = rank.connector_worker.worker
    pool = worker.transfers.pool
    assert pool.slots.data_ptr() == mine.data_ptr()
    assert mine.data_ptr() % mmap.PAGESIZE == 0
    pool.wait_ready(60)
    assert pool.pinned  # by the pool, which was given it unpinned
    assert pool._preparation is not None
    laid_out.memory.fill_(0x22)
    last = pool.slabs.sizes[1].slots(pool.slabs.num_slabs - 1)[-1]
    groups = len(laid_out.groups)
    blocks = blocks_of([[7] if i == 2 else [] for i in range(groups)], [0] * groups)
    worker.submit_store(1, blocks, CPULoadStoreSpec([last]))
    _finish(worker, 1)
    assert int((mine == 0x22).sum()) == 95616
    assert (others == 0x55).all()
    del memory, mine, others, pool
    rank.shutdown()
    assert region.mmap_obj is None
