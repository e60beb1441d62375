"""The plug-in without an engine: specs, workers, jobs, on caches in CPU memory.

The file runs twice: on the vLLM that is installed, and in a process of its own on the Python files
of the other supported one.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
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
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.kv_offload import base, config
    from vllm.v1.kv_offload.cpu import manager as cpu_manager
    from vllm.v1.kv_offload.cpu import spec as cpu_spec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory

    from triton_offload import vllm as plugin
    from triton_offload.vllm import spec as plugin_spec

_OTHER_VLLM = Path(sys.prefix) / "vllm-0.33"
_B = 3  # blocks a chunk
_PAGES = (192, 256, 64)  # padded page bytes of the three tensors
# Both groups lie over tensor 0; group 0 uses 200 of the 256 bytes of tensor 1's page.
_GROUPS = (((0, 192), (1, 200)), ((0, 192), (2, 64)))
_SLOT = _B * sum(_PAGES)
_BLOCKS = 20
_CHUNKS = 10


@pytest.fixture(autouse=True)
def _on_the_cpu_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plugin_spec, cpu_spec):
        monkeypatch.setattr(module, "current_platform", CpuPlatform())


def _make_config(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "groups": tuple(
            config.OffloadingGroupConfig(tokens_per_block=32, layer_names=(name,), group_id=i)
            for i, name in enumerate("ab")
        ),
        "worker_kv_bytes_per_block": sum(_PAGES),
        "enable_kv_cache_events": False,
        "extra_config": {"cpu_bytes_to_use": _CHUNKS * 4096},
        "engine_id": f"test-{os.getpid()}-{time.monotonic_ns()}",
        "model": config.OffloadingModelConfig(name="model", dtype="float32"),
        "cache": config.OffloadingCacheConfig(tokens_per_hash=32, blocks_per_chunk=_B),
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


def _random_caches(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randint(-128, 128, (_BLOCKS, page), dtype=torch.int8, generator=generator)
        for page in _PAGES
    ]
    return base.CanonicalKVCaches(
        [base.CanonicalKVCacheTensor(t, t.shape[1]) for t in tensors],
        [[base.CanonicalKVCacheRef(i, n) for i, n in group] for group in _GROUPS],
    )


def _blocks(ids: list[list[int]], first: list[int]) -> Any:
    flat = [block for group in ids for block in group]
    return base.GPULoadStoreSpec(flat, group_sizes=[*map(len, ids)], block_indices=first)


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
    return _random_caches(0)


@pytest.fixture
def worker(caches: Any) -> Any:
    worker = plugin.TritonOffloadingSpec(_make_config()).get_worker(caches)
    yield worker
    worker.shutdown()


# Group 0 begins in the middle of its first chunk and ends in the middle of its second, group 1
# begins at the last block of its first chunk.
_STORED = [[7, 3, 11, 4], [2, 9, 14, 0]]
_FIRST = [4, 2]
_SLOTS = [5, 1, 8, 6]
_MOVED = sum(len(b) * sum(n for _, n in g) for b, g in zip(_STORED, _GROUPS, strict=True))


def _store_by_hand(
    pool: torch.Tensor, caches: Any, ids: list[list[int]], first: list[int], slots: list[int]
) -> None:
    """What a store does to the pool, built page by page from the slot format."""
    pool[slots] = 0
    chunk = 0
    for blocks, index, group in zip(ids, first, _GROUPS, strict=True):
        start = index % _B
        for i, block in enumerate(blocks):
            slot, place = slots[chunk + (start + i) // _B], (start + i) % _B
            for tensor, size in group:
                offset = _B * sum(_PAGES[:tensor]) + place * _PAGES[tensor]
                page = caches.tensors[tensor].tensor[block, :size]
                pool[slot, offset : offset + size] = page.view(torch.uint8)
        chunk += -(-(start + len(blocks)) // _B) if blocks else 0


def _check_round_trip(worker: Any, caches: Any, pool: torch.Tensor, expedited: bool) -> None:
    # First every slot holds a chunk of one group and then some a chunk of the other, so that
    # what a store doesn't clear shows.
    everything = [block % _BLOCKS for block in range(_CHUNKS * _B)]
    stores: list[tuple[list[list[int]], list[int], list[int]]] = [
        ([everything, []], [0, 0], [*range(_CHUNKS)]),
        ([[], everything[: 3 * _B]], [0, 0], [8, 2, 1]),
        (_STORED, _FIRST, _SLOTS),
    ]
    expected = pool.clone()
    for job, (ids, first, slots) in enumerate(stores, 39):
        _store_by_hand(expected, caches, ids, first, slots)
        assert worker.submit_store(job, _blocks(ids, first), CPULoadStoreSpec(slots))
        worker.wait({job})
        assert torch.equal(pool, expected)
    assert _drain(worker, 3)[41].transfer_size == _MOVED

    originals = [cache.tensor.clone() for cache in caches.tensors]
    for cache in caches.tensors:
        cache.tensor.fill_(0x41)
    wanted = [cache.tensor.clone() for cache in caches.tensors]
    targets = [[1, 19, 6, 12], [13, 5, 8, 17]]
    for group, sources, blocks in zip(_GROUPS, _STORED, targets, strict=True):
        for tensor, size in group:
            for source, block in zip(sources, blocks, strict=True):
                wanted[tensor][block, :size] = originals[tensor][source, :size]
    blocks = _blocks(targets, _FIRST)
    assert worker.submit_load(42, CPULoadStoreSpec(_SLOTS), blocks, expedited=expedited)
    worker.wait({42})
    for cache, tensor in zip(caches.tensors, wanted, strict=True):
        assert torch.equal(cache.tensor, tensor)
    result = _drain(worker, 1)[42]
    assert (result.success, result.transfer_size) == (True, _MOVED)
    assert result.transfer_time >= 0.0
    assert torch.equal(pool, expected)
    assert (worker.stores.jobs, worker.loads.jobs, worker.num_in_flight) == (3, 1, 0)


@pytest.mark.parametrize("expedited", [False, True], ids=["ordinary", "expedited"])
@pytest.mark.parametrize("path", ["auto", "staged", "copy_engine"])
def test_pages_of_overlaid_groups_and_partial_chunks_come_back(
    caches: Any, path: str, expedited: bool
) -> None:
    extra = {"cpu_bytes_to_use": _CHUNKS * 4096, "path": path}
    worker = plugin.TritonOffloadingSpec(_make_config(extra_config=extra)).get_worker(caches)
    try:
        assert worker.pool is not None
        assert worker.pool.slots.shape == (_CHUNKS, _SLOT)
        _check_round_trip(worker, caches, worker.pool.slots, expedited)
    finally:
        worker.shutdown()


def test_on_cuda_the_pool_is_this_ranks_part_of_vllms_shared_region(
    caches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = SimpleNamespace(
        is_cuda=lambda: True,
        is_cpu=lambda: False,
        is_cuda_alike=lambda: True,
        is_rocm=lambda: False,
        is_xpu=lambda: False,
    )
    for module in (plugin_spec, cpu_spec):
        monkeypatch.setattr(module, "current_platform", cuda)
    monkeypatch.setattr(cpu_spec, "_all_workers_barrier", lambda: None)
    monkeypatch.setattr(plugin_spec, "PIN_MEMORY", False)
    regions = []
    create_region = plugin.TritonOffloadingSpec._create_region

    def note_region(self: Any) -> Any:
        regions.append(create_region(self))
        return regions[-1]

    monkeypatch.setattr(plugin.TritonOffloadingSpec, "_create_region", note_region)
    parallel = dataclasses.replace(_make_config().parallel, rank=1, world_size=2, tp_size=2)
    changed = _make_config(parallel=parallel, replicated_layout=True)
    spec = plugin.TritonOffloadingSpec(changed)
    assert not spec.replicated_layout
    worker = spec.get_worker(caches)
    (region,) = regions
    rows = region.base_tensor.view(torch.uint8).view(spec.num_chunks, spec.kv_bytes_per_chunk)
    rows[:, :_SLOT] = 0x77
    rows[:, 2 * _SLOT :] = 0x77
    _check_round_trip(worker, caches, rows[:, _SLOT : 2 * _SLOT], expedited=False)
    assert (rows[:, :_SLOT] == 0x77).all(), "the other rank's slots were touched"
    assert (rows[:, 2 * _SLOT :] == 0x77).all(), "the padding of the rows was touched"
    del rows
    worker.shutdown()
    assert region.mmap_obj is None
    assert not Path(region.mmap_path).exists()


def test_every_job_is_reported_once_and_wait_ignores_what_it_does_not_know(worker: Any) -> None:
    for job in range(60):
        blocks = _blocks([[job % _BLOCKS], []], [0, 0])
        assert worker.submit_store(job, blocks, CPULoadStoreSpec([job % _CHUNKS]))
        assert worker.submit_load(1000 + job, CPULoadStoreSpec([job % _CHUNKS]), blocks)
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

    def note(src: Any, dst: Any, *, expedited: bool) -> Any:
        asked.append(expedited)
        return transfer_async(src, dst, expedited=expedited)

    monkeypatch.setattr(worker._manager, "transfer_async", note)
    blocks, slots = _blocks([[1], []], [0, 0]), CPULoadStoreSpec([1])
    worker.submit_store(1, blocks, slots)
    worker.submit_load(2, slots, blocks)
    worker.submit_load(3, slots, blocks, expedited=True)
    _drain(worker, 3)
    assert asked == [False, False, True]


def test_a_job_without_blocks_is_reported_too(worker: Any) -> None:
    nothing = _blocks([[], []], [0, 0])
    worker.submit_store(1, nothing, CPULoadStoreSpec([]))
    worker.submit_load(2, CPULoadStoreSpec([]), nothing, expedited=True)
    results = _drain(worker, 2)
    assert [results[job].transfer_size for job in (1, 2)] == [0, 0]


@pytest.mark.parametrize("path", ["auto", "staged", "copy_engine"])
def test_a_failed_job_raises_with_its_cause_and_hides_no_other(
    caches: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {"cpu_bytes_to_use": _CHUNKS * 4096, "path": path}
    worker = plugin.TritonOffloadingSpec(_make_config(extra_config=extra)).get_worker(caches)
    worker.submit_store(1, _blocks([[1], []], [0, 0]), CPULoadStoreSpec([1]))
    worker.wait({1})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("the link is down")

    with monkeypatch.context() as patch:
        for operation in ("gather", "scatter", "copy", "copy_batch"):
            patch.setattr(type(worker.pool.device), operation, fail)
        for job in (2, 3):
            worker.submit_load(job, CPULoadStoreSpec([1]), _blocks([[job], []], [0, 0]))
        worker.wait({2, 3})
    for job in (2, 3):
        with pytest.raises(RuntimeError, match=f"load {job} ended as failed.*link is down") as got:
            worker.get_finished()
        assert isinstance(got.value.__cause__, OSError)
    assert _drain(worker, 1).keys() == {1}
    worker.shutdown()


def test_a_refused_submission_leaves_nothing_behind(worker: Any) -> None:
    with pytest.raises(ValueError, match=r"slot_ids: expected .*10.*, got 10"):
        worker.submit_store(1, _blocks([[1], []], [0, 0]), CPULoadStoreSpec([10]))
    assert worker.num_in_flight == 0
    worker.submit_store(1, _blocks([[1], []], [0, 0]), CPULoadStoreSpec([9]))
    with pytest.raises(ValueError, match="job_id: expected an id that is not in flight, got 1"):
        worker.submit_store(1, _blocks([[1], []], [0, 0]), CPULoadStoreSpec([8]))
    assert _drain(worker, 1).keys() == {1}


def test_after_shutdown_nothing_is_reported_and_submitting_raises(worker: Any) -> None:
    worker.submit_store(1, _blocks([[1], []], [0, 0]), CPULoadStoreSpec([1]))
    worker.shutdown()
    worker.shutdown()
    assert worker.get_finished() == []
    worker.wait({1})
    with pytest.raises(RuntimeError, match="shut down"):
        worker.submit_load(2, CPULoadStoreSpec([1]), _blocks([[1], []], [0, 0]))


def test_layers_that_share_a_cache_are_moved_once(caches: Any) -> None:
    spec = plugin.TritonOffloadingSpec(_make_config())
    caches.group_data_refs[0] += [base.CanonicalKVCacheRef(1, size) for size in (256, 100)]
    worker = spec.get_worker(caches)
    assert spec.get_worker(caches) is worker
    worker.submit_store(1, _blocks([[1], []], [0, 0]), CPULoadStoreSpec([1]))
    assert _drain(worker, 1)[1].transfer_size == 192 + 256
    worker.shutdown()


def test_vllm_decides_and_its_metrics_are_declared() -> None:
    extra = {
        "cpu_bytes_to_use": _CHUNKS * 4096,
        "store_threshold": 2,
        "spec_name": "TritonOffloadingSpec",
        "spec_module_path": "triton_offload.vllm",
    }
    spec = OffloadingSpecFactory.create_spec(_make_config(extra_config=extra))
    assert isinstance(spec, plugin.TritonOffloadingSpec)
    assert type(spec.get_manager()) is cpu_manager.CPUOffloadingManager
    inherited = cpu_spec.CPUOffloadingSpec.build_metric_definitions(extra)
    assert len(inherited) == 5
    assert type(spec).build_metric_definitions(extra) == inherited


_SUPPORT = "supports vLLM 0.32 and 0.33 on CUDA and on vLLM's CPU platform"


_REFUSED = [
    ({"canonical_layout": True}, f"{_SUPPORT}.*canonical_layout=True"),
    ({"extra_config": {"cpu_bytes_to_use": 100}}, "at least one chunk of 4096 bytes, got 100"),
]


@pytest.mark.parametrize(("changes", "message"), _REFUSED, ids=["canonical layout", "small pool"])
def test_what_is_not_supported_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plugin.TritonOffloadingSpec(_make_config(**changes))


def test_another_platform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    xpu = SimpleNamespace(is_cuda=lambda: False, is_cpu=lambda: False, device_name="xpu")
    monkeypatch.setattr(plugin_spec, "current_platform", xpu)
    with pytest.raises(ValueError, match=f"{_SUPPORT}.*got the platform 'xpu'"):
        plugin.TritonOffloadingSpec(_make_config())


@pytest.mark.parametrize("version", ["0.26.0", "0.34.0rc1", "1.32.0", "dev"])
def test_another_version_is_refused(version: str) -> None:
    with pytest.raises(ImportError, match=f"{_SUPPORT}.*got vLLM {version}"):
        plugin.require_version(version)


def test_caches_that_do_not_fit_their_slot_and_unknown_paths_are_refused(caches: Any) -> None:
    small = plugin.TritonOffloadingSpec(_make_config(worker_kv_bytes_per_block=500))
    with pytest.raises(ValueError, match=f"chunks of at most 1500 bytes .* got {_SLOT}"):
        small.get_worker(caches)
    extra = {"cpu_bytes_to_use": _CHUNKS * 4096, "path": "teleport"}
    with pytest.raises(ValueError, match=r"path: expected one of .* got 'teleport'"):
        plugin.TritonOffloadingSpec(_make_config(extra_config=extra)).get_worker(caches)
    extra = {"cpu_bytes_to_use": _CHUNKS * 4096, "calibration": "of"}
    with pytest.raises(ValueError, match='calibration: expected "auto", "off" or a file, got'):
        plugin.TritonOffloadingSpec(_make_config(extra_config=extra)).get_worker(caches)


@pytest.mark.skipif(not vllm.__version__.startswith("0.32"), reason="is the other vLLM")
def test_all_of_this_holds_on_the_other_supported_vllm() -> None:
    if not _OTHER_VLLM.exists():
        pytest.skip(f"no Python files of vLLM 0.33 in {_OTHER_VLLM} (`make test` puts them there)")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "not other_supported"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": str(_OTHER_VLLM), "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


def test_the_vllm_under_test_is_a_supported_one() -> None:
    expected = "0.33" if str(_OTHER_VLLM) in os.environ.get("PYTHONPATH", "") else "0.32"
    assert vllm.__version__.startswith(expected)
