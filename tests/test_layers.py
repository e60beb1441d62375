"""Loads by layers: which bytes, in which order, what a layer waits for, and what a failure leaves.

Random schedules of them are in `schedules.py`, how long things take in `test_overlap.py`.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from schedules import CONFIGURATIONS, run_schedule, small_sizes

from triton_offload import KVOffloader, TransferFailedError
from triton_offload.calibration import Path
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec, TransferStatus
from triton_offload.testing import InjectedError, SimulatedDevice
from triton_offload.testing.engine import EngineMemory
from triton_offload.transfer import layers as transfer_layers
from triton_offload.transfer.job import Job
from triton_offload.transfer.layers import LEAST_BYTES, MOST_BANDS, Layers
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.transfer.queue_manager import OffloadingQueueManager

SEEDS = range(8)
POISON = 0xEE
KEYS = [b"one", b"two"]
NUM_LAYERS = 4
NAMES = [f"{kind}.{layer}" for layer in range(NUM_LAYERS) for kind in "kv"]


@pytest.fixture(autouse=True)
def _small_sizes() -> Iterator[None]:
    """Every load by layers has bands of one, one or two, and of the rest."""
    with small_sizes():
        yield


class Engine:
    """`NUM_LAYERS` layers of K and V, and an offloader, on a simulated device."""

    def __init__(self, device: SimulatedDevice, path: Path, window_bytes: int | None) -> None:
        self.device = device
        self.tensors = [device.empty(16 * 8).view(16, 8) for _ in range(2 * NUM_LAYERS)]
        self.offloader = KVOffloader(
            {
                f"{kind}.{i}": self.tensors[2 * i + j]
                for i in range(4)
                for j, kind in enumerate("kv")
            },
            "2KiB",
            2,
            device=device,
            options=PipelineOptions(
                path=path, buffer_bytes=128, max_indices=1, window_bytes=window_bytes
            ),
        )
        self.offloader._pool.wait_ready(60)  # until then copies are slower
        self.write(range(4), lambda tensor, block: 16 * tensor + block + 1)
        self.offloader.store(KEYS, range(4)).wait()

    def write(self, blocks, value) -> None:
        """A kernel of the engine's writes the blocks' pages."""

        def run() -> None:
            for i, tensor in enumerate(self.tensors):
                for block in blocks:
                    tensor[block].fill_(value(i, block))

        pages = [tensor[block] for tensor in self.tensors for block in blocks]
        self.device.launch("engine writes", self.device.compute_stream, writes=pages, run=run)

    def load(self, layers=NUM_LAYERS, blocks: range = range(8, 12), **options):
        self.write(blocks, lambda tensor, block: POISON)
        return self.offloader.load(KEYS, blocks, layers=layers, **options)

    def compute(self, layer: int, found: dict[int, list[int]]) -> None:
        """A kernel reads the loaded pages of a layer."""
        pair = self.tensors[2 * layer : 2 * layer + 2]
        reads = [tensor[8:12].reshape(-1) for tensor in pair]

        def run() -> None:
            found[layer] = torch.stack([tensor[8:12] for tensor in pair]).flatten().tolist()

        self.device.launch("engine reads", self.device.compute_stream, reads=reads, run=run)


def expected(layer: int) -> list[int]:
    return [16 * t + b + 1 for t in (2 * layer, 2 * layer + 1) for b in range(4) for _ in range(8)]


@contextmanager
def engine(
    seed: int, path: Path = Path.STAGED, window_bytes: int | None = None
) -> Iterator[Engine]:
    with SimulatedDevice(seed) as device:
        made = Engine(device, path, window_bytes)
        with made.offloader:
            yield made
            made.offloader._check()


# -- bytes --


@st.composite
def loads(draw):
    """Pages, groups and a division of the tensors of one of them."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=7))
    tensors = range(len(sizes))
    groups = [list(tensors)]
    if len(sizes) > 1 and draw(st.booleans()):
        groups.append(draw(st.lists(st.sampled_from(tensors), min_size=1, unique=True)))
    group = draw(st.integers(0, len(groups) - 1))
    members = draw(st.permutations(groups[group]))
    edges = draw(st.sets(st.integers(1, len(members)), max_size=4)) | {0, len(members)}
    ends = sorted(edges)
    layers = [members[a:b] for a, b in itertools.pairwise(ends)]
    span = draw(st.integers(1, 3))
    first = draw(st.integers(0, span - 1))
    count = draw(st.integers(1, 9))
    return sizes, groups, group, layers, span, first, count


@given(path=st.sampled_from(Path), case=loads(), seed=st.integers(0, 1 << 16))
def test_a_load_by_layers_brings_what_was_stored_and_nothing_else(path, case, seed):
    sizes, groups, group, layers, span, first, count = case
    rng = np.random.default_rng(seed)
    tensors = [torch.from_numpy(rng.integers(0, 256, (24, n), dtype=np.uint8)) for n in sizes]
    keys = [bytes([i + 1]) for i in range(-(-(first + count) // span))]
    source, target = rng.permutation(24)[: 2 * count].reshape(2, count)
    options = PipelineOptions(path=path, buffer_bytes=64, max_indices=1)
    with KVOffloader(tensors, "16KiB", span, groups=groups, options=options) as offloader:
        offloader.store(keys, source, first_block=first, group=group).wait()
        stored = [tensor[source].clone() for tensor in tensors]
        for tensor in tensors:
            tensor.fill_(POISON)
        job = offloader.load(keys, target, first_block=first, group=group, layers=layers)
        wanted = [torch.full_like(tensor, POISON) for tensor in tensors]
        for number, layer in enumerate(layers):
            job.block(60, layer=number)
            for i in layer:
                wanted[i][target] = stored[i]
                assert torch.equal(tensors[i], wanted[i])
        job.wait(60)
        assert all(map(torch.equal, tensors, wanted))
        offloader._check()


@pytest.mark.parametrize("path", Path)
@pytest.mark.parametrize("window_bytes", [None, 1])
def test_each_layer_is_computed_behind_its_own_pages(path, window_bytes):
    for seed in SEEDS:
        with engine(seed, path, window_bytes) as e:
            job = e.load()
            found: dict[int, list[int]] = {}
            for layer in range(NUM_LAYERS):
                job.wait_on(e.device.compute_stream, layer=layer)
                e.compute(layer, found)
            job.wait()
            e.device.drain()
            assert found == {layer: expected(layer) for layer in range(NUM_LAYERS)}


def test_layers_go_by_the_names_of_their_tensors():
    for seed in SEEDS:
        with engine(seed) as e:
            order = [3, 0, 2, 1]  # a model may compute its layers in another order than they lie
            job = e.load([[f"v.{i}", f"k.{i}"] for i in order])
            found: dict[int, list[int]] = {}
            for place, layer in enumerate(order):
                job.wait_on(
                    e.device.compute_stream,
                    layer=random.Random(seed).choice(
                        [f"k.{layer}", f"v.{layer}", place, np.int64(place)]
                    ),
                )
                e.compute(layer, found)
            job.wait()
            e.device.drain()
            assert found == {layer: expected(layer) for layer in range(NUM_LAYERS)}


# -- order --


@pytest.mark.parametrize("path", [Path.STAGED, Path.ZERO_COPY])
def test_the_first_layer_is_there_while_the_second_never_comes(path):
    for seed in SEEDS:
        with engine(seed, path) as e:
            e.device.faults.never_ends("scatter", 3)  # two of them are the first layer's
            job = e.load()
            found: dict[int, list[int]] = {}
            job.block(1.0, layer=0)
            job.wait_on(e.device.compute_stream, layer="v.0")
            e.compute(0, found)
            with pytest.raises(TimeoutError, match="layer 1 was not there within"):
                job.block(0.05, layer=1)
            e.device.drain()
            assert found == {0: expected(0)}
            assert not job.done
            e.device.end_hung()
            job.wait()


def test_bands_are_one_layer_and_then_equal_parts_of_the_bytes():
    def bands(sizes: list[int], number: int) -> list[int]:
        caches = [torch.empty(4, size, dtype=torch.uint8) for size in sizes]
        made = Layers(CacheLayout(caches), [[i] for i in range(len(sizes))])._make(number)
        assert len(made.groups) == made.of_layer[-1] + 1
        counts = Counter(made.of_layer)
        return [counts[i] for i in range(len(counts))]

    assert bands([8] * 80, 16) == [1, *[5] * 7, 4, *[5] * 8]
    assert bands([8] * 9, 2) == [1, 4, 4]
    assert bands([8] * 4, 16) == [1, 1, 1, 1]
    assert bands([8], 16) == [1]
    assert bands([8, 64, 8, 8, 8, 8, 8, 8, 8], 2) == [1, 1, 7]
    assert bands([64, 1, 1, 1, 1], 2) == [1, 2, 2]


@pytest.mark.parametrize(
    ("mebibytes", "number"),
    [(0, 1), (5, 1), (6, 2), (11, 2), (12, 4), (47, 8), (48, 16), (999, 16)],
)
def test_the_larger_a_load_the_more_bands_it_has(monkeypatch, mebibytes, number):
    monkeypatch.setattr(transfer_layers, "LEAST_BYTES", LEAST_BYTES)
    monkeypatch.setattr(transfer_layers, "MOST_BANDS", MOST_BANDS)
    assert transfer_layers._num_bands(mebibytes << 20) == number


def test_a_wait_asks_for_its_layer_and_for_what_follows_the_one_that_is_computed():
    run_of_layer = (0, 1, 1, 3, 3, 4)  # the third band has two runs

    def asked(*layers: int | None) -> list[int]:
        job = Job(0, Direction.LOAD, "load", 1, 0, [None] * 5, None, [], None)
        job.run_of_layer, job.num_asked = run_of_layer, 1
        found = []
        for layer in layers:
            job.ask_for(layer)
            found.append(job.num_asked)
        return found

    assert asked(*range(6)) == [1, 2, 4, 4, 5, 5]
    assert asked(0, 0, 3, 1) == [1, 2, 4, 5]
    assert asked(5) == asked(None) == [5]


def test_what_nobody_asks_for_is_queued_all_the_same():
    for seed in SEEDS:
        with engine(seed) as e:
            e.load()
            lane = next(iter(e.offloader._queue._workers.values()))._pipeline._lanes["load"]
            (job,) = lane._backlog
            assert len(job.landed) == 1
            for _ in range(100):
                e.device.sleep(0.01)
            assert job.queued


def test_a_small_load_is_moved_as_without_layers(monkeypatch):
    monkeypatch.setattr(transfer_layers, "LEAST_BYTES", LEAST_BYTES)
    queued = []
    for layers in (None, NUM_LAYERS):
        with engine(0) as e:
            job = e.load(layers)
            if layers is not None:
                job.block(layer=0)
            job.wait()
            queued.append(dict(e.device.num_queued))
    assert queued[0] == queued[1]


def test_a_division_is_made_and_prepared_once():
    with engine(0) as e:
        e.load().wait()
        before = e.device.calls["prepare"]
        kept = e.offloader._layers._kept[0][1]
        for layers in (NUM_LAYERS, np.int32(NUM_LAYERS)):
            e.load(layers).wait()
        assert e.device.calls["prepare"] == before
        e.load([["k.0"], ["v.0"], [f"{kind}.{i}" for i in (1, 2, 3) for kind in "kv"]]).wait()
        assert e.device.calls["prepare"] > before
        assert e.offloader._layers._kept[0][1] is not kept


def test_a_load_of_several_groups_brings_the_layers_of_all_of_them():
    """A job of the queue manager: tensor 1 is of both groups, a layer of none of them has no band
    of its own."""
    with SimulatedDevice(3) as device:
        shape = [(0, 8), (1, 8)], [(1, 8), (2, 8)]
        caches = [device.empty(16 * 8).view(16, 8) for _ in range(3)]
        layout = CacheLayout(caches, 1, shape)
        queue, pool = queue_of(device, layout)
        for i, cache in enumerate(caches):
            cache.copy_(torch.arange(128, dtype=torch.uint8).view(16, 8) + i)
        wanted = [cache.clone() for cache in caches]
        pages = GPULoadStoreSpec([0, 1, 2, 3], [2, 2], [0, 0])
        queue.wait([queue.transfer_async(pages, CPULoadStoreSpec(range(4), True))])
        for cache in caches:
            cache.fill_(POISON)
        layers = Layers(layout, [[2], [1], [0]])
        target = GPULoadStoreSpec([8, 9, 10, 11], [2, 2], [0, 0])
        job = queue.transfer_async(CPULoadStoreSpec(range(4)), target, layers=layers)
        for layer, tensor in enumerate((2, 1, 0)):
            queue.wait_for_layer(job, layer, 60)
            device.touch(reads=[caches[tensor][8:12]])
            for group, at in ((0, 0), (1, 2)):
                if tensor in layout.members[group]:
                    got, meant = caches[tensor][8 + at : 10 + at], wanted[tensor][at : at + 2]
                    assert torch.equal(got, meant)
        queue.shutdown()
        pool.close()


def queue_of(device: SimulatedDevice, layout: CacheLayout):
    from triton_offload.pool.host_pool import HostPool
    from triton_offload.transfer.queue_manager import transfer_queue

    pool = HostPool.allocate(device, 8, layout.slot_bytes)
    pool.wait_ready(60)
    options = PipelineOptions(path=Path.STAGED, buffer_bytes=64)
    return transfer_queue(layout, pool, options=options), pool


# -- failures, cancelling, the end --


@pytest.mark.parametrize("band", [1, 2, 3])
@pytest.mark.parametrize("window_bytes", [None, 1])
def test_a_band_that_cannot_be_queued_fails_the_job_and_nobody_is_stuck(band, window_bytes):
    for seed in SEEDS:
        with engine(seed, window_bytes=window_bytes) as e:
            e.device.faults.in_call("scatter", 2 * band - 1)  # a band has two segments
            e.device.faults.in_call("copy_batch", 1)
            job = e.load()
            for layer in range(NUM_LAYERS):
                job.wait_on(e.device.compute_stream, layer=layer)
                job.block(60, layer=layer)
            with pytest.raises(TransferFailedError):
                job.wait(60)
            assert isinstance(job.result.error, InjectedError)
            found: dict[int, list[int]] = {}
            e.load().wait()
            for layer in range(NUM_LAYERS):
                e.compute(layer, found)
            e.device.drain()
            assert found == {layer: expected(layer) for layer in range(NUM_LAYERS)}


def test_a_band_that_fails_on_the_device_fails_the_job():
    for seed in SEEDS:
        with engine(seed) as e:
            e.device.faults.in_run("scatter", random.Random(seed).randint(1, 6))
            job = e.load()
            for layer in range(NUM_LAYERS):
                job.wait_on(e.device.compute_stream, layer=layer)
                job.block(60, layer=layer)
            job.block(60)
            assert job.result.status is TransferStatus.FAILED


def test_a_load_by_layers_is_taken_back_whole_or_not_at_all():
    ended = Counter()
    for seed in range(40):
        with engine(seed, window_bytes=1) as e:
            e.offloader.load(KEYS, range(4, 8))
            job = e.load()
            if seed % 2:
                e.device.sleep(1e-5 * random.Random(seed).randrange(20))
            taken = e.offloader.cancel(job)
            for layer in range(NUM_LAYERS):
                job.wait_on(e.device.compute_stream, layer=layer)
            found: dict[int, list[int]] = {}
            for layer in range(NUM_LAYERS):
                e.compute(layer, found)
            job.block(60)
            e.device.drain()
            ended[job.result.status] += 1
            assert job.result.status is (
                TransferStatus.CANCELLED if taken else TransferStatus.SUCCESS
            )
            for layer, values in found.items():
                assert values == ([POISON] * 64 if taken else expected(layer))
    assert len(ended) == 2, ended


def test_close_under_a_load_by_layers_ends_it():
    for seed in SEEDS:
        with engine(seed, window_bytes=1) as e:
            job = e.load()
            e.offloader.close(60)
            assert job.result is not None
            for layer in (0, "k.3"):
                job.wait_on(e.device.compute_stream, layer=layer)  # and nothing is left to wait for
                job.block(layer=layer)


def test_an_ended_job_keeps_no_memory_for_its_layers():
    with engine(0) as e:
        job = e.load()
        job.wait()
        assert set(vars(job)) == {"job_id", "direction", "_owner", "_result", "_layers"}
        assert job._owner is None
        assert all(isinstance(number, int) for number in job._layers.values())


# -- arguments --


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (0, "layers: expected an integer of at least 1, got 0"),
        (True, "layers: expected an integer of at least 1, got True"),
        (3, "layers: expected a divisor of 8, the group's tensors, got 3"),
        ("k.0", "layers: expected a list, got 'k.0'"),
        ({"k.0": 1}, "layers: expected a list, got"),
        ([["k.0", "v.0"], "k.1"], r"layers\[1\]: expected a list, got 'k.1'"),
        ([["k.9"]], r"layers\[0\]: expected members of \['k.0', 'v.0', .*\], got 'k.9'"),
        ([["k.0"], ["v.0"]], "layers: expected each of .* in one layer"),
        ([NAMES, ["k.0"]], "in one layer"),
        ([NAMES, []], "no layer without any"),
    ],
)
def test_wrong_layers_are_refused_and_nothing_has_changed(layers, message):
    with engine(0) as e:
        with pytest.raises(ValueError, match=message):
            e.offloader.load(KEYS, range(8, 12), layers=layers)
        assert e.offloader.stats().num_pinned == 0
        e.load().wait()


@pytest.mark.parametrize("layer", [4, -1, True, "k.4", "", 1.5])
def test_a_wrong_layer_is_refused_before_and_after_the_end(layer):
    with engine(0) as e:
        job = e.load()
        for _ in range(2):
            with pytest.raises(ValueError, match="layer: expected"):
                job.wait_on(e.device.compute_stream, layer=layer)
            with pytest.raises(ValueError, match="layer: expected"):
                job.block(layer=layer)
            job.wait()


def test_a_job_without_layers_has_none():
    with engine(0) as e:
        job = e.load(None)
        with pytest.raises(ValueError, match="layer: expected none, for a job without, got 0"):
            job.wait_on(e.device.compute_stream, layer=0)
        job.wait()
        store = e.offloader.store([b"three"], [0])
        with pytest.raises(ValueError, match="layer: expected none"):
            store.block(layer="k.0")


def test_the_queue_manager_refuses_a_layer_that_its_job_does_not_have():
    with engine(0) as e:
        queue: OffloadingQueueManager = e.offloader._queue
        e.device.faults.never_ends("scatter")
        spec, pages = CPULoadStoreSpec([0]), GPULoadStoreSpec([8, 9])
        layers = Layers(e.offloader._layout, [list(range(8))])
        jobs = [queue.transfer_async(spec, pages, layers=each) for each in (None, layers)]
        for got, job in enumerate(jobs):
            with pytest.raises(ValueError, match=f"layer: expected one of {got} of job {job}"):
                queue.wait_on(job, e.device.compute_stream, got)
            with pytest.raises(ValueError, match="layer: expected one of"):
                queue.wait_for_layer(job, -1)
        e.device.end_hung()
        queue.wait(jobs)
        queue.get_finished()


def test_a_load_of_no_blocks_has_its_layers_at_once():
    with engine(0) as e:
        job = e.offloader.load([], [], layers=NUM_LAYERS)
        job.block(layer=3)
        job.wait()


def test_a_load_by_layers_is_prepared_under_the_lock():
    """Its bands share the lane's staging buffers with what the feeder queues meanwhile."""
    with engine(0) as e:
        worker = next(iter(e.offloader._queue._workers.values()))
        held = []

        def prepare(groups):
            held.append(worker._pipeline._lock._is_owned())

        with patch.object(worker._pipeline, "_prepare_loads", prepare):
            e.load().wait()
        assert held == [True]


# -- the simulations' own engine --


def test_the_engine_of_the_simulations_reads_each_layer_behind_its_own_wait(monkeypatch):
    waits: list[tuple[int, int]] = []  # (job, layer), since the last read of a layer
    seen = Counter[str]()
    wait_on, wait_for_layer = (
        OffloadingQueueManager.wait_on,
        OffloadingQueueManager.wait_for_layer,
    )
    read = EngineMemory.read

    def on_stream(self, job, stream, layer=None):
        seen["streams"] += layer is not None
        waits.extend([(job, layer)] if layer is not None else [])
        wait_on(self, job, stream, layer)

    def on_host(self, job, layer, timeout=None):
        seen["hosts"] += 1
        waits.append((job, layer))
        wait_for_layer(self, job, layer, timeout)

    def reading(self, group, blocks, tensors=None):
        if tensors is not None:
            seen["reads"] += 1
            assert len(tensors) == 1
            assert len(waits) == 1, "one wait for one read"
            waits.clear()
        read(self, group, blocks, tensors)

    monkeypatch.setattr(OffloadingQueueManager, "wait_on", on_stream)
    monkeypatch.setattr(OffloadingQueueManager, "wait_for_layer", on_host)
    monkeypatch.setattr(EngineMemory, "read", reading)
    for seed in range(10):
        run_schedule(CONFIGURATIONS["staged, layers"], seed)
    assert seen["reads"] == seen["streams"] + seen["hosts"] > 50
    assert seen["hosts"] > 0
