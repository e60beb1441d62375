"""What an offloader counts, and what it says of how it stands."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from gated import GatedDevice
from pipelines import PipelineWorld

from triton_offload import KVOffloader
from triton_offload.calibration import Path
from triton_offload.specs import Direction, TransferResult, TransferStatus
from triton_offload.stats import DirectionStats, DirectionTotals, PathStats
from triton_offload.testing import InjectedError, SimulatedDevice
from triton_offload.transfer.pipeline import PipelineOptions

SUCCESS, FAILED = TransferStatus.SUCCESS, TransferStatus.FAILED
PAGE = 64


def caches(num_tensors: int = 2) -> list[torch.Tensor]:
    return [torch.full((16, PAGE), i, dtype=torch.uint8) for i in range(num_tensors)]


def offloader(device=None, host_bytes: int = 16 * 2 * PAGE, **kwargs) -> KVOffloader:
    kwargs.setdefault("options", PipelineOptions(path=Path.STAGED, buffer_bytes=1 << 10))
    return KVOffloader(caches(), host_bytes, device=device, **kwargs)


def test_jobs_are_counted_however_they_ended_and_bytes_where_they_landed():
    totals = DirectionTotals()
    assert totals.stats() == DirectionStats()
    assert totals.stats().gb_per_s == 0.0
    for result in (
        TransferResult(1, SUCCESS, 3_000_000_000, 1.0),
        TransferResult(2, FAILED, error=OSError()),
        TransferResult(3, TransferStatus.CANCELLED),
        TransferResult(4, SUCCESS, 1_000_000_000, 3.0),
        TransferResult(5, SUCCESS),
    ):
        totals.add(result)
    stats = totals.stats()
    assert (stats.jobs, stats.failed, stats.num_bytes) == (5, 1, 4_000_000_000)
    assert (stats.cancelled, stats.succeeded) == (1, 3)
    assert stats.gb_per_s == pytest.approx(1.0)


def test_failures_are_counted_by_their_cause_and_what_was_taken_back_is_none():
    totals = DirectionTotals()
    errors = [OSError(1), InjectedError(), OSError(2), None]
    for error in errors:
        totals.add(TransferResult(1, FAILED, error=error))
    totals.add(TransferResult(2, TransferStatus.CANCELLED))
    stats = totals.stats()
    assert stats.failures == {"OSError": 2, "InjectedError": 1, "unknown": 1}
    assert sum(stats.failures.values()) == stats.failed == 4
    totals.add(TransferResult(3, FAILED, error=ValueError()))
    assert stats.failures == {"OSError": 2, "InjectedError": 1, "unknown": 1}  # as it was


def test_seconds_of_a_path_are_those_of_jobs_that_crossed_by_it_alone():
    totals = DirectionTotals()
    for by_path, seconds, waited in (
        ((("staged", 30),), 1.0, 0.25),
        ((("staged", 10), ("copy_engine", 5)), 2.0, 0.5),
        ((("staged", 2),), 4.0, 0.0),
        ((), 8.0, 0.0),
    ):
        num_bytes = sum(count for _, count in by_path)
        result = TransferResult(
            1, SUCCESS, num_bytes, seconds, bytes_by_path=by_path, queue_seconds=waited
        )
        totals.add(result)
    stats = totals.stats()
    assert stats.paths == {"staged": PathStats(42, 5.0), "copy_engine": PathStats(5, 0.0)}
    assert (stats.seconds, stats.queue_waits, stats.queue_seconds) == (15.0, 3, 0.75)


@pytest.mark.parametrize("path", Path, ids=lambda path: path.value)
def test_a_job_says_by_which_path_its_bytes_went(path):
    with SimulatedDevice(3) as device:
        world = PipelineWorld.build(device, path=path, buffer_bytes=256)
        jobs = [world.store(range(12), range(12)), world.load(range(16, 28), range(12))]
        empty = world.store(range(0), range(0))
        world.finish(*jobs, empty)
        for job in jobs:
            assert job.result.bytes_by_path == ((path.value, 12 * PAGE),)
        assert (empty.result.bytes_by_path, empty.result.queue_seconds) == ((), 0.0)
        world.close()


def test_a_segment_counts_for_the_path_that_stood_in():
    with SimulatedDevice(3) as device:
        world = PipelineWorld.build(device, path=Path.STAGED, buffer_bytes=4 * PAGE)
        paths = world.pipeline._lanes["store"].paths
        queue, tried = paths.queue, itertools.count()

        def refuse_the_second(path, *args):
            if next(tried) == 1:
                raise InjectedError("injected: not queued")
            return queue(path, *args)

        paths.queue = refuse_the_second
        job = world.store(range(12), range(12))
        world.finish(job)
        assert job.result.bytes_by_path == (("staged", 4 * PAGE), ("copy_engine", 8 * PAGE))
        assert job.result.num_bytes == 12 * PAGE
        world.close()


def test_a_job_waits_from_its_submission_until_something_of_it_is_queued():
    device = SimulatedDevice(3)
    options = {"path": Path.COPY_ENGINE, "window_bytes": PAGE, "buffer_bytes": 4 * PAGE}
    world = PipelineWorld.build(device, **options)
    now = [10.0]
    device.monotonic = lambda: now[0]
    first = world.store(range(8), range(8))  # two segments, of which one fits the window
    behind = world.store(range(8, 12), range(8, 12))
    assert (first.started, first.queued, behind.started) == (True, False, False)
    now[0] = 12.5
    world.finish(first, behind)
    assert first.result.queue_seconds == 0.0
    assert behind.result.queue_seconds == 2.5
    world.close()


@pytest.mark.parametrize("step", ["submitted", "started"])
def test_a_clock_that_fails_is_no_reason_to_fail_a_job(step):
    device = SimulatedDevice(3)
    world = PipelineWorld.build(device, path=Path.COPY_ENGINE)
    clock, calls = device.monotonic, itertools.count()

    def fail():
        if next(calls) == ("submitted", "started").index(step):
            raise InjectedError("injected: no clock")
        return clock()

    device.monotonic = fail
    job = world.store(range(4), range(4))
    device.monotonic = clock
    world.finish(job)
    assert (job.result.status, job.result.queue_seconds) == (SUCCESS, 0.0)
    assert job.result.bytes_by_path == (("copy_engine", 4 * PAGE),)
    world.close()


@pytest.mark.parametrize("path", ["staged", "zero_copy", "copy_engine"])
def test_bytes_by_path_add_up_to_the_bytes_of_the_jobs_that_succeeded(path):
    device = SimulatedDevice(1)
    options = PipelineOptions(path=Path(path), buffer_bytes=4 * PAGE)
    with offloader(device, blocks_per_chunk=4, options=options) as kv:
        kv._pool.wait_ready(60)
        kv.store([b"a"], [1, 2], first_block=1).wait()  # its middle
        kv.store([b"a", b"b"], range(8)).wait()  # two runs of the first, and the second
        kv.store([b"a", b"b"], range(8)).wait()  # nothing to move
        kv.load([b"a", b"b"], range(8, 16)).wait()
        stats = kv.stats()
    for each, num_pages in ((stats.store, 16), (stats.load, 16)):
        assert each.num_bytes == num_pages * PAGE
        assert {name: part.num_bytes for name, part in each.paths.items()} == {path: each.num_bytes}
        assert each.paths[path].seconds == each.seconds > 0
    assert (stats.store.jobs, stats.store.queue_waits) == (3, 2)
    assert (stats.load.jobs, stats.load.queue_waits) == (1, 1)
    assert stats.store.failures == stats.load.failures == {}


def test_a_job_of_two_runs_has_waited_until_the_first_of_them_was_queued():
    device = SimulatedDevice(1)
    options = PipelineOptions(path=Path.COPY_ENGINE, window_bytes=PAGE, buffer_bytes=1 << 10)
    with offloader(device, blocks_per_chunk=4, options=options) as kv:
        kv.store([b"a"], [1, 2], first_block=1).wait()
        now = [10.0]
        clock, device.monotonic = device.monotonic, lambda: now[0]
        job = kv.store([b"a"], range(4))  # what it lacks: two runs
        assert len(kv._transfers_of(job)) == 2
        now[0] = 14.0
        assert job.wait().queue_seconds == 0.0
        device.monotonic = clock


def test_a_job_that_failed_counts_no_bytes():
    device = GatedDevice()
    with offloader(device) as kv:
        device.fail_running = {"gather", "copy", "copy_batch"}
        job = kv.store([b"a"], [0])
        job.block(60)
        assert kv.stats().store.num_bytes == 0
        assert kv.stats().store.paths == {}
        assert list(kv.stats().store.failures.values()) == [1]
        device.fail_running = set()


def test_stats_say_how_the_pool_stands():
    with offloader() as kv:
        kv._pool.wait_ready(60)
        kv.store([b"a", b"b"], [0, 1]).wait()
        stats = kv.stats()
        assert (stats.host_bytes, stats.used_bytes) == (16 * 2 * PAGE, 2 * 2 * PAGE)
        assert (stats.pinned, stats.pin_error, stats.broken_paths) == (True, None, ())
    closed = kv.stats()
    assert (closed.host_bytes, closed.used_bytes, closed.pinned) == (0, 0, False)
    assert closed.pin_error is None
    assert closed.store == stats.store
    json.dumps(dataclasses.asdict(closed))


@pytest.mark.parametrize(
    ("refused", "said"),
    [(True, "the device refuses to pin it"), (False, "InjectedError('injected: pin')")],
)
def test_stats_say_why_the_pool_is_not_pinned(refused, said):
    device = SimulatedDevice(1)

    def register(host):
        if refused:
            return False
        raise InjectedError("injected: pin")

    device.register = register
    with offloader(device) as kv:
        assert (kv.stats().pinned, kv.stats().pin_error) == (False, None)  # not yet
        kv._pool.wait_ready(60)
        assert (kv.stats().pinned, kv.stats().pin_error) == (False, said)


@pytest.mark.parametrize("kernel", ["gather", "scatter"])
def test_stats_name_the_paths_that_are_broken(kernel):
    device = SimulatedDevice(1)
    with offloader(device) as kv:
        kv._pool.wait_ready(60)
        setattr(device, kernel, None)
        kv.store([b"a"], [0]).wait()
        kv.load([b"a"], [1]).wait()
        stats = kv.stats()
        assert stats.broken_paths == ("staged",)
        paths = {"gather": stats.store.paths, "scatter": stats.load.paths}
        assert set(paths.pop(kernel)) == {"copy_engine"}
        assert [set(each) for each in paths.values()] == [{"staged"}]
        delattr(device, kernel)
    assert kv.stats().broken_paths == ()


def test_a_store_and_a_load_are_counted_apart():
    with offloader() as kv:
        kv.store([b"a"], [0]).wait()
        kv.load([b"a"], [1]).wait()
        assert kv._ledger.totals.keys() == set(Direction)
        assert (kv.stats().store.jobs, kv.stats().load.jobs) == (1, 1)
