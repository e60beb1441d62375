"""vLLM's tiers without an engine: what lies in files is what the slots held, whatever fails.

`test_vllm_spec.py` runs this file on the other supported vLLM, too.
"""

from __future__ import annotations

import dataclasses
import re
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vllm's own imports warn about
    import vllm
    from connector_world import World, make_request, read_blocks, transfer_config
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.kv_offload.cpu import spec as cpu_spec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory
    from vllm.v1.kv_offload.tiering.fs import manager as files
    from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
    from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
    from vllm_parts import (
        BLOCKS_PER_CHUNK,
        CHUNKS,
        GROUPS,
        PAGES,
        SLOT,
        blocks_of,
        make_config,
        random_caches,
    )

    from triton_offload import vllm as plugin
    from triton_offload.vllm import connector as plugin_connector
    from triton_offload.vllm import spec as plugin_spec
    from triton_offload.vllm.failed_stores import FailedStores
    from triton_offload.vllm.lost_chunks import LostChunks
    from triton_offload.vllm.metrics import DEFINITIONS
    from triton_offload.vllm.stale_regions import region_file

pytestmark = pytest.mark.usefixtures("quick_collections")


@pytest.fixture(autouse=True)
def _on_the_cpu_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plugin_spec, cpu_spec):
        monkeypatch.setattr(module, "current_platform", CpuPlatform())


def _tier(folder: Path, **options: Any) -> dict[str, Any]:
    return {"type": "fs", "root_dir": str(folder), **options}


def _config(folder: Path, **extra: Any) -> Any:
    tiers = {"cpu_bytes_to_use": CHUNKS * 4096, "secondary_tiers": [_tier(folder)]}
    return make_config(extra_config={**tiers, **extra})


def _world(monkeypatch: pytest.MonkeyPatch, folder: Path, ranks: int = 1, **options: Any) -> World:
    return World(
        monkeypatch,
        ranks=ranks,
        spec_name="TritonTieringOffloadingSpec",
        secondary_tiers=[_tier(folder)],
        **options,
    )


def _rows(world: World) -> torch.Tensor:
    """The whole region, a row for each chunk, as the ranks see it."""
    pool = world.workers[0].transfers.pool
    assert pool is not None
    width = pool.slots.stride(0)
    rows: torch.Tensor = pool.slots.as_strided((pool.num_slots, width), (width, 1))
    return rows


def _files(world: World) -> dict[Path, Any]:
    """The file of each chunk of the pool."""
    (tier,) = world.manager.secondary_tiers
    chunks = world.primary._policy.chunks
    return {Path(tier.file_mapper.get_file_name(key)): chunks[key] for key in chunks}


@pytest.mark.parametrize("ranks", [1, 2])
def test_files_are_what_the_slots_hold_and_another_engine_loads_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ranks: int
) -> None:
    request = make_request("a", 2)
    world = _world(monkeypatch, tmp_path, ranks)
    assert type(world.manager) is TieringOffloadingManager
    world.store(request)
    rows = _rows(world)
    stored = _files(world)
    assert len(stored) == 4
    for path, chunk in stored.items():
        written = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        assert torch.equal(written, rows[chunk.chunk_id])
        for rank in range(ranks):  # of every rank there is something
            assert written[rank * SLOT : (rank + 1) * SLOT].any()
    wanted = [read_blocks(caches, request, 0) for caches in world.caches]
    world.check()
    del rows
    world.close()

    world = _world(monkeypatch, tmp_path, ranks)
    for caches in world.caches:
        for each in caches.tensors:
            each.tensor.fill_(0x41)
    again = make_request("b", 2, prefix="a")
    told = world.load(again, first=5)
    assert (told.finished_recving, told.failed_recving) == ({"b"}, set())
    for caches, blocks in zip(world.caches, wanted, strict=True):
        for got, expected in zip(read_blocks(caches, again, 5), blocks, strict=True):
            assert torch.equal(got, expected)
    world.check()
    world.close()


# -- failures --


def test_what_could_not_be_loaded_leaves_the_pool_and_comes_back_from_the_tier(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world = _world(monkeypatch, tmp_path)
    request = make_request("a", 2)
    world.store(request)
    wanted = read_blocks(world.caches[0], request, 0)
    world.devices[0].faults["scatter"] = 1
    again, other = make_request("b", 2, prefix="a"), make_request("c", 2, prefix="a")
    told = world.load(again)
    assert (told.finished_recving, told.failed_recving) == ({"b"}, {"b"})
    assert not world.primary._policy.chunks
    assert world.hit_tokens(again) == 0
    world.check()
    world.step(finished=[request, again])  # who asked before it was there is told the same again
    told = world.load(other, first=5)
    assert (told.finished_recving, told.failed_recving) == ({"c"}, set())
    for got, expected in zip(read_blocks(world.caches[0], other, 5), wanted, strict=True):
        assert torch.equal(got, expected)
    world.check()
    world.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_could_not_be_stored_on_a_rank_reaches_no_tier(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ranks: int
) -> None:
    world = _world(monkeypatch, tmp_path, ranks)
    world.devices[-1].faults["gather"] = 1 << 30
    request = make_request("a", 2)
    world.store(request)
    world.step(finished=[request])
    world.settle()
    assert not list(tmp_path.rglob("*.bin"))
    assert not world.manager._req_state, "the tiers never hear that the request has ended"
    world.check()
    world.devices[-1].faults.clear()
    other = make_request("b", 2, prefix="a")
    assert world.begin(other) == 0
    world.step([(other, 0)])
    world.settle()
    assert len(list(tmp_path.rglob("*.bin"))) == 4
    world.check()
    world.close()


def test_a_lost_chunk_that_a_tier_still_reads_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate = threading.Event()
    write = files.batch_store_block

    def wait_and_write(*args: Any) -> None:
        assert gate.wait(30)
        write(*args)

    monkeypatch.setattr(files, "batch_store_block", wait_and_write)
    world = _world(monkeypatch, tmp_path)
    request = make_request("a", 2)
    assert _stored_in_pool(world, request)
    world.devices[0].faults["scatter"] = 1
    again = make_request("b", 2, prefix="a")
    world.begin_load(again)
    for _ in range(2000):
        if "b" in (world.step().failed_recving or ()):
            break
        time.sleep(0.001)
    else:
        pytest.fail("the load did not fail")
    chunks = dict(world.primary._policy.chunks)
    assert len(chunks) == 4  # they are being written to files
    gate.set()
    world.settle()
    world.step()
    assert not world.primary._policy.chunks
    assert len(list(tmp_path.rglob("*.bin"))) == 4
    world.check()
    world.close()


def _stored_in_pool(world: World, request: Any) -> bool:
    assert world.begin(request) == 0
    world.step([(request, 0)])
    deadline = time.monotonic() + 30
    while not all(chunk.is_ready for chunk in world.primary._policy.chunks.values()):
        world.step()
        assert time.monotonic() < deadline, "nothing was stored"
    return len(world.primary._policy.chunks) == 4


def test_one_failed_store_is_not_another() -> None:
    told: list[tuple[Any, bool]] = []
    manager = SimpleNamespace(
        complete_store=lambda keys, context, success=True: told.append((keys, success))
    )
    failed = FailedStores(manager)
    first, second = {b"a"}, {b"a"}
    failed.add(second)
    assert not told
    manager.complete_store(first, None)
    manager.complete_store(second, None)
    manager.complete_store(second, None)  # another job, which has the set where the other had it
    manager.complete_store(first, None, success=False)
    assert [success for _, success in told] == [True, False, True, False]


def test_a_chunk_that_has_the_key_of_a_lost_one_stays() -> None:
    lost, new = SimpleNamespace(ref_cnt=1), SimpleNamespace(ref_cnt=-1)  # which is being written
    there = {b"key": lost}
    dropped: list[Any] = []
    policy = SimpleNamespace(get=there.get, mark_non_evictable=dropped.append)
    chunks = LostChunks(SimpleNamespace(primary_tier=SimpleNamespace(_policy=policy, events=None)))
    chunks.add([b"key", b"another"])
    assert chunks.drop_idle() == 0
    lost.ref_cnt, there[b"key"] = 0, new  # it was evicted when a tier had read it
    assert chunks.drop_idle() == 0
    assert not dropped
    new.ref_cnt = 0
    assert chunks.drop_idle() == 0, "it is not lost"


# -- what is in a slot --


@pytest.mark.parametrize("path", ["zero_copy", "staged", "copy_engine"])
def test_no_byte_of_what_a_tier_brought_stays_in_a_slot_that_is_stored_to(
    tmp_path: Path, path: str
) -> None:
    worker = plugin.TritonTieringOffloadingSpec(_config(tmp_path, path=path)).get_worker(
        random_caches(0)
    )
    pool = worker.pool
    assert pool is not None
    for job, (ids, slots) in enumerate(
        [([[1, 2, 3], []], [4]), ([[], [4, 5, 6]], [4]), ([[7, 8], []], [2]), ([[], [9]], [4])]
    ):
        pool.slots.fill_(0x5A)  # as a tier does, between two jobs
        worker.submit_store(job, blocks_of(ids, [0, 0]), CPULoadStoreSpec(slots))
        worker.wait({job})
        group = 0 if ids[0] else 1
        covered = torch.zeros(SLOT, dtype=torch.bool)
        for tensor, size in GROUPS[group]:
            for place in range(len(ids[group])):
                begin = BLOCKS_PER_CHUNK * sum(PAGES[:tensor]) + place * PAGES[tensor]
                covered[begin : begin + size] = True
        assert not pool.slots[slots[0]][~covered].any()
        pool.slots[slots[0]] = 0x5A
        assert (pool.slots == 0x5A).all(), "another slot was written"
    worker.shutdown()


# -- the region --


def _worker(config: Any) -> Any:
    return plugin.TritonTieringOffloadingSpec(config).get_worker(random_caches(0))


def test_the_scheduler_maps_what_the_ranks_mapped_and_then_it_has_no_name(tmp_path: Path) -> None:
    config = _config(tmp_path)
    ranks = dataclasses.replace(config.parallel, world_size=2, tp_size=2)
    of_rank = [
        dataclasses.replace(config, parallel=dataclasses.replace(ranks, rank=rank))
        for rank in range(2)
    ]
    workers = [_worker(each) for each in of_rank]
    assert region_file(config.engine_id).exists()
    spec = plugin.TritonTieringOffloadingSpec(of_rank[0])
    manager = spec.get_manager()
    assert spec.get_manager() is manager
    assert not region_file(config.engine_id).exists()
    view = manager.primary_tier.get_kv_memoryview()
    for rank, worker in enumerate(workers):
        worker.pool.slots[3] = 7 + rank
    assert view[3, 0] == 7
    assert view[3, SLOT] == 8
    assert view[3, 2 * SLOT] == 0
    assert all(worker.pool.pinned for worker in workers), "the CPU's kernels can reach any memory"
    del view
    for worker in workers:
        worker.shutdown()
    manager.shutdown()


def test_where_the_scheduler_is_first_the_name_stays_for_the_ranks(tmp_path: Path) -> None:
    config = _config(tmp_path)
    manager = plugin.TritonTieringOffloadingSpec(config).get_manager()
    assert region_file(config.engine_id).exists()
    worker = _worker(config)
    worker.pool.slots[3, 5] = 9
    assert manager.primary_tier.get_kv_memoryview()[3, 5] == 9
    worker.shutdown()
    assert not region_file(config.engine_id).exists()
    manager.shutdown()


def test_a_worker_takes_no_name_away_that_is_another_files(tmp_path: Path) -> None:
    config = _config(tmp_path)
    worker = _worker(config)
    path = region_file(config.engine_id)
    path.unlink()
    path.touch()
    worker.shutdown()
    assert path.exists()
    path.unlink()


def test_a_manager_that_can_not_be_made_leaves_no_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = _config(tmp_path / "file")
    worker = _worker(config)
    with pytest.raises(NotADirectoryError):
        plugin.TritonTieringOffloadingSpec(config).get_manager()
    assert not region_file(config.engine_id).exists()
    worker.shutdown()


def test_only_who_makes_the_region_asks_whether_there_is_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(plugin_spec, "check_room", lambda name, size, folder: asked.append(size))
    config = _config(tmp_path)
    workers = [_worker(config) for _ in range(2)]
    assert asked == [CHUNKS * 4096]
    for worker in workers:
        worker.shutdown()
    monkeypatch.undo()
    monkeypatch.setattr(plugin_spec, "current_platform", CpuPlatform())
    config = _config(tmp_path, cpu_bytes_to_use="10TB")
    with pytest.raises(ValueError, match=r"^cpu_bytes_to_use: expected at most .*got \d.\d TiB$"):
        _worker(config)
    assert not region_file(config.engine_id).exists()


def test_ranks_of_other_numbers_do_not_take_each_others_files_for_theirs(tmp_path: Path) -> None:
    folders = set()
    for ranks in (1, 2):
        config = _config(tmp_path)
        parallel = dataclasses.replace(
            config.parallel, world_size=ranks, tp_size=ranks, is_parallelism_agnostic=True
        )
        size = 2048 // ranks
        config = dataclasses.replace(config, parallel=parallel, worker_kv_bytes_per_block=size)
        manager = plugin.TritonTieringOffloadingSpec(config).get_manager()
        folders.add(manager.secondary_tiers[0].file_mapper.base_path)
        manager.shutdown()
    assert len(folders) == 2


# -- what may be said --

_TIERS = "'example', 'fs', 'p2p', 'obj', 'kvcr'"
_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"secondary_tiers": {"type": "fs"}}, r"secondary_tiers: expected a list of tiers, got {"),
    ({"secondary_tiers": ["fs"]}, r"secondary_tiers\[0\]: expected a tier like .*got 'fs'"),
    ({"secondary_tiers": [{"root_dir": "/"}]}, r"secondary_tiers\[0\]: expected a tier like "),
    (
        {"secondary_tiers": [{"type": "example"}, {"type": "fss"}]},
        rf"secondary_tiers\[1\].type: expected one of \[{_TIERS}\], got 'fss'; was 'fs' meant\?$",
    ),
    (
        {"secondary_tiers": [{"type": "fs", "rootdir": "/"}]},
        r"secondary_tiers\[0\]: expected one of \['backpressure', 'enable_kv_events', 'locality', "
        r"'module_path', 'n_read_threads', 'n_write_threads', 'root_dir', 'type'\], got 'rootdir'; "
        r"was 'root_dir' meant\?$",
    ),
    (
        {"secondary_tiers": [{"type": "fs", "tier_type": "fs"}]},
        r"secondary_tiers\[0\]: .*got 'tier_type'",
    ),
    ({"backpresure": {}}, r"got 'backpresure'; was 'backpressure' meant\?$"),
    ({"store_threshold": 2}, "store_threshold: expected less than 2 beside secondary tiers, got 2"),
]


@pytest.mark.parametrize(("extra", "message"), _REFUSED)
def test_what_tiers_do_not_know_is_refused(
    tmp_path: Path, extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plugin.TritonTieringOffloadingSpec(_config(tmp_path, **extra))


def test_the_options_of_tiering_are_vllms(tmp_path: Path) -> None:
    extra: dict[str, Any] = {
        "backpressure": {"backpressure_cls": "EMABackpressureDetector"},
        "store_threshold": 1,
    }
    if vllm.__version__.startswith("0.32"):
        with pytest.raises(ValueError, match="got 'tier_poll_interval_s'"):
            plugin.TritonTieringOffloadingSpec(_config(tmp_path, tier_poll_interval_s=0.5))
    else:
        extra["tier_poll_interval_s"] = 0.5
    config = _config(tmp_path, **extra)
    spec = plugin.TritonTieringOffloadingSpec(config)
    assert spec.secondary_tier_configs[0]["backpressure"] == extra["backpressure"]
    assert config.extra_config["secondary_tiers"] == [_tier(tmp_path)], "the user's was changed"
    assert plugin.TritonTieringOffloadingSpec(make_config()).secondary_tier_configs == []
    p2p = {"type": "p2p", "anything": "goes on to its transport"}
    assert plugin.TritonTieringOffloadingSpec(_config(tmp_path, secondary_tiers=[p2p]))


def test_metrics_are_vllms_with_those_of_tiers_and_ours(tmp_path: Path) -> None:
    extra = {**_config(tmp_path).extra_config, "spec_name": "TritonTieringOffloadingSpec"}
    extra["spec_module_path"] = "triton_offload.vllm"
    spec = OffloadingSpecFactory.get_spec_cls(extra)
    inherited = TieringOffloadingSpec.build_metric_definitions(extra)
    declared = spec.build_metric_definitions(extra)
    assert declared == {**inherited, **DEFINITIONS}
    wrong = {**extra, "secondary_tiers": [{"type": "fss"}]}
    with pytest.raises(ValueError, match=r"was 'fs' meant\?$"):
        spec.build_metric_definitions(wrong)


@pytest.mark.parametrize("tiers", [[], [{"type": "example"}]])
def test_beside_the_connector_the_spec_is_the_one_that_has_what_is_asked_for(
    tiers: list[Any],
) -> None:
    config = transfer_config(
        kv_connector_extra_config={"cpu_bytes_to_use": 1 << 20, "secondary_tiers": tiers}
    )
    plugin_connector._check(config)
    named = OffloadingSpecFactory.get_spec_cls(config.kv_connector_extra_config)
    wanted = plugin.TritonTieringOffloadingSpec if tiers else plugin.TritonOffloadingSpec
    assert named is wanted


def test_the_spec_without_tiers_names_the_one_with() -> None:
    extra = {"cpu_bytes_to_use": 1 << 20, "secondary_tiers": [{"type": "fs"}]}
    message = re.escape("and TritonTieringOffloadingSpec on to tiers, got [{'type': 'fs'}]")
    with pytest.raises(ValueError, match=message):
        plugin.TritonOffloadingSpec(make_config(extra_config=extra))


def test_the_spec_without_tiers_does_not_know_what_tiers_do() -> None:
    extra = {"cpu_bytes_to_use": 1 << 20, "backpressure": {}}
    with pytest.raises(ValueError, match="got 'backpressure'"):
        plugin.TritonOffloadingSpec(make_config(extra_config=extra))
