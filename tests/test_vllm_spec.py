"""The plug-in without an engine: specs, workers, jobs, on caches in CPU memory.

The file runs twice: on the vLLM that is installed, and in a process of its own on the Python files
of the other supported one.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faulty import FaultyDevice
from gated import GatedDevice

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vllm's own imports warn about
    import vllm
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.kv_offload import base
    from vllm.v1.kv_offload.cpu import manager as cpu_manager
    from vllm.v1.kv_offload.cpu import shared_offload_region
    from vllm.v1.kv_offload.cpu import spec as cpu_spec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory
    from vllm_parts import (
        BLOCKS,
        BLOCKS_PER_CHUNK,
        CHUNKS,
        FIRST,
        GROUPS,
        MOVED,
        SLOT,
        SLOTS,
        STORED,
        blocks_of,
        make_config,
        pretend_cuda,
        random_caches,
        store_by_hand,
    )

    from triton_offload import calibration
    from triton_offload import vllm as plugin
    from triton_offload.errors import DeviceLostError
    from triton_offload.pool.host_pool import HostPool
    from triton_offload.transfer.queue_manager import OffloadingQueueManager
    from triton_offload.vllm import spec as plugin_spec

_OTHER_VLLM = Path(sys.prefix) / "vllm-0.33"


@pytest.fixture(autouse=True)
def _on_the_cpu_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plugin_spec, cpu_spec):
        monkeypatch.setattr(module, "current_platform", CpuPlatform())


def _drain(worker: Any, count: int) -> dict[int, Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + 30
    while len(results) < count:
        assert time.monotonic() < deadline, f"{len(results)} of {count} jobs were reported"
        for result in worker.get_finished():
            assert result.job_id not in results, "a job was reported twice"
            results[result.job_id] = result
    assert worker.get_finished() == []
    return results


@pytest.fixture
def caches() -> Any:
    return random_caches(0)


@pytest.fixture
def worker(caches: Any) -> Any:
    worker = plugin.TritonOffloadingSpec(make_config()).get_worker(caches)
    yield worker
    worker.shutdown()


def _check_round_trip(worker: Any, caches: Any, pool: torch.Tensor, expedited: bool) -> None:
    # First every slot holds a chunk of one group and then some a chunk of the other, so that
    # what a store doesn't clear shows.
    everything = [block % BLOCKS for block in range(CHUNKS * BLOCKS_PER_CHUNK)]
    stores: list[tuple[list[list[int]], list[int], list[int]]] = [
        ([everything, []], [0, 0], [*range(CHUNKS)]),
        ([[], everything[: 3 * BLOCKS_PER_CHUNK]], [0, 0], [8, 2, 1]),
        (STORED, FIRST, SLOTS),
    ]
    expected = pool.clone()
    for job, (ids, first, slots) in enumerate(stores, 39):
        store_by_hand(expected, caches, ids, first, slots)
        assert worker.submit_store(job, blocks_of(ids, first), CPULoadStoreSpec(slots))
        worker.wait({job})
        assert torch.equal(pool, expected)
    assert _drain(worker, 3)[41].transfer_size == MOVED

    originals = [cache.tensor.clone() for cache in caches.tensors]
    for cache in caches.tensors:
        cache.tensor.fill_(0x41)
    wanted = [cache.tensor.clone() for cache in caches.tensors]
    targets = [[1, 19, 6, 12], [13, 5, 8, 17]]
    for group, sources, blocks in zip(GROUPS, STORED, targets, strict=True):
        for tensor, size in group:
            for source, block in zip(sources, blocks, strict=True):
                wanted[tensor][block, :size] = originals[tensor][source, :size]
    blocks = blocks_of(targets, FIRST)
    assert worker.submit_load(42, CPULoadStoreSpec(SLOTS), blocks, expedited=expedited)
    worker.wait({42})
    for cache, tensor in zip(caches.tensors, wanted, strict=True):
        assert torch.equal(cache.tensor, tensor)
    result = _drain(worker, 1)[42]
    assert (result.success, result.transfer_size) == (True, MOVED)
    assert result.transfer_time >= 0.0
    assert torch.equal(pool, expected)
    assert (worker.stores.jobs, worker.loads.jobs, worker.num_in_flight) == (3, 1, 0)


@pytest.mark.parametrize("expedited", [False, True], ids=["ordinary", "expedited"])
@pytest.mark.parametrize("path", ["auto", "staged", "copy_engine"])
def test_pages_of_overlaid_groups_and_partial_chunks_come_back(
    caches: Any, path: str, expedited: bool
) -> None:
    extra = {"cpu_bytes_to_use": CHUNKS * 4096, "path": path}
    worker = plugin.TritonOffloadingSpec(make_config(extra_config=extra)).get_worker(caches)
    try:
        assert worker.pool is not None
        assert worker.pool.slots.shape == (CHUNKS, SLOT)
        _check_round_trip(worker, caches, worker.pool.slots, expedited)
    finally:
        worker.shutdown()


def _pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A region is shared with nobody: there is no other rank to wait for."""
    pretend_cuda(monkeypatch.setattr)
    monkeypatch.setattr(cpu_spec, "_all_workers_barrier", lambda: None)


def test_on_cuda_the_pool_is_this_ranks_part_of_vllms_shared_region(
    caches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_cuda(monkeypatch)
    regions = []
    create_region = plugin.TritonOffloadingSpec._create_region

    def note_region(self: Any) -> Any:
        regions.append(create_region(self))
        return regions[-1]

    monkeypatch.setattr(plugin.TritonOffloadingSpec, "_create_region", note_region)
    parallel = dataclasses.replace(make_config().parallel, rank=1, world_size=2, tp_size=2)
    changed = make_config(parallel=parallel, replicated_layout=True)
    spec = plugin.TritonOffloadingSpec(changed)
    assert not spec.replicated_layout
    worker = spec.get_worker(caches)
    (region,) = regions
    rows = region.base_tensor.view(torch.uint8).view(spec.num_chunks, spec.kv_bytes_per_chunk)
    rows[:, :SLOT] = 0x77
    rows[:, 2 * SLOT :] = 0x77
    _check_round_trip(worker, caches, rows[:, SLOT : 2 * SLOT], expedited=False)
    assert (rows[:, :SLOT] == 0x77).all(), "the other rank's slots were touched"
    assert (rows[:, 2 * SLOT :] == 0x77).all(), "the padding of the rows was touched"
    del rows
    worker.shutdown()
    assert region.mmap_obj is None
    assert not Path(region.mmap_path).exists()


@pytest.mark.parametrize("failing", [False, True])
def test_before_a_region_is_made_those_of_dead_engines_go(
    caches: Any, failing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_cuda(monkeypatch)
    asked = []

    def remove(engine_id: str) -> None:
        asked.append((engine_id, list(Path("/dev/shm").glob(f"vllm_offload_{engine_id}*"))))
        if failing:
            raise PermissionError("/dev/shm can't be looked at")

    monkeypatch.setattr(plugin_spec, "remove_stale_regions", remove)
    config = make_config()
    plugin.TritonOffloadingSpec(config).get_worker(caches).shutdown()
    assert asked == [(config.engine_id, [])]


# -- what is freed, whatever happens --


def _mappings() -> Counter[str]:
    """What is mapped of shared memory: private pools and regions, by name."""
    names = (line.split(maxsplit=5)[5] for line in _read_maps() if len(line.split()) > 5)
    return Counter(name.strip() for name in names if "/dev/zero" in name or "vllm_offload" in name)


def _read_maps() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()


def _resources() -> tuple[Any, ...]:
    """What this process holds, cycles apart: mappings, threads of ours, vLLM's files."""
    gc.collect()
    threads = Counter(t.name for t in threading.enumerate() if t.name.startswith("triton-offload"))
    opened = sorted(
        path for path in map(_target, Path("/proc/self/fd").iterdir()) if "vllm_offload" in path
    )
    left = sorted(Path("/dev/shm").glob(f"vllm_offload_test-{os.getpid()}-*"))
    return _mappings(), threads, opened, left


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:  # the one of the iteration itself
        return ""


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What vLLM's region warns about, without the tracebacks: those hold what is to be freed."""
    warnings: list[Any] = []
    logger = shared_offload_region.logger
    monkeypatch.setattr(logger, "warning", lambda *args, **kwargs: warnings.append(args[0]))
    return warnings


@pytest.fixture(params=["private", "shared region"])
def pool_kind(
    request: pytest.FixtureRequest, warned: list[Any], monkeypatch: pytest.MonkeyPatch
) -> str:
    if request.param != "private":
        _pretend_cuda(monkeypatch)
    kind: str = request.param
    return kind


class Failing:
    """Calls that fail a number of times, after they did what they do or before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.struck = 0

    def let(self, owner: Any, name: str, times: int, after: bool) -> None:
        original = getattr(owner, name)
        left = times

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                return original(*args, **kwargs)
            left -= 1
            self.struck += 1
            if after:
                original(*args, **kwargs)
            raise OSError(f"injected: {name}")

        self._patch.setattr(owner, name, call)


_STEPS = {
    "manager.shutdown": (OffloadingQueueManager, "shutdown"),
    "pool.close": (HostPool, "close"),
    "release": (SharedOffloadRegion, "cleanup"),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("step", _STEPS)
def test_a_shutdown_of_which_a_step_fails_frees_the_rest_and_then_that_too(
    caches: Any,
    pool_kind: str,
    step: str,
    times: int,
    after: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if step == "release" and pool_kind == "private":
        return  # there is none
    before = _resources()
    owner, name = _STEPS[step]
    failing = Failing(monkeypatch)
    failing.let(owner, name, times, after)
    ran: list[str] = []
    for other, (cls, method) in _STEPS.items():
        if other != step:
            _note_calls(monkeypatch, cls, method, ran, other)
    worker = plugin.TritonOffloadingSpec(make_config()).get_worker(caches)
    worker.submit_store(1, blocks_of([[1], []], [0, 0]), CPULoadStoreSpec([1]))
    assert _resources() != before
    for _ in range(times):
        with pytest.raises(OSError, match=f"injected: {name}"):
            worker.shutdown()
    assert worker.get_finished() == []
    others = [other for other in _STEPS if other != step]
    if pool_kind == "private" and "release" in others:
        others.remove("release")
    assert ran == others, "a step was left out, or run again"
    worker.shutdown()
    worker.shutdown()
    assert failing.struck == times
    assert _resources() == before


@pytest.mark.parametrize("error", [RuntimeError, DeviceLostError])
@pytest.mark.parametrize("method", ["query", "elapsed", "synchronize", "unregister"])
def test_a_shutdown_frees_the_memory_though_the_device_raises(
    caches: Any,
    pool_kind: str,
    method: str,
    error: type[RuntimeError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = _resources()
    device = FaultyDevice()
    monkeypatch.setattr(plugin_spec, "device_for", lambda *args: device)
    extra = {"cpu_bytes_to_use": CHUNKS * 4096, "path": "staged"}
    worker = plugin.TritonOffloadingSpec(make_config(extra_config=extra)).get_worker(caches)
    for job in range(3 * CHUNKS):
        blocks = blocks_of([[job % BLOCKS, 3, 4], []], [0, 0])
        worker.submit_store(job, blocks, CPULoadStoreSpec([job % CHUNKS]))

    def lose(*args: Any, **kwargs: Any) -> None:
        raise error(f"injected: {method}")

    with monkeypatch.context() as patch:
        patch.setattr(device, method, lose)
        with suppress(error):
            worker.shutdown()
        assert _resources()[0] == before[0], "memory is still mapped"
    worker.shutdown()
    assert _resources() == before


def _note_calls(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, into: list[str], what: str
) -> None:
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        into.append(what)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def test_a_region_is_unmapped_though_a_cycle_holds_a_tensor_over_it(
    caches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_cuda(monkeypatch)
    before = _mappings()
    worker = plugin.TritonOffloadingSpec(make_config()).get_worker(caches)
    gc.collect()
    gc.disable()  # or the collector might come by chance
    try:
        cycle: list[Any] = [worker.pool.slots]
        cycle.append(cycle)
        del cycle
        assert _mappings() != before
        worker.shutdown()
        assert _mappings() == before
    finally:
        gc.enable()


_CREATION = {
    "device_for": (plugin_spec, "device_for"),
    "calibration_for": (plugin_spec, "calibration_for"),
    "allocate": (HostPool, "allocate"),
    "pin": (plugin_spec.vllm_worker, "pin_mmap_region"),
    "view": (SharedOffloadRegion, "create_next_worker_view"),
    "from_tensor": (HostPool, "from_tensor"),
    "queue": (plugin_spec, "transfer_queue"),
    "worker": (plugin_spec, "TritonOffloadingWorker"),
}


@pytest.mark.parametrize("step", _CREATION)
def test_a_worker_that_can_not_be_made_leaves_nothing_and_a_second_try_works(
    caches: Any, pool_kind: str, step: str, warned: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if step in (["pin", "view", "from_tensor"] if pool_kind == "private" else ["allocate"]):
        return  # takes no part
    monkeypatch.setattr(plugin_spec, "PIN_MEMORY", True)
    for name in ("host_register", "host_unregister"):
        monkeypatch.setattr(plugin_spec.vllm_worker, name, lambda *args: True)
    monkeypatch.setattr(shared_offload_region, "host_unregister", lambda *args: True)
    before = _resources()
    spec = plugin.TritonOffloadingSpec(make_config())
    failing = Failing(monkeypatch)
    owner, name = _CREATION[step]
    failing.let(owner, name, 1, after=False)
    with pytest.raises(OSError, match=f"injected: {name}"):
        spec.get_worker(caches)
    assert _resources() == before
    assert not warned
    worker = spec.get_worker(caches)
    _check_round_trip(worker, caches, worker.pool.slots[:, :SLOT], expedited=False)
    worker.shutdown()
    assert _resources() == before


@pytest.mark.parametrize("path", ["auto", "staged"])
@pytest.mark.parametrize("where", ["inference mode", "another default device"])
def test_a_worker_is_made_wherever_the_engine_builds_it(
    caches: Any, pool_kind: str, path: str, where: str
) -> None:
    extra = {"cpu_bytes_to_use": CHUNKS * 4096, "path": path}
    spec = plugin.TritonOffloadingSpec(make_config(extra_config=extra))
    with torch.inference_mode() if where == "inference mode" else torch.device("meta"):
        worker = spec.get_worker(caches)
    try:
        _check_round_trip(worker, caches, worker.pool.slots[:, :SLOT], expedited=False)
    finally:
        worker.shutdown()


def test_what_is_pinned_at_once_bounds_what_is_copied_at_once(
    caches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_cuda(monkeypatch)
    registered: list[tuple[int, int]] = []

    def register(address: int, size: int) -> bool:
        registered.append((address, size))
        return True

    monkeypatch.setattr(plugin_spec, "PIN_MEMORY", True)
    monkeypatch.setattr(plugin_spec.vllm_worker, "host_register", register)
    monkeypatch.setattr(shared_offload_region, "host_unregister", lambda address: None)
    row = 4096
    # bytes that are pinned at once, rows that are
    for most, rows in [
        (row, 1),
        (2 * row - 1, 1),
        (2 * row, 2),
        (3 * row, 3),
        (4 * row - 1, 3),
        (9 * row, 9),
        (10 * row, 10),
        (99 * row, 10),
        (1, 1),
    ]:
        monkeypatch.setattr(plugin_spec.vllm_worker, "MAX_HOST_REGISTER_CHUNK_BYTES", most)
        registered.clear()
        worker = plugin.TritonOffloadingSpec(make_config()).get_worker(caches)
        assert worker.pool.pinned
        assert worker.pool.piece_slots == rows
        # Two slots of one piece lie in one range that was pinned.
        start = worker.pool.slots.data_ptr()
        for slot in range(CHUNKS):
            piece = slot // worker.pool.piece_slots * worker.pool.piece_slots
            address = start + slot * row
            (begin, size) = next(r for r in registered if r[0] <= address < r[0] + r[1])
            assert begin <= start + piece * row
            assert address + SLOT <= begin + size
        worker.shutdown()


def test_slots_that_are_pinned_one_by_one_are_copied_one_by_one(
    caches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_cuda(monkeypatch)
    monkeypatch.setattr(plugin_spec, "PIN_MEMORY", True)
    monkeypatch.setattr(shared_offload_region, "host_unregister", lambda address: None)

    def pin_slots(region: Any, worker_slot_only: bool = False) -> None:
        start = region.base_tensor.data_ptr()
        order = [*range(4, CHUNKS), *range(4)]  # each rank begins elsewhere
        region.pinned_addresses.extend(start + 4096 * row for row in order)
        region.is_pinned = True

    monkeypatch.setattr(plugin_spec.vllm_worker, "pin_mmap_region", pin_slots)
    worker = plugin.TritonOffloadingSpec(make_config()).get_worker(caches)
    assert worker.pool.piece_slots == 1
    worker.shutdown()


# -- what vLLM writes anew --


@pytest.mark.parametrize("wide", [False, True], ids=["vllm's int32", "int64"])
def test_ids_are_the_jobs_own_from_the_moment_of_the_call(
    monkeypatch: pytest.MonkeyPatch, wide: bool
) -> None:
    jobs = 120
    gate = GatedDevice()
    monkeypatch.setattr(plugin_spec, "device_for", lambda *args: gate)
    caches = random_caches(1)
    extra = {"cpu_bytes_to_use": jobs * 4096}
    worker = plugin.TritonOffloadingSpec(make_config(extra_config=extra)).get_worker(caches)
    pages, slots = blocks_of([[0, 0], []], [0, 0]), CPULoadStoreSpec([0])
    if wide:
        pages.block_ids, slots.block_ids = (ids.block_ids.astype("int64") for ids in (pages, slots))
    worker.pool.slots.fill_(0x5A)
    expected = worker.pool.slots.clone()
    gate.gate.clear()
    for job in range(jobs):
        blocks, first = [job % BLOCKS, (job + 7) % BLOCKS], job % 2
        pages.block_ids[:], slots.block_ids[:] = blocks, job
        pages.group_sizes, pages.block_indices = [2, 0], [first, 0]
        store_by_hand(expected, caches, [blocks, []], [first, 0], [job])
        worker.submit_store(job, pages, slots)
        # What is written where these point is wrong, or out of bounds.
        pages.block_ids[:], slots.block_ids[:] = 10**9, 10**9
        pages.group_sizes[:], pages.block_indices[:] = [9, 9], [9, 9]
    gate.gate.set()
    _drain(worker, jobs)
    assert torch.equal(worker.pool.slots, expected)

    wanted = [cache.tensor.clone() for cache in caches.tensors]
    for cache in caches.tensors:
        cache.tensor.fill_(0x41)
    gate.gate.clear()
    for job in range(BLOCKS // 2):  # blocks 2n and 2n + 1 again from any chunk that has them
        for block in (2 * job, 2 * job + 1):
            chunk = block if block % 2 == 0 else block + BLOCKS  # the first block of its run
            pages.group_sizes, pages.block_indices = [1, 0], [chunk % 2, 0]
            source = base.GPULoadStoreSpec([block], [1, 0], [chunk % 2, 0])
            source.block_ids = pages.block_ids[:1]
            source.block_ids[:], slots.block_ids[:] = block, chunk
            worker.submit_load(1000 + block, slots, source)
            source.block_ids[:], slots.block_ids[:] = 10**9, 10**9
    gate.gate.set()
    _drain(worker, BLOCKS)
    for tensor, size in GROUPS[0]:
        got = caches.tensors[tensor].tensor
        assert torch.equal(got[:, :size], wanted[tensor][:, :size])
        assert (got[:, size:] == 0x41).all()
    worker.shutdown()


# -- jobs --


def test_a_wait_is_for_every_job_that_is_named(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job in (31, 32, 33):
        worker.submit_store(job, blocks_of([[1], []], [0, 0]), CPULoadStoreSpec([1]))
    asked: list[Any] = []
    monkeypatch.setattr(worker._manager, "wait", asked.append)
    worker.wait([33, 4, 31])
    assert asked == [[worker._ours[33], worker._ours[31]]]


def test_to_give_way_is_no_error_and_only_for_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = GatedDevice()
    monkeypatch.setattr(plugin_spec, "device_for", lambda *args: gate)
    worker = plugin.TritonOffloadingSpec(make_config()).get_worker(random_caches(2))
    blocks, slots = blocks_of([[1], []], [0, 0]), CPULoadStoreSpec([1])
    worker.submit_store(1, blocks, slots)
    _drain(worker, 1)
    gate.gate.clear()
    worker.submit_store(2, blocks, CPULoadStoreSpec([2]))
    worker.submit_load(3, slots, blocks)
    asked = []
    wait = worker._manager.wait

    def note(jobs: Any, timeout: float) -> None:
        asked.append(list(jobs))
        wait(jobs, timeout)

    monkeypatch.setattr(worker._manager, "wait", note)
    assert worker.get_finished() == []
    assert asked == [[worker._ours[3]]]
    gate.gate.set()
    _drain(worker, 2)
    worker.shutdown()


def test_every_job_is_reported_once_and_wait_ignores_what_it_does_not_know(worker: Any) -> None:
    for job in range(60):
        blocks = blocks_of([[job % BLOCKS], []], [0, 0])
        assert worker.submit_store(job, blocks, CPULoadStoreSpec([job % CHUNKS]))
        assert worker.submit_load(1000 + job, CPULoadStoreSpec([job % CHUNKS]), blocks)
    worker.wait({3, 1059, 77_777})
    results = _drain(worker, 120)
    assert sorted(results) == [*range(60), *range(1000, 1060)]
    worker.wait({3, 1059})
    assert all(result.success for result in results.values())


def test_only_a_load_that_the_step_waits_for_is_expedited(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    transfer_async = worker._manager.transfer_async

    def note(src: Any, dst: Any, *, expedited: bool, layers: None) -> Any:
        asked.append(expedited)
        return transfer_async(src, dst, expedited=expedited, layers=layers)

    monkeypatch.setattr(worker._manager, "transfer_async", note)
    blocks, slots = blocks_of([[1], []], [0, 0]), CPULoadStoreSpec([1])
    worker.submit_store(1, blocks, slots)
    worker.submit_load(2, slots, blocks)
    worker.submit_load(3, slots, blocks, expedited=True)
    _drain(worker, 3)
    assert asked == [False, False, True]


def test_a_job_without_blocks_is_reported_too(worker: Any) -> None:
    nothing = blocks_of([[], []], [0, 0])
    worker.submit_store(1, nothing, CPULoadStoreSpec([]))
    worker.submit_load(2, CPULoadStoreSpec([]), nothing, expedited=True)
    results = _drain(worker, 2)
    assert [results[job].transfer_size for job in (1, 2)] == [0, 0]


@pytest.mark.parametrize("path", ["auto", "staged", "copy_engine"])
def test_a_failed_job_raises_with_its_cause_and_hides_no_other(
    caches: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {"cpu_bytes_to_use": CHUNKS * 4096, "path": path}
    worker = plugin.TritonOffloadingSpec(make_config(extra_config=extra)).get_worker(caches)
    worker.submit_store(1, blocks_of([[1], []], [0, 0]), CPULoadStoreSpec([1]))
    worker.wait({1})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("the link is down")

    with monkeypatch.context() as patch:
        for operation in ("gather", "scatter", "copy", "copy_batch"):
            patch.setattr(type(worker.pool.device), operation, fail)
        for job in (2, 3):
            worker.submit_load(job, CPULoadStoreSpec([1]), blocks_of([[job], []], [0, 0]))
        worker.wait({2, 3})
    for job in (2, 3):
        message = f"load {job} ended as failed.*link is down.*TritonOffloadingConnector"
        with pytest.raises(RuntimeError, match=message) as got:
            worker.get_finished()
        assert isinstance(got.value.__cause__, OSError)
    assert _drain(worker, 1).keys() == {1}
    worker.shutdown()


def test_a_refused_submission_leaves_nothing_behind(worker: Any) -> None:
    with pytest.raises(ValueError, match=r"slot_ids: expected .*10.*, got 10") as got:
        worker.submit_store(1, blocks_of([[1], []], [0, 0]), CPULoadStoreSpec([10]))
    assert any("TritonOffloadingConnector" in note for note in got.value.__notes__)
    assert (worker.stores.failed, worker.stores.failures) == (1, {"ValueError": 1})
    assert worker.num_in_flight == 0
    worker.submit_store(1, blocks_of([[1], []], [0, 0]), CPULoadStoreSpec([9]))
    with pytest.raises(ValueError, match="job_id: expected an id that is not in flight, got 1"):
        worker.submit_store(1, blocks_of([[1], []], [0, 0]), CPULoadStoreSpec([8]))
    assert _drain(worker, 1).keys() == {1}


def test_after_shutdown_nothing_is_reported_and_submitting_raises(worker: Any) -> None:
    worker.submit_store(1, blocks_of([[1], []], [0, 0]), CPULoadStoreSpec([1]))
    worker.shutdown()
    worker.shutdown()
    assert worker.get_finished() == []
    worker.wait({1})
    with pytest.raises(RuntimeError, match="shut down"):
        worker.submit_load(2, CPULoadStoreSpec([1]), blocks_of([[1], []], [0, 0]))


def test_layers_that_share_a_cache_are_moved_once(caches: Any) -> None:
    spec = plugin.TritonOffloadingSpec(make_config())
    caches.group_data_refs[0] += [base.CanonicalKVCacheRef(1, size) for size in (256, 100)]
    worker = spec.get_worker(caches)
    assert spec.get_worker(caches) is worker
    worker.submit_store(1, blocks_of([[1], []], [0, 0]), CPULoadStoreSpec([1]))
    assert _drain(worker, 1)[1].transfer_size == 192 + 256
    worker.shutdown()


def test_vllm_decides_and_its_metrics_are_declared() -> None:
    extra = {
        "cpu_bytes_to_use": CHUNKS * 4096,
        "store_threshold": 2,
        "spec_name": "TritonOffloadingSpec",
        "spec_module_path": "triton_offload.vllm",
    }
    spec = OffloadingSpecFactory.create_spec(make_config(extra_config=extra))
    assert isinstance(spec, plugin.TritonOffloadingSpec)
    assert type(spec.get_manager()) is cpu_manager.CPUOffloadingManager
    inherited = cpu_spec.CPUOffloadingSpec.build_metric_definitions(extra)
    assert len(inherited) == 5
    declared = type(spec).build_metric_definitions(extra)
    assert {name: declared[name] for name in inherited} == inherited
    assert all(name.startswith("triton_offload_") for name in declared.keys() - inherited.keys())
    assert len(declared) > len(inherited)


_SUPPORT = "supports vLLM 0.32 and 0.33 on CUDA and on vLLM's CPU platform"


_REFUSED = [
    (
        {"extra_config": {"cpu_bytes_to_use": 1 << 20, "secondary_tiers": [{"type": "fs"}]}},
        r"secondary_tiers: expected none, .*got \[{'type': 'fs'}\]",
    ),
    ({"extra_config": {}}, 'cpu_bytes_to_use: expected .* like "8GiB", got None'),
    *(
        (
            {"extra_config": {"cpu_bytes_to_use": size}},
            f'^cpu_bytes_to_use: expected .* like "8GiB", got {re.escape(repr(size))}$',
        )
        for size in ("much", "64 parsecs", -4096, True, float("nan"), float("inf"), [4096])
    ),
    *(
        ({"extra_config": {"cpu_bytes_to_use": 1 << 20, **extra}}, message)
        for extra, message in (
            ({"pth": "staged"}, r"one of \['block_size', .*got 'pth'; was 'path' meant\?$"),
            ({"blocks_per_chnk": 2}, r"got 'blocks_per_chnk'; was 'blocks_per_chunk' meant\?$"),
            ({"zzz": 1}, r"kv_connector_extra_config: expected .*\(vLLM 0.3\d.*\), got 'zzz'$"),
            ({5: 1}, r"kv_connector_extra_config: expected .*, got 5$"),
            ({"path": "stagd"}, r"path: expected one of .*got 'stagd'; was 'staged' meant\?$"),
            ({"path": None}, r"path: expected one of .*got None$"),
            ({"path": ["staged"]}, r"path: expected one of .*got \['staged'\]"),
            (
                {"eviction_policy": "lro"},
                r"eviction_policy: expected one of \['lru', 'arc'\], .*lru",
            ),
            ({"offload_prompt_only": "false"}, "offload_prompt_only: expected true or false, got"),
            ({"canonical_layout": 1}, "canonical_layout: expected true or false, got 1"),
            ({"store_threshold": "two"}, "store_threshold: expected an integer, got 'two'"),
            ({"max_tracker_size": 1.5}, "max_tracker_size: expected an integer, got 1.5"),
            ({"blocks_per_chunk": True}, "blocks_per_chunk: expected an integer, got True"),
            ({"staging_bytes": "16 loads"}, 'staging_bytes: expected .*like "8GiB", got'),
            ({"staging_bytes": 0}, "staging_bytes: expected at least 1, got 0"),
        )
    ),
    (
        {"canonical_layout": True},
        "canonical_layout: expected false, .*TritonTieringOffloadingSpec has, got True",
    ),
    ({"extra_config": {"cpu_bytes_to_use": 100}}, "at least one chunk of 4096 bytes, got 100"),
    ({"extra_config": {"cpu_bytes_to_use": 0}}, "at least one chunk, got 0"),
]


@pytest.mark.parametrize(
    ("size", "chunks"),
    [
        ("64KiB", 16),
        ("65536", 16),
        (65536, 16),
        (65535, 15),
        (65536.0, 16),  # what vLLM makes of kv_offloading_size
        ("0.5MiB", 128),
    ],
)
def test_sizes_are_those_that_people_write(size: Any, chunks: int) -> None:
    extra = {"cpu_bytes_to_use": size, "store_threshold": 2, "secondary_tiers": []}
    given = make_config(extra_config=extra)
    spec = plugin.TritonOffloadingSpec(given)
    assert spec.num_chunks == chunks
    assert spec.extra_config["store_threshold"] == 2
    assert given.extra_config["cpu_bytes_to_use"] is size, "the caller's configuration was changed"


def test_the_options_of_the_other_vllm_are_unknown_here() -> None:
    extra = {"cpu_bytes_to_use": 1 << 20, "sync_load_budget_bytes": "64KiB"}
    config = make_config(extra_config=extra)
    if vllm.__version__.startswith("0.32"):
        with pytest.raises(ValueError, match="got 'sync_load_budget_bytes'"):
            plugin.TritonOffloadingSpec(config)
    else:
        spec = plugin.TritonOffloadingSpec(config)
        assert spec.extra_config["sync_load_budget_bytes"] == 64 << 10  # vLLM calls int() of it


def test_a_policy_of_the_users_may_have_any_name() -> None:
    extra = {"cpu_bytes_to_use": 1 << 20, "eviction_policy": "Mine"}
    spec = plugin.TritonOffloadingSpec(
        make_config(extra_config={**extra, "cache_policy_module_path": "some.module"})
    )
    assert spec.eviction_policy == "Mine"


@pytest.mark.parametrize("path", ["auto", "staged"])
def test_staging_is_as_large_as_is_said(
    caches: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    transfer_queue = plugin_spec.transfer_queue

    def note(*args: Any) -> Any:
        asked.append(args[3])
        return transfer_queue(*args)

    monkeypatch.setattr(plugin_spec, "transfer_queue", note)
    extra = {"cpu_bytes_to_use": CHUNKS * 4096, "staging_bytes": "4KiB", "path": path}
    worker = plugin.TritonOffloadingSpec(make_config(extra_config=extra)).get_worker(caches)
    (options,) = asked
    assert options.buffer_bytes == 4096
    assert options.path is (None if path == "auto" else calibration.Path.STAGED)
    assert worker.pool is not None
    _check_round_trip(worker, caches, worker.pool.slots, expedited=False)
    worker.shutdown()


def test_more_than_there_is_is_refused(caches: Any, pool_kind: str) -> None:
    left = sorted(Path("/dev/shm").iterdir())
    spec = plugin.TritonOffloadingSpec(make_config(extra_config={"cpu_bytes_to_use": "10TB"}))
    with pytest.raises(ValueError, match=r"^cpu_bytes_to_use: expected at most .*got \d.\d TiB$"):
        spec.get_worker(caches)
    assert sorted(Path("/dev/shm").iterdir()) == left


@pytest.mark.parametrize("sizes", [[512, 512], [512, 768], [768, 512], [0, 512], [512, 0]])
def test_uneven_pipeline_stages_are_refused_on_every_rank(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = object()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda asked: len(sizes))
    world = SimpleNamespace(cpu_group=group)
    monkeypatch.setattr(plugin_spec, "get_world_group", lambda: world)
    told = []

    def gather(into: list[int], own: int, group: Any) -> None:
        told.append(own)
        into[:] = sizes

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    parallel = dataclasses.replace(make_config().parallel, world_size=2, pp_size=2)
    for size in sizes:
        config = make_config(parallel=parallel, worker_kv_bytes_per_block=size)
        if sizes[0] == sizes[1]:
            plugin.TritonOffloadingSpec(config)
            continue
        with pytest.raises(ValueError, match=f"pipeline_parallel_size: .*{re.escape(str(sizes))}"):
            plugin.TritonOffloadingSpec(config)
    assert told == sizes


def test_the_scheduler_of_several_stages_asks_nobody() -> None:
    parallel = dataclasses.replace(make_config().parallel, world_size=2, pp_size=2)
    assert plugin.TritonOffloadingSpec(make_config(parallel=parallel)).num_chunks == CHUNKS


def test_more_than_the_memory_there_is_names_what_vllms_users_set(
    caches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Any:
        raise ValueError("host_bytes: expected at most 3 GiB, got 10 TiB")

    monkeypatch.setattr(HostPool, "allocate", refuse)
    with pytest.raises(ValueError, match=r"^cpu_bytes_to_use: expected at most 3 GiB, got 10 TiB$"):
        plugin.TritonOffloadingSpec(make_config()).get_worker(caches)


@pytest.mark.parametrize(("changes", "message"), _REFUSED)
def test_what_is_not_supported_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as got:
        plugin.TritonOffloadingSpec(make_config(**changes))
    assert "\n" not in str(got.value)
    with pytest.raises(ValueError, match=message):
        plugin.TritonOffloadingSpec(make_config(**changes))


def test_another_platform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    xpu = SimpleNamespace(is_cuda=lambda: False, is_cpu=lambda: False, device_name="xpu")
    monkeypatch.setattr(plugin_spec, "current_platform", xpu)
    with pytest.raises(ValueError, match=f"{_SUPPORT}.*got the platform 'xpu'"):
        plugin.TritonOffloadingSpec(make_config())


@pytest.mark.parametrize("version", ["0.26.0", "0.34.0rc1", "1.32.0", "0.320.0", "dev"])
def test_another_version_is_refused(version: str) -> None:
    with pytest.raises(ImportError, match=f"{_SUPPORT}.*got vLLM {version}"):
        plugin.require_version(version)


def test_another_vllm_is_refused_when_the_plug_in_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(vllm, "__version__", "0.31.4")
        with pytest.raises(ImportError, match=f"{_SUPPORT}.*got vLLM 0.31.4"):
            importlib.reload(plugin)
    with monkeypatch.context() as patch:  # as where a module of vLLM's has another name
        patch.setitem(sys.modules, "triton_offload.vllm.spec", None)
        with pytest.raises(ImportError, match=f"{_SUPPORT}.*lacks what they have: .*vllm.spec"):
            importlib.reload(plugin)
    importlib.reload(plugin)


def test_caches_that_do_not_fit_their_slot_and_unknown_paths_are_refused(caches: Any) -> None:
    small = plugin.TritonOffloadingSpec(make_config(worker_kv_bytes_per_block=500))
    with pytest.raises(ValueError, match=f"chunks of at most 1500 bytes .* got {SLOT}"):
        small.get_worker(caches)
    extra = {"cpu_bytes_to_use": CHUNKS * 4096, "path": "teleport"}
    with pytest.raises(ValueError, match=r"path: expected one of .* got 'teleport'"):
        plugin.TritonOffloadingSpec(make_config(extra_config=extra)).get_worker(caches)
    extra = {"cpu_bytes_to_use": CHUNKS * 4096, "calibration": "of"}
    with pytest.raises(ValueError, match='calibration: expected "auto", "off" or a file, got'):
        plugin.TritonOffloadingSpec(make_config(extra_config=extra)).get_worker(caches)


@pytest.mark.skipif(not vllm.__version__.startswith("0.32"), reason="is the other vLLM")
def test_all_of_this_holds_on_the_other_supported_vllm() -> None:
    if not _OTHER_VLLM.exists():
        pytest.skip(f"no Python files of vLLM 0.33 in {_OTHER_VLLM} (`make test` puts them there)")
    others = ("canonical", "connector", "layers", "layouts", "tiers")
    others += ("group_slots", "group_manager", "group_pool")
    files = [__file__, *(str(Path(__file__).with_name(f"test_vllm_{name}.py")) for name in others)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        [*command, "-k", "not other_supported"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": str(_OTHER_VLLM), "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


def test_the_vllm_under_test_is_a_supported_one() -> None:
    expected = "0.33" if str(_OTHER_VLLM) in os.environ.get("PYTHONPATH", "") else "0.32"
    assert vllm.__version__.startswith(expected)
