"""Loads that vLLM's step waits for, layer by layer, without an engine.

`test_vllm_spec.py` runs this file on the other supported vLLM, too. vLLM 0.32 makes no such loads:
there they are made here.
"""

from __future__ import annotations

import itertools
import logging
import threading
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from schedules import small_sizes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vllm's own imports warn about
    import vllm
    from connector_world import CHUNK_TOKENS, World, cache_config, make_request, read_blocks
    from vllm.config import CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.kv_offload.base import GPULoadStoreSpec
    from vllm.v1.kv_offload.cpu import spec as cpu_spec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm_parts import BLOCKS_PER_CHUNK

    from triton_offload.vllm import spec as plugin_spec
    from triton_offload.vllm.layer_loads import LayerLoads, tensors_by_layer
    from triton_offload.vllm.worker import TritonOffloadingWorker

from triton_offload.closing import Closing
from triton_offload.pool.host_pool import HostPool
from triton_offload.testing import SimulatedDevice
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.options import PipelineOptions
from triton_offload.transfer.queue_manager import transfer_queue

pytestmark = pytest.mark.usefixtures("quick_collections")

EAGER = SimpleNamespace(attn_metadata={"x.0": None}, cudagraph_runtime_mode=CUDAGraphMode.NONE)
POISON = 0x41
NAMES = ["x.0", "x.1"]


@pytest.fixture(autouse=True)
def _small_on_the_cpu_platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (plugin_spec, cpu_spec):
        monkeypatch.setattr(module, "current_platform", CpuPlatform())
    with small_sizes():
        yield


class LayeredWorld(World):
    """One group of two layers, with a tensor each; `forward` is what a step computes between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        super().__init__(monkeypatch, groups=1, **options)
        worker = self.ranks[0].connector_worker
        worker.kv_cache_config = cache_config(groups=1)
        worker.kv_cache_config.kv_cache_groups[0].layer_names[:] = NAMES
        worker.worker = None
        worker._init_worker(self.caches[0])
        self.workers = [worker.worker]
        self.context: Any = EAGER
        self.seen: dict[str, torch.Tensor] = {}

    def forward(self, request: Any, first: int, names: list[str] = NAMES) -> None:
        """Each layer waits for its pages, and notes them."""
        for name in names:
            self.ranks[0].wait_for_layer_load(name)
            pages = read_blocks(self.caches[0], request, first)[: len(NAMES)]
            self.seen = {**self.seen, name: pages[NAMES.index(name)]}

    def learn(self) -> None:
        for name in NAMES:
            self.ranks[0].wait_for_layer_load(name)

    @property
    def layer_loads(self) -> LayerLoads:
        found = self.ranks[0].connector_worker.layer_loads
        assert found is not None
        return found

    def submit(self, job: int, context: Any = EAGER) -> None:
        """What vLLM's connector does of a load that the step waits for, in `start_load_kv`."""
        self.layer_loads.begin(context)
        blocks = GPULoadStoreSpec(np.array([3, 4]), group_sizes=[2], block_indices=[0])
        assert self.workers[0].submit_load(job, CPULoadStoreSpec([0]), blocks, expedited=True)
        self.workers[0].wait([job])

    def end_step(self) -> Any:
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
            OffloadingConnectorMetadata,
        )

        self.ranks[0]._connector_metadata = OffloadingConnectorMetadata({}, {}, set())
        return self.ranks[0].get_transfer_results(set())

    def hold_second_layer(self) -> threading.Event:
        """The second scatter from now on runs when the event is set."""
        gate, count, device = threading.Event(), itertools.count(1), self.devices[0]
        scatter = device.scatter

        def held(*args: Any, **kwargs: Any) -> None:
            if next(count) == 2:
                args[5].put(lambda: gate.wait(60))
            scatter(*args, **kwargs)

        device.scatter = held  # type: ignore[method-assign]
        return gate


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[LayeredWorld]:
    made = LayeredWorld(monkeypatch)
    yield made
    made.close()


def test_a_step_does_not_wait_for_layers_that_come_later(world: LayeredWorld) -> None:
    world.learn()
    pool = world.workers[0].transfers.pool
    assert pool is not None
    pool.slots.fill_(7)
    for cache in world.caches[0].tensors:
        cache.tensor.fill_(POISON)
    gate = world.hold_second_layer()
    world.submit(7)  # returns, and with it vLLM's start_load_kv
    first, second = (cache.tensor for cache in world.caches[0].tensors[:2])
    world.ranks[0].wait_for_layer_load("x.0")
    assert (first[3:5] == 7).all()
    assert (second[3:5] == POISON).all()
    threading.Timer(0.05, gate.set).start()
    world.ranks[0].wait_for_layer_load("x.1")
    assert (second[3:5, :200] == 7).all()
    assert (second[3:5, 200:] == POISON).all(), "which are not the group's bytes"
    assert (first[5:] == POISON).all()
    world.end_step()
    assert not world.layer_loads.jobs


def test_until_every_layer_has_asked_the_step_waits_for_all(world: LayeredWorld) -> None:
    assert world.layer_loads.layers is None
    for job, name in enumerate((None, "x.1", "x.1"), 7):
        if name is not None:
            world.ranks[0].wait_for_layer_load(name)
        world.submit(job)
        assert world.workers[0].transfers._manager.source_released(
            world.workers[0].transfers._ours[job]
        )
        assert not world.layer_loads.jobs
    world.ranks[0].wait_for_layer_load("x.0")
    world.submit(10)
    assert world.layer_loads.jobs == {10}
    assert world.layer_loads._order == [[1], [0]], "as they asked"
    world.end_step()


@pytest.mark.parametrize(
    "context",
    [
        None,
        SimpleNamespace(attn_metadata=None, cudagraph_runtime_mode=CUDAGraphMode.NONE),
        SimpleNamespace(attn_metadata={}, cudagraph_runtime_mode=CUDAGraphMode.FULL),
    ],
    ids=["none", "without a forward pass", "one graph"],
)
def test_a_step_whose_layers_do_not_ask_waits_for_all(world: LayeredWorld, context: Any) -> None:
    world.learn()
    world.submit(7, context)
    assert not world.layer_loads.jobs
    piecewise = SimpleNamespace(attn_metadata={}, cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE)
    world.submit(8, piecewise)
    assert world.layer_loads.jobs == {8}
    world.end_step()


def test_a_layer_that_is_not_known_waits_for_all(world: LayeredWorld) -> None:
    world.learn()
    gate = world.hold_second_layer()
    world.submit(7)
    threading.Timer(0.05, gate.set).start()
    world.ranks[0].wait_for_layer_load("shares the pages of another")
    assert gate.is_set()
    world.end_step()


def test_where_a_stream_cannot_wait_the_host_does(
    world: LayeredWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("injected")

    world.learn()
    gate = world.hold_second_layer()
    monkeypatch.setattr(world.workers[0].transfers, "wait_for_layer", fail)
    world.submit(7)
    threading.Timer(0.05, gate.set).start()
    with caplog.at_level(logging.WARNING):
        world.ranks[0].wait_for_layer_load("x.0")
    assert gate.is_set()
    assert "x.0: the host does" in caplog.text
    world.end_step()


@pytest.mark.parametrize("nth", [1, 2])
def test_a_layer_that_fails_fails_the_blocks_of_its_load_in_the_same_step(
    world: LayeredWorld, nth: int
) -> None:
    world.learn()
    device, count = world.devices[0], itertools.count(1)
    scatter = device.scatter

    def failing(*args: Any, **kwargs: Any) -> None:
        device.faults["scatter"] = int(next(count) == nth)
        scatter(*args, **kwargs)

    device.scatter = failing  # type: ignore[method-assign]
    world.submit(7)
    assert world.layer_loads.jobs == {7}
    world.learn()
    results = world.end_step()
    assert (results.finished_recving, results.failed_recving) == (set(), set())
    assert world.ranks[0].get_block_ids_with_load_errors() == {3, 4}
    assert world.ranks[0].build_connector_worker_meta().failed_jobs == {7}


def test_the_end_of_a_step_waits_for_its_loads(world: LayeredWorld) -> None:
    world.learn()
    gate = world.hold_second_layer()
    world.submit(7)
    threading.Timer(0.05, gate.set).start()
    world.end_step()
    assert gate.is_set()
    assert world.ranks[0].build_connector_worker_meta().completed_jobs == {7: 1}


def test_a_refused_load_is_not_waited_for(
    world: LayeredWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("injected")

    world.learn()
    monkeypatch.setattr(world.workers[0].transfers._manager, "transfer_async", refuse)
    world.submit(7)
    assert not world.layer_loads.jobs
    world.learn()
    world.end_step()
    assert world.ranks[0].get_block_ids_with_load_errors() == {3, 4}


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    world = LayeredWorld(monkeypatch, load_by_layers=False)
    assert world.ranks[0].connector_worker.layer_loads is None
    world.learn()
    world.close()
    with pytest.raises(ValueError, match="load_by_layers: expected true or false, got 'no'"):
        LayeredWorld(monkeypatch, load_by_layers="no")


def test_vllms_synchronous_load_comes_by_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    if vllm.__version__.startswith("0.32"):  # which makes none
        with pytest.raises(ValueError, match="sync_load_budget_bytes"):
            LayeredWorld(monkeypatch, sync_load_budget_bytes="1MiB")
        return
    world = LayeredWorld(monkeypatch, sync_load_budget_bytes="1MiB")
    stored, again = make_request("a", 2), make_request("b", 3, prefix="a")
    world.store(stored)
    wanted = read_blocks(world.caches[0], stored, 0)
    world.learn()
    for cache in world.caches[0].tensors:
        cache.tensor.fill_(POISON)
    world.begin_load(again, first=5)
    by_layers = []

    def run(connector: Any, meta: Any) -> Any:
        start = connector.start_load_kv

        def start_and_compute(context: Any) -> None:
            start(EAGER)
            by_layers.append(set(world.layer_loads.jobs))
            world.forward(again, 5)

        with patch.object(connector, "start_load_kv", start_and_compute):
            return World._run(connector, meta)

    monkeypatch.setattr(world, "_run", run)
    told = world.step([(again, 5)])
    assert len(by_layers) == 1
    assert len(by_layers[0]) == 1
    assert told.invalid_block_ids == set()
    count = 2 * CHUNK_TOKENS // (CHUNK_TOKENS // BLOCKS_PER_CHUNK)
    for name, pages in zip(NAMES, wanted, strict=False):
        assert torch.equal(world.seen[name][:count], pages[:count])
    world.settle()
    world.check()
    world.close()


def test_layers_have_the_tensors_of_their_references() -> None:
    def tensors(names: list[list[str]], refs: list[list[int]]) -> dict[str, tuple[int, ...]]:
        groups = [SimpleNamespace(layer_names=group) for group in names]
        caches = SimpleNamespace(
            group_data_refs=[[SimpleNamespace(tensor_idx=i) for i in group] for group in refs]
        )
        return tensors_by_layer(groups, caches)

    assert tensors([["a", "b"]], [[0, 1]]) == {"a": (0,), "b": (1,)}
    assert tensors([["a", "b"]], [[0, 1, 2, 3]]) == {"a": (0, 1), "b": (2, 3)}
    assert tensors([["a", "b"], ["c"]], [[0, 1], [0]]) == {"a": (0,), "b": (1,), "c": (0,)}
    assert tensors([["a", "b"]], [[0]]) == {}, "whole blocks"


def test_layers_of_several_groups_that_share_tensors() -> None:
    """As in a model with sliding windows: a layer waits for its tensor, whichever group loads."""
    caches = [torch.empty(8, 8, dtype=torch.int8) for _ in range(2)]
    layout = CacheLayout(caches, 1, [[(0, 8), (1, 8)], [(0, 8), (1, 8)]])
    transfers = SimpleNamespace(layers=lambda tensors: (layout, tensors), wait=None)
    tensors = {"a.0": (0,), "b.1": (0,), "a.2": (1,), "b.3": (1,)}
    loads = LayerLoads(transfers, tensors)  # type: ignore[arg-type]
    loads.begin(EAGER)
    for name in ("a.0", "b.1", "a.2", "b.3"):
        assert loads.layers is None
        loads.wait_for(name)
    assert loads.layers == (layout, [[0], [1]])  # type: ignore[comparison-overlap]
    assert loads._number == {"a.0": 0, "b.1": 0, "a.2": 1, "b.3": 1}


@pytest.mark.parametrize("seed", range(12))
def test_on_a_device_with_streams_they_wait_and_not_the_host(seed: int) -> None:
    with SimulatedDevice(seed) as device:
        tensors = [device.empty(16 * 8).view(16, 8) for _ in range(4)]
        layout = CacheLayout(tensors, 2)
        pool = HostPool.allocate(device, 4, layout.slot_bytes)
        pool.wait_ready(60)
        options = PipelineOptions(path="staged", buffer_bytes=64)
        queue = transfer_queue(layout, pool, options=options)
        resources = Closing()
        resources.callback(pool.close)
        resources.callback(queue.shutdown)
        worker = TritonOffloadingWorker(queue, pool, layout, resources)
        loads = LayerLoads(worker, {f"x.{i}": (i,) for i in range(4)})
        for i in range(4):
            loads.wait_for(f"x.{i}")
        pool.slots.copy_(torch.arange(pool.slots.numel()).view_as(pool.slots))
        loads.begin(EAGER)
        blocks = GPULoadStoreSpec(np.arange(4, 8), group_sizes=[4], block_indices=[0])
        worker.submit_load(1, CPULoadStoreSpec([0, 1]), blocks, True, loads.layers)
        loads.add(1)
        found: dict[int, torch.Tensor] = {}
        blocked = device.calls.get("synchronize", 0) + device.calls.get("sleep", 0)
        for i, tensor in enumerate(tensors):
            loads.wait_for(f"x.{i}")
            reads = tensor[4:8].reshape(-1)
            device.launch(
                f"layer {i}",
                device.compute_stream,
                reads=[reads],
                run=lambda i=i, reads=reads: found.update({i: reads.clone()}),
            )
        now = device.calls.get("synchronize", 0) + device.calls.get("sleep", 0)
        assert now == blocked, "the host waited"
        loads.end()
        device.drain()
        for i in range(4):
            wanted = pool.slots[:2, 16 * i : 16 * (i + 1)].reshape(-1)
            assert torch.equal(found[i], wanted)
        worker.get_finished()
        worker.shutdown()
