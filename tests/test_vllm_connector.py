"""The connector without an engine: what becomes of jobs that fail.

`test_vllm_spec.py` runs this file on the other supported vLLM, too.
"""

from __future__ import annotations

import pickle
import re
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from faulty import fail

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vllm's own imports warn about
    import vllm
    from connector_world import (
        CHUNK_TOKENS,
        World,
        cache_config,
        make_request,
        read_blocks,
        transfer_config,
    )
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.kv_offload.base import (
        GPULoadStoreSpec,
        LookupResult,
        OffloadingCounterMetadata,
    )
    from vllm.v1.kv_offload.cpu import spec as cpu_spec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm_parts import BLOCKS_PER_CHUNK, CHUNKS, make_config

    from triton_offload import vllm as plugin
    from triton_offload.errors import DeviceLostError
    from triton_offload.vllm import connector as plugin_connector
    from triton_offload.vllm import options
    from triton_offload.vllm import spec as plugin_spec
    from triton_offload.vllm.metrics import DEFINITIONS
    from triton_offload.vllm.worker_metadata import TritonWorkerMetadata

pytestmark = pytest.mark.usefixtures("quick_collections")

HIT, MISS, PENDING = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING
ALWAYS = 1 << 30


@pytest.fixture(autouse=True)
def _on_the_cpu_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plugin_spec, cpu_spec):
        monkeypatch.setattr(module, "current_platform", CpuPlatform())


@pytest.fixture(params=[False, True], ids=["vLLM's slots", "slots by group"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    world = World(monkeypatch, sized=request.param)
    yield world
    world.close()


@pytest.fixture(params=[False, True], ids=["vLLM's slots", "slots by group"])
def two_ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    world = World(monkeypatch, ranks=2, sized=request.param)
    yield world
    world.close()


# -- loads --


def test_what_was_stored_is_loaded_and_nothing_has_failed(two_ranks: World) -> None:
    request = make_request("a", 2)
    two_ranks.store(request)
    assert two_ranks.found(request) == [HIT] * 4
    wanted = [read_blocks(caches, request, 0) for caches in two_ranks.caches]
    for caches in two_ranks.caches:
        for each in caches.tensors:
            each.tensor.fill_(0x41)
    again = make_request("b", 2, prefix="a")
    told = two_ranks.load(again, first=5)
    assert (told.finished_recving, told.failed_recving) == ({"b"}, set())
    for caches, blocks in zip(two_ranks.caches, wanted, strict=True):
        for got, expected in zip(read_blocks(caches, again, 5), blocks, strict=True):
            assert torch.equal(got, expected)
    two_ranks.check()


@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_a_load_that_fails_fails_its_request_and_drops_its_chunks(
    monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    world = World(monkeypatch, policy=policy, events=True)
    request = make_request("a", 2)
    world.store(request)
    assert len(list(world.scheduler.take_events())) == 4
    again, other = make_request("b", 2, prefix="a"), make_request("c", 2, prefix="a")
    world.devices[0].faults["scatter"] = ALWAYS
    told = world.load(again)
    assert (told.finished_recving, told.failed_recving) == ({"b"}, {"b"})
    assert not told.invalid_block_ids
    assert not world.ranks[0].connector_worker.take_failed_requests(), "told twice"
    assert world.found(request) == [MISS] * 4
    removed = list(world.scheduler.take_events())
    assert {type(each).__name__ for each in removed} == {"BlockRemoved"}
    assert sum(len(each.block_hashes) for each in removed) == 4
    world.check()
    world.devices[0].faults.clear()
    world.store(other, first=3)
    assert world.found(request) == [HIT] * 4
    # All of the pool can be filled again, so no slot was lost and none is had twice.
    world.store(make_request("d", CHUNKS // 2, prefix="d"))
    world.check()
    world.close()


def test_a_request_whose_load_failed_looks_nothing_up_again(world: World) -> None:
    world.store(make_request("a", 2))
    again = make_request("b", 2, prefix="a")
    world.devices[0].faults["scatter"] = 1
    world.load(again)
    # Somebody else has stored the same by now. It could fail the same way, for ever.
    world.store(make_request("c", 2, prefix="a"))
    assert world.found(again) == [HIT] * 4
    assert world.hit_tokens(again) == 0
    new = make_request("d", 2, prefix="a")
    world.scheduler.on_new_request(new)
    assert world.hit_tokens(new) == 2 * CHUNK_TOKENS


def test_what_is_recomputed_is_stored_anew(world: World) -> None:
    world.store(make_request("a", 2))
    again = make_request("b", 2, prefix="a")
    world.devices[0].faults["scatter"] = 1
    world.load(again)
    assert world.hit_tokens(again) == 0
    world.step([(again, 4)])
    world.settle()
    assert world.found(again) == [HIT] * 4


def test_chunks_that_another_load_uses_are_dropped_when_it_ends(world: World) -> None:
    world.store(make_request("a", 2))
    scheduler = world.scheduler.connector_scheduler
    context = scheduler._req_status["a"].req_context
    keys = world.keys(make_request("a", 2))
    world.manager.prepare_load(keys[:1], context)
    again = make_request("b", 2, prefix="a")
    world.devices[0].faults["scatter"] = ALWAYS
    world.load(again)
    assert world.found(again) == [HIT, MISS, MISS, MISS]
    world.settle()
    assert world.found(again) == [HIT, MISS, MISS, MISS]
    world.manager.complete_load(keys[:1], context)
    world.settle()
    assert world.found(again) == [MISS] * 4
    world.check()


def test_a_load_that_fails_on_one_rank_has_failed_when_all_have_ended(two_ranks: World) -> None:
    request = make_request("a", 2)
    two_ranks.store(request)
    two_ranks.devices[1].faults["scatter"] = ALWAYS
    again = make_request("b", 2, prefix="a")
    told = two_ranks.load(again)
    assert (told.finished_recving, told.failed_recving) == ({"b"}, {"b"})
    assert two_ranks.found(request) == [MISS] * 4
    two_ranks.check()


# -- stores --


def test_a_store_that_fails_is_forgotten(world: World) -> None:
    request, other = make_request("a", 2), make_request("b", 1)
    world.devices[0].faults["gather"] = ALWAYS
    world.store(request)
    world.devices[0].faults.clear()
    world.store(other, first=8)
    assert (world.found(request), world.found(other)) == ([MISS] * 4, [HIT] * 2)
    world.check()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_store_that_fails_on_one_rank_keeps_its_slots_until_the_other_ends(
    two_ranks: World, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request("a", 1)
    two_ranks.devices[failing].faults["gather"] = ALWAYS
    slow = two_ranks.workers[1 - failing].transfers
    get_finished = slow.get_finished
    monkeypatch.setattr(slow, "get_finished", list)  # the other rank is not done yet
    two_ranks.scheduler.on_new_request(request)
    two_ranks.step([(request, 0)])
    two_ranks.step()
    two_ranks.workers[failing].wait([0])
    two_ranks.step()
    assert two_ranks.workers[failing].transfers.num_in_flight == 0
    assert two_ranks.found(request) == [PENDING] * 2
    monkeypatch.setattr(slow, "get_finished", get_finished)
    two_ranks.settle()
    assert two_ranks.found(request) == [MISS] * 2
    two_ranks.check()


# -- what is refused --


@pytest.mark.parametrize("what", ["load", "store"])
def test_what_can_not_be_submitted_has_failed(
    world: World, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, again = make_request("a", 2), make_request("b", 2, prefix="a")
    queue = world.workers[0].transfers._manager
    if what == "load":
        world.store(request)
        monkeypatch.setattr(queue, "transfer_async", fail)
        told = world.load(again)
        assert (told.finished_recving, told.failed_recving) == ({"b"}, {"b"})
    else:
        monkeypatch.setattr(queue, "transfer_async", fail)
        world.store(request)
    assert world.found(request) == [MISS] * 4
    world.check()


def test_slots_that_a_rank_does_not_have_are_refused_and_not_written(world: World) -> None:
    worker = world.workers[0]
    blocks = GPULoadStoreSpec([1], group_sizes=[1, 0], block_indices=[0, 0])
    number = worker.transfers.pool.slabs.num_slots
    assert worker.submit_store(1, blocks, CPULoadStoreSpec([number]))
    (report,) = worker.get_finished()
    assert (report.job_id, report.success, report.transfer_size) == (1, True, None)
    (failed,) = worker.take_failed()
    assert (failed.job_id, failed.direction.value, failed.kind.value) == (1, "store", "refused")
    assert worker.take_failed() == worker.get_finished() == []


# -- loads that the step waits for --


def _submit_sync(world: World, job: int) -> None:
    blocks = GPULoadStoreSpec(np.array([3, 4]), group_sizes=[2, 0], block_indices=[0, 0])
    world.workers[0].submit_load(job, CPULoadStoreSpec([0]), blocks, expedited=True)
    world.workers[0].wait([job])


@pytest.mark.parametrize("how", ["failed", "refused"])
def test_a_load_that_its_step_waits_for_fails_its_blocks(
    world: World, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connector = world.ranks[0]
    connector.connector_worker.kv_cache_config = cache_config(groups=1)
    if how == "failed":
        world.devices[0].faults["scatter"] = 1
    else:
        monkeypatch.setattr(world.workers[0].transfers._manager, "transfer_async", fail)
    _submit_sync(world, 7)
    connector._connector_metadata = _no_jobs()
    results = connector.get_transfer_results(set())
    assert (results.finished_recving, results.failed_recving) == (set(), set())
    blocks = connector.get_block_ids_with_load_errors()
    assert blocks == {3, 4}
    assert all(type(block) is int for block in blocks)
    assert connector.get_block_ids_with_load_errors() == set()
    assert connector.build_connector_worker_meta().failed_jobs == {7}
    kinds = {kind.value for (_, kind), count in world.workers[0].survived.items() if count}
    assert kinds == {"sync"}


def test_a_load_that_its_step_waits_for_leaves_no_block_where_it_is_right(world: World) -> None:
    _submit_sync(world, 7)
    assert len(world.workers[0].get_finished()) == 1
    assert not world.workers[0].take_failed()
    assert not world.workers[0]._sync


def test_of_several_groups_such_a_failure_says_which_setting_avoids_it(world: World) -> None:
    world.devices[0].faults["scatter"] = 1
    _submit_sync(world, 7)
    world.ranks[0]._connector_metadata = _no_jobs()
    with pytest.raises(RuntimeError, match=r"load 7.* 2 KV cache groups.*sync_load_budget_bytes"):
        world.ranks[0].get_transfer_results(set())


def _no_jobs() -> Any:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
        OffloadingConnectorMetadata,
    )

    return OffloadingConnectorMetadata({}, {}, set())


def test_what_is_computed_from_such_a_load_is_not_kept(world: World) -> None:
    """The step goes on with wrong bytes; whatever is stored meanwhile may come from them."""
    world.store(make_request("a", 1))
    again, other = make_request("b", 1, prefix="a"), make_request("c", 1)
    world.devices[0].faults["scatter"] = 1
    world.begin_load(again)
    scheduler = world.scheduler.connector_scheduler
    ((job, status),) = scheduler._jobs.items()
    names = [name for name in type(status).__slots__ if name != "is_sync_load"]
    fields = {name: getattr(status, name) for name in names}
    scheduler._jobs[job] = SimpleNamespace(**fields, is_sync_load=True)
    world.scheduler.on_new_request(other)
    world.step([(other, 8)])
    assert world.found(other) == [PENDING] * 2
    world.settle()
    assert world.found(other) == [MISS] * 2
    world.check()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_synchronous_load_of_vllms_that_fails(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = partial(World, monkeypatch, groups=groups, sync_load_budget_bytes="1MiB")
    if vllm.__version__.startswith("0.32"):  # which has none
        with pytest.raises(ValueError, match="sync_load_budget_bytes"):
            build()
        return
    world = build()
    world.store(make_request("a", 2))
    longer = make_request("b", 3, prefix="a")  # whose third chunk is computed in the same step
    world.devices[0].faults["scatter"] = 1
    assert world.begin_load(longer, first=5) == 2 * CHUNK_TOKENS
    if groups == 2:
        with pytest.raises(RuntimeError, match=r"2 KV cache groups.*sync_load_budget_bytes"):
            world.step([(longer, 5)])
        world.close()
        return
    told = world.step([(longer, 5)])
    (blocks,) = world.block_ids(longer, 5)
    assert told.invalid_block_ids == set(blocks[: 2 * BLOCKS_PER_CHUNK])
    assert not told.finished_recving
    assert not told.failed_recving
    world.settle()
    assert world.found(longer) == [MISS] * 3
    world.check()
    world.close()


# -- the end of all --


@pytest.mark.parametrize("where", ["under way", "at submission"])
def test_a_lost_device_ends_the_engine_with_one_clear_message(
    world: World, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*args: Any, **kwargs: Any) -> None:
        raise DeviceLostError("the card fell off the bus")

    if where == "under way":
        world.devices[0].fault = lose
        world.devices[0].faults["gather"] = 1
    else:
        monkeypatch.setattr(world.workers[0].transfers._manager, "transfer_async", lose)
    with pytest.raises(RuntimeError, match=r"device is lost .*fell off the bus.*restart"):
        world.store(make_request("a", 1))


def test_a_reset_makes_failures_under_way_stale(world: World) -> None:
    request, again = make_request("a", 2), make_request("b", 2, prefix="a")
    world.store(request)
    world.devices[0].faults["scatter"] = ALWAYS
    world.begin_load(again)
    scheduler = world.scheduler.connector_scheduler
    world.scheduler.build_connector_meta(world._output([], []))
    (job,) = scheduler._jobs
    world.scheduler.reset_cache()
    told = SimpleNamespace(kv_connector_worker_meta=_failed(job))
    world.scheduler.update_connector_output(told)
    assert not scheduler._failed_jobs
    assert not scheduler._lost._chunks


def test_a_reset_forgets_what_was_to_be_dropped(world: World) -> None:
    request = make_request("a", 1)
    world.store(request)
    scheduler = world.scheduler.connector_scheduler
    context = scheduler._req_status["a"].req_context
    world.manager.prepare_load(world.keys(request), context)
    world.devices[0].faults["scatter"] = ALWAYS
    world.load(make_request("b", 1, prefix="a"))
    scheduler._failed_jobs.add(99)
    world.devices[0].faults.clear()
    assert scheduler._lost._chunks, "another load still uses them"
    world.scheduler.reset_cache()
    assert not scheduler._failed_jobs
    assert not scheduler._lost._chunks
    world.step([(request, 0)])
    world.settle()
    assert world.found(request) == [HIT] * 2


def _failed(job: int) -> TritonWorkerMetadata:
    return TritonWorkerMetadata({job: 1}, failed_jobs={job})


def test_what_ranks_tell_is_joined_and_crosses_processes() -> None:
    both = pickle.loads(pickle.dumps(_failed(1))).aggregate(
        TritonWorkerMetadata({1: 1, 2: 1}, failed_jobs={3})
    )
    assert type(both) is TritonWorkerMetadata
    assert (both.completed_jobs, both.failed_jobs) == ({1: 2, 2: 1}, {1, 3})


def test_a_step_in_which_nothing_ended_tells_nothing(world: World) -> None:
    assert world.step().kv_connector_worker_meta is None


def test_shutdown_forgets_what_failed_and_ends_the_worker(world: World) -> None:
    half = world.ranks[0].connector_worker
    world.devices[0].faults["scatter"] = 1
    half.kv_cache_config = cache_config(groups=1)
    _submit_sync(world, 7)
    half.get_finished(set())
    world.workers[0].submit_store(8, None, None)  # refused
    half.shutdown()
    assert half.take_failed_blocks() == half.take_failed_requests() == set()
    assert half.build_connector_worker_meta() is None
    assert world.workers[0].transfers.pool is None
    assert world.workers[0].get_finished() == world.workers[0].take_failed() == []


# -- configuration --


def _build(monkeypatch: pytest.MonkeyPatch, config: Any) -> Any:
    made = make_config(extra_config=config.kv_connector_extra_config)
    monkeypatch.setattr(plugin_connector, "build_offloading_config", lambda *args: made)
    given = SimpleNamespace(kv_transfer_config=config)
    return plugin.TritonOffloadingConnector(given, KVConnectorRole.WORKER, cache_config())


def test_the_spec_need_not_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    connector = _build(monkeypatch, transfer_config())
    assert type(connector.connector_worker.spec) is plugin.TritonOffloadingSpec
    assert connector.connector_scheduler is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kv_load_failure_policy": "fail"},
            "kv_load_failure_policy: expected \"recompute\" .*TritonOffloadingConnector.*'fail'",
        ),
        (
            {"kv_connector_extra_config": {"spec_name": "CPUOffloadingSpec"}},
            "spec_name: expected TritonOffloadingSpec, .*got 'CPUOffloadingSpec'",
        ),
    ],
)
def test_what_would_not_survive_is_refused_at_start(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transfer_config(**changes)
    with pytest.raises(ValueError, match=message):
        _build(monkeypatch, config)
    with pytest.raises(ValueError, match=message):
        _prometheus(config)


# -- metrics --


def _prometheus(config: Any) -> tuple[Any, CollectorRegistry]:
    registry = CollectorRegistry()
    kinds = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}

    def gauge(*args: Any, multiprocess_mode: str = "", **kwargs: Any) -> Gauge:
        return Gauge(*args, registry=registry, **kwargs)

    given = SimpleNamespace(kv_transfer_config=config)
    shown = plugin.TritonOffloadingConnector.build_prom_metrics(
        given, {**kinds, Gauge: gauge}, ["engine"], {0: ["0"]}
    )
    return shown, registry


def test_metrics_are_shown_beside_vllms(two_ranks: World) -> None:
    shown, registry = _prometheus(two_ranks.config.kv_transfer_config)

    def step(*args: Any) -> None:
        for stats in (
            two_ranks.step(*args).kv_connector_stats,
            two_ranks.scheduler.get_kv_connector_stats(),
        ):
            if stats is not None:
                shown.observe(stats.to_dict())

    def value(name: str, **labels: str) -> float | None:
        found = registry.get_sample_value(f"triton_offload_{name}", {"engine": "0", **labels})
        return found if found is None else float(found)

    request = make_request("a", 2)
    two_ranks.scheduler.on_new_request(request)
    step()
    # A rate needs a value before the first increase.
    assert value("bytes_total", direction="load", path="zero_copy") == 0
    assert value("survived_total", direction="load", kind="sync") == 0
    assert value("jobs_total", direction="store", status="failed") == 0
    step([(request, 0)])
    while two_ranks.scheduler.has_pending_push_work():
        step()
    two_ranks.devices[1].faults["scatter"] = ALWAYS
    two_ranks.begin_load(make_request("b", 2, prefix="a"))
    while two_ranks.scheduler.has_pending_push_work():
        step()
    step()
    stored = 2 * 6 * (192 + 200 + 192 + 64)  # ranks, blocks, bytes of a block in both groups
    assert value("bytes_total", direction="store", path="staged") == stored
    assert value("bytes_total", direction="load", path="staged") == stored / 2
    assert value("jobs_total", direction="store", status="success") == 2
    assert value("jobs_total", direction="load", status="success") == 1
    assert value("jobs_total", direction="load", status="failed") == 1
    assert value("failures_total", direction="load", cause="RuntimeError") == 1
    assert value("survived_total", direction="load", kind="failed") == 1
    assert value("recomputed_requests_total") == 1
    assert value("lost_chunks_total", direction="load") == 4
    assert value("queue_waits_total", direction="store") == 2
    assert value("queue_wait_seconds_total", direction="store") is not None
    assert (value("transfer_seconds_total", direction="load") or 0) > 0
    assert (value("path_seconds_total", direction="load", path="staged") or 0) > 0
    for rank, worker in enumerate(two_ranks.workers):
        pool = worker.transfers.pool
        assert pool is not None
        assert value("pool_bytes", rank=str(rank)) == pool.num_slots * pool.slot_bytes
        assert value("pool_pinned", rank=str(rank)) == pool.pinned
        assert value("path_broken", rank=str(rank), path="staged") == 0
    text = generate_latest(registry).decode()
    assert 'vllm:kv_offload_store_bytes_total{engine="0"}' in text


def test_a_step_in_which_nothing_happened_tells_no_metrics(world: World) -> None:
    world.settle()
    pool = world.workers[0].transfers.pool
    assert pool is not None
    pool.wait_ready(30)
    world.step()
    assert world.step().kv_connector_stats is None


def test_the_page_has_every_metric_and_every_option() -> None:
    page = (Path(__file__).parent.parent / "docs" / "vllm.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    for name, metric in DEFINITIONS.items():
        counter = isinstance(metric, OffloadingCounterMetadata)
        assert name.removeprefix("triton_offload_") + "_total" * counter in named
        assert set(metric.labelnames) <= named
    assert named >= options._OURS | options._VLLMS | options._SINCE_0_33


def test_only_what_changed_is_told(world: World) -> None:
    pool = world.workers[0].transfers.pool
    assert pool is not None
    pool.wait_ready(30)
    first = world.step().kv_connector_stats
    assert first.data["data"].keys() > {"triton_offload_pool_bytes", "triton_offload_survived"}
    for name in "ab":
        request = make_request(name, 1)
        world.scheduler.on_new_request(request)
        world.step([(request, 0)])
        told: dict[str, Any] = {}
        while world.scheduler.has_pending_push_work():
            stats = world.step().kv_connector_stats
            told |= {} if stats is None else stats.data["data"]
        assert told["triton_offload_jobs"] == {("store", "success"): 1}
        assert told["triton_offload_bytes"].keys() == {("store", "staged")}
        assert "triton_offload_pool_bytes" not in told


def test_of_a_worker_that_is_shut_down_counts_remain(world: World) -> None:
    world.store(make_request("a", 1))
    world.ranks[0].shutdown()
    assert world.ranks[0].get_kv_connector_stats() is None
    assert world.workers[0].transfers.stores.succeeded == 1


def test_a_lost_store_is_counted_once(world: World) -> None:
    world.devices[0].faults["gather"] = ALWAYS
    world.store(make_request("a", 2))
    data = world.scheduler.get_kv_connector_stats().data["data"]
    assert data["triton_offload_lost_chunks"] == {("store",): 4}
    assert "triton_offload_recomputed_requests" not in data


def test_each_kind_of_failure_is_logged_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.devices[0].faults["gather"] = ALWAYS
    for name in "abc":
        world.store(make_request(name, 1))
    told = [each.getMessage() for each in caplog.records if "failed" in each.getMessage()]
    assert len(told) == 1
    assert "store 0 failed" in told[0]
    assert "the link is down" in told[0]
