"""Operations that fail or never end, a full pool, functions that raise: see `test_faults`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
from fault_levels import LEVELS, OffloaderWorld, begun
from fault_worlds import NUM_CHUNKS, Job

from triton_offload.calibration import Path
from triton_offload.errors import DeviceLostError, PoolFullError
from triton_offload.specs import CPULoadStoreSpec, Direction, LoadStoreSpec
from triton_offload.testing import InjectedError
from triton_offload.transfer.function_worker import FunctionWorker
from triton_offload.transfer.queue_manager import OffloadingQueueManager

NTHS = (1, 2, 5)
levels = pytest.mark.parametrize("level", LEVELS)

# -- an operation that fails when it runs --

RUNS = {
    Path.STAGED: ("gather", "scatter", "copy"),
    Path.ZERO_COPY: ("gather", "scatter"),
    Path.COPY_ENGINE: ("copy_batch",),
}
runs = pytest.mark.parametrize(
    ("path", "kind"),
    [(path, kind) for path, kinds in RUNS.items() for kind in kinds],
    ids=lambda value: getattr(value, "value", value),
)


@runs
@levels
def test_an_operation_that_fails_fails_its_job_alone(path, kind, level):
    for nth in NTHS:
        world = begun(level, nth, path)
        world.injected = InjectedError(f"injected: {kind} failed")
        world.device.faults.in_run(kind, nth, error=world.injected)
        world.work()
        assert world.device.faults.num_struck == 1
        world.check_failures(kind)
        assert not world.raised
        assert len(world.failed) == 1
        assert world.failed[0].result.error is world.injected
        assert not any(lane.broken for lane in world.pipeline._lanes.values())
        assert all(job.result.success for job in world.work_on())
        world.check_end()
        world.check_memory_freed()


@runs
@levels
def test_after_a_sticky_error_everything_fails_at_once(path, kind, level):
    for nth in NTHS:
        world = begun(level, nth, path)
        world.injected = InjectedError(f"injected: {kind} failed")
        world.device.faults.in_run(kind, nth, sticky=True, error=world.injected)
        world.work()
        assert world.device.faults.num_struck == 1
        world.check_failures(kind)
        assert world.failed
        errors = [job.result.error for job in world.failed] + [error for _, error in world.raised]
        assert all(isinstance(error, DeviceLostError) for error in errors)
        assert not any(lane.broken for lane in world.pipeline._lanes.values())  # no fallback
        before = len(world.raised)
        assert world.work_on() == []
        assert len(world.raised) > before  # refused, and the message is clear
        assert f"{kind} failed" in str(world.raised[-1][1])
        world.check_pool()  # what was stored is still in host memory
        world.close()
        world.check_freed()
        world.check_memory_freed()


def test_staging_that_could_not_be_cleared_is_cleared_again():
    """The gaps between padded pages go to the pool: another's bytes must not lie there."""
    world = begun("queue manager", 1, Path.STAGED)
    lane = world.pipeline._lanes["store"]
    world.injected = InjectedError("injected: fill_zero failed")
    lane.streams.distrust()
    world.device.faults.in_run("fill_zero", 1, error=world.injected)
    world.store(1, [2])
    world.finish()
    assert [job.result.error for job in world.failed] == [world.injected]
    before = world.device.calls["fill_zero"]
    world.store(1, [2, 3])
    world.finish()
    assert world.device.calls["fill_zero"] >= before + 2  # both buffers of the ring
    world.check_end()


@levels
def test_zeros_that_cannot_be_written_fail_the_construction(level):
    """Slots are cleared with them, and no job would tell that they are not zeros."""
    for nth in range(1, 4):  # a lane each
        world = LEVELS[level](1, Path.STAGED)
        world.injected = InjectedError("injected: fill_zero failed")
        world.device.faults.in_run("fill_zero", nth, error=world.injected)
        world.call("open", world.open)
        assert [error for _, error in world.raised] == [world.injected]
        world.check_freed()


# -- a submission that fails more than once --


def test_pages_of_a_store_that_was_queued_in_part_are_released_when_nothing_reads_them():
    for seed in range(10):
        world = begun("queue manager", seed, Path.STAGED)
        world.arm("copy", 2)  # of the second chunk, whose gather is queued
        world.device.faults.in_call("copy_batch", error=world.injected)
        job = world.store(1, [2, 3, 4])
        while not world.queue.source_released(job.handle):
            world.device.sleep(0)
        world.device.touch(writes=[world.tensors[2][block, :7] for block in job.blocks])
        world.device.check()
        world.finish()
        assert job.result.error is world.injected
        world.check_end()


def test_a_path_whose_stand_in_failed_too_is_not_chosen_again():
    world = begun("queue manager", 1, Path.ZERO_COPY)
    world.arm("gather", 1)
    world.device.faults.in_call("copy_batch", error=world.injected)
    world.store(1, [2])  # tried once over another path
    world.finish()
    assert [job.result.error for job in world.failed] == [world.injected]
    lane = world.pipeline._lanes["store"]
    assert lane.broken == {Path.ZERO_COPY, Path.COPY_ENGINE}
    world.work()
    assert len(world.failed) == 1
    assert lane._last_path is Path.STAGED
    world.work_on()
    world.check_end()


# -- a copy that never ends --


@runs
@levels
def test_what_a_copy_that_never_ends_holds_is_not_handed_out(path, kind, level):
    world = begun(level, 3, path)
    loads = kind == "scatter"
    world.device.faults.never_ends(kind)
    stuck = world.load(0, [0]) if loads else world.store(0, [3])
    for _ in range(2):  # waiting is bounded, and may be tried again
        with pytest.raises(TimeoutError):
            world._wait([stuck], 0.5)
    world.device.faults.clear()
    # The other lanes go on, and a lane's jobs stay in order behind it.
    free = world.load(1, [0], expedited=True)
    behind = world.load(1, [1]) if loads else world.store(1, [2])
    for _ in range(5):
        world.device.sleep(0.01)
        world.collect()
    assert free.result.success
    assert stuck.result is None
    assert behind.result is None
    if isinstance(world, OffloaderWorld):
        assert world.offloader.stats().num_pinned == 2
        fill_up(world, [stuck, behind])
    world.check_pool()
    for _ in range(2):
        with pytest.raises(TimeoutError):
            world.close_once(0.5)
        assert world.device.num_registered  # nothing that it may touch is unpinned
        assert len(world.device.streams) > 2
    world.device.end_hung()
    world.close()
    world.check_freed()


def fill_up(world: OffloaderWorld, held: list[Job]) -> None:
    """Store as much as there is: never into the bytes that are held."""
    theirs = [(job.group, chunk) for job in held for chunk, _ in job.chunks]
    others = [
        each for each in itertools.product(range(2), range(3, NUM_CHUNKS)) if each not in theirs
    ]
    stored = []
    if held[0].direction is Direction.STORE:  # stores queue behind it, and their slots are held too
        with pytest.raises(PoolFullError, match="chunks pinned by transfers"):
            stored.extend(world.store(group, [chunk]) for group, chunk in others)
        assert stored
    else:
        for group, chunk in others:
            stored.append(world.store(group, [chunk]))
            world.device.drain()
            world.collect()
    taken = {byte for job in held for byte in bytes_of(world, job)}
    assert not any(taken & set(bytes_of(world, job)) for job in stored)


def bytes_of(world: OffloaderWorld, job: Job) -> Iterator[int]:
    """The addresses of all bytes of a job's slots."""
    for slot_id in job.slots:
        slot = world.slot(job.group, slot_id)
        yield from range(slot.data_ptr(), slot.data_ptr() + len(slot))


def test_a_full_pool_refuses_and_loses_nothing():
    world = begun("offloader", 1, Path.STAGED)
    have = {key: set(part) for key, part in world.have.items()}
    too_many = world.offloader.num_chunks_of(0) + 1
    with pytest.raises(PoolFullError):
        world.offloader.store(
            [bytes([chunk]) for chunk in range(3, 3 + too_many)],
            [0] * (2 * too_many),
        )
    world.after_step()
    assert world.have == have
    assert all(job.result.success for job in world.work_on())
    world.check_end()


# -- functions that raise where nobody expects it --


def test_what_a_lane_raises_ends_its_job_alone():
    world = begun("queue manager", 1, Path.STAGED)
    lane = world.pipeline._lanes["store"]
    contents = lane._contents
    world.injected = InjectedError("injected: slots not marked")

    def fail_once(run):
        del contents.store
        raise world.injected

    contents.store = fail_once
    world.work()
    assert [job.result.error for job in world.failed] == [world.injected]
    assert not world.raised
    world.work_on()
    world.check_end()


def test_the_feeder_outlives_what_it_raises():
    world = begun("queue manager", 1, Path.STAGED)
    lane = world.pipeline._lanes["store"]
    pump, left = lane.pump, 3

    def fail_thrice() -> None:
        nonlocal left
        if left:
            left -= 1
            raise InjectedError("injected: not pumped")
        pump()

    job = world.store(0, [3, 4, 5, 6, 7])
    world.store(1, [3, 4, 5, 6, 7])
    assert lane.has_backlog
    lane.pump = fail_thrice
    for _ in range(200):  # nobody calls
        world.device.sleep(0.01)
    assert not left
    assert not lane.has_backlog
    lane.pump = pump
    world.finish()
    assert job.result.success
    world.check_end()


class Disk(LoadStoreSpec):
    """A medium of a user's own."""


class BrokenWorker(FunctionWorker):
    """Cannot say what has ended, and not be shut down."""

    def get_finished(self):
        raise InjectedError("injected: no reports")

    def shutdown(self, timeout=None):
        super().shutdown(timeout)
        raise InjectedError("injected: not shut down")


def test_a_worker_that_raises_takes_nothing_from_the_others():
    manager = OffloadingQueueManager()
    threads = threading.active_count()
    manager.register_worker(CPULoadStoreSpec, Disk, lambda src, dst: 8)
    broken = BrokenWorker(lambda src, dst: 8)
    manager.register_worker(Disk, Disk, broken)
    manager.register_worker(Disk, CPULoadStoreSpec, lambda src, dst: 8)
    jobs = [
        manager.transfer_async(CPULoadStoreSpec([1]), Disk()),
        manager.transfer_async(Disk(), CPULoadStoreSpec([1])),
    ]
    manager.wait(jobs, 60)
    with pytest.raises(InjectedError, match="no reports"):
        manager.get_finished()
    broken.get_finished = list
    assert sorted(result.job_id for result in manager.get_finished()) == jobs
    with pytest.raises(InjectedError, match="not shut down"):
        manager.shutdown(60)
    assert threading.active_count() == threads


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError])
def test_a_function_that_would_end_its_thread_ends_its_job(error):
    manager = OffloadingQueueManager()
    failing = [True]

    def write(src: CPULoadStoreSpec, dst: Disk) -> int:
        if failing.pop():
            raise error
        return 8

    failing[:] = [False, True]
    manager.register_worker(CPULoadStoreSpec, Disk, write)
    jobs = [manager.transfer_async(CPULoadStoreSpec([1]), Disk()) for _ in range(2)]
    manager.wait(jobs, 60)
    results = {result.job_id: result for result in manager.get_finished()}
    assert isinstance(results[jobs[0]].error, error)
    assert results[jobs[1]].success
    manager.shutdown(60)


def test_a_thread_that_cannot_be_started_accepts_no_job(monkeypatch):
    manager = OffloadingQueueManager()
    written = []
    manager.register_worker(CPULoadStoreSpec, Disk, lambda src, dst: written.append(src) or 8)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            manager.transfer_async(CPULoadStoreSpec([1]), Disk())
    job = manager.transfer_async(CPULoadStoreSpec([2]), Disk())
    manager.wait([job], 60)
    assert [result.job_id for result in manager.get_finished()] == [job]
    manager.shutdown(60)
    assert [int(src.slot_ids[0]) for src in written] == [2]
