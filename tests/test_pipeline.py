"""All lanes together: options, cancelling, waiting, shutting down, what is kept and how long."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from gated import GatedDevice
from pipelines import PipelineWorld, fill
from steps import count_calls
from torch.multiprocessing.reductions import StorageWeakRef

from triton_offload.calibration import CUDA_PATHS, Path, PathTable
from triton_offload.device.host import HostDevice
from triton_offload.specs import CPULoadStoreSpec, Direction, TransferStatus
from triton_offload.testing import InjectedError, SimulatedDevice
from triton_offload.transfer.endings import forget_frames
from triton_offload.transfer.pipeline import Pipeline, PipelineOptions

paths = pytest.mark.parametrize("path", Path, ids=lambda path: path.value)
SUCCESS, CANCELLED = TransferStatus.SUCCESS, TransferStatus.CANCELLED


# -- options --


def test_options_take_a_path_by_its_name_and_numpy_integers():
    options = PipelineOptions(
        path="zero_copy",
        paths=CUDA_PATHS,
        buffer_bytes=np.int64(1),
        num_buffers=np.uint8(1),
        max_indices=np.int32(1),
        window_bytes=np.int64(1),
    )
    assert options.path is Path.ZERO_COPY
    for name in ("buffer_bytes", "num_buffers", "max_indices", "window_bytes"):
        assert type(getattr(options, name)) is int
        assert getattr(options, name) == 1
    assert PipelineOptions(path=Path.STAGED).path is Path.STAGED
    assert PipelineOptions().path is PipelineOptions().window_bytes is None


@pytest.mark.parametrize("name", ["buffer_bytes", "num_buffers", "max_indices", "window_bytes"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (np.int64(0), ValueError),
        (1.0, TypeError),
        ("16MiB", TypeError),
        (True, TypeError),
        (np.True_, TypeError),
    ],
)
def test_options_refuse_a_size_that_is_none(name, value, error):
    with pytest.raises(error, match=rf"^{name}: expected .* got "):
        PipelineOptions(**{name: value})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": "copy"}, ValueError, r"path: expected one of \['staged', .*\] or None, got 'co"),
        ({"path": "auto"}, ValueError, r"path: expected one of \['staged', .*\] or None, got 'au"),
        ({"path": 3}, TypeError, "path: expected a Path, its name or None, got 3"),
        ({"paths": Path.STAGED}, TypeError, "paths: expected a PathTable or None, got <Path"),
        ({"paths": {}}, TypeError, "paths: expected a PathTable or None, got {}"),
        ({"num_buffers": None}, TypeError, "num_buffers: expected an integer, got None"),
    ],
)
def test_options_refuse_what_is_no_path(options, error, message):
    with pytest.raises(error, match=message):
        PipelineOptions(**options)


def test_a_path_by_its_name_is_the_path_of_every_segment():
    world = PipelineWorld.build(SimulatedDevice(), path="copy_engine")
    world.finish(world.store(range(4), range(4)))
    assert world.device.calls["copy_batch"] == 1
    assert world.device.calls["gather"] == 0
    world.close()


# -- cancelling --


class Held:
    """A first store is under way and fills the window, until `let_go`."""

    def __init__(self, **options) -> None:
        self.device = GatedDevice()
        options.setdefault("window_bytes", 1)
        options.setdefault("path", Path.STAGED)
        self.world = PipelineWorld.build(self.device, **options)
        self.pipeline = self.world.pipeline
        self.reported: list[int] = []

    def hold(self):
        self.device.gate.clear()
        return self.world.store(range(2), range(2))

    def let_go(self, *jobs) -> list[TransferStatus]:
        """Every job's status, when all have ended: all are reported, once."""
        self.device.gate.set()
        self.world.finish(*jobs)
        self.reported += self.world.reported()
        assert sorted(self.reported) == [job.job_id for job in jobs]
        assert self.world.reported() == []
        self.pipeline._check()
        return [job.result.status for job in jobs]


def test_the_first_job_of_the_backlog_is_cancelled_where_nothing_of_it_is_queued():
    held = Held()
    first = held.hold()
    jobs = [held.world.store(range(n, n + 2), range(n, n + 2)) for n in (2, 4)]
    lane = held.pipeline._lanes["store"]
    assert lane._backlog[0] is jobs[0]
    assert jobs[0].held is not None  # it is looked at, and waits for room
    assert not held.pipeline.cancel(first)
    assert held.pipeline.cancel(jobs[0])
    assert not held.pipeline.cancel(jobs[0])
    assert held.let_go(first, *jobs) == [SUCCESS, CANCELLED, SUCCESS]
    assert not held.world.pool.slots[2:4].any()
    assert torch.equal(held.world.pool.slots[4:6], held.world.tensors[0][4:6])
    held.world.close()


def test_a_job_of_which_a_segment_is_queued_is_not_cancelled():
    held = Held(buffer_bytes=128)
    held.device.gate.clear()
    job = held.world.store(range(8), range(8))  # four segments, and room for one
    assert not job.queued
    assert not held.pipeline.cancel(job)
    assert held.let_go(job) == [SUCCESS]
    assert torch.equal(held.world.pool.slots[:8], held.world.tensors[0][:8])
    held.world.close()


def test_a_job_of_which_a_segment_could_not_be_queued_whole_is_not_cancelled():
    """Its first try left something on the streams, perhaps."""
    held = Held(buffer_bytes=128)
    held.device.gate.clear()
    held.device.fail_submission = {"copy"}  # behind a gather that is queued
    job = held.world.store(range(8), range(8))
    held.device.fail_submission = set()
    assert job.started
    assert not held.pipeline.cancel(job)
    assert held.let_go(job) == [SUCCESS]
    held.world.close()


@pytest.mark.parametrize("direction", ["store", "load"])
def test_all_of_several_jobs_are_cancelled_or_none(direction):
    held = Held()
    first = held.hold()
    others = [
        held.world.store(range(4, 6), range(4, 6)),
        held.world.load(range(8, 10), range(4, 6)),  # behind the store of its slots
        held.world.load(range(10, 12), range(4, 6), expedited=True),
    ]
    assert not held.pipeline.cancel_all([*others, first])
    assert not held.pipeline.cancel_all([first, *others])
    assert not any(job.cancelled for job in (first, *others))
    chosen = others if direction == "load" else others[:1]
    assert held.pipeline.cancel_all([*chosen, chosen[0]])  # named twice is named
    assert not held.pipeline.cancel_all(others)
    left = [job for job in others if job not in chosen]
    wanted = [SUCCESS] + [CANCELLED if job in chosen else SUCCESS for job in others]
    assert held.let_go(first, *others) == wanted
    assert all(job.result.num_bytes == 128 for job in left)
    held.world.close()


def test_what_is_not_there_to_be_cancelled_is_not():
    held, other = Held(), Held()
    first, foreign = held.hold(), other.hold()
    waiting = other.world.store(range(2, 4), range(2, 4))
    mine = held.world.store(range(2, 4), range(2, 4))
    assert mine.sequence == waiting.sequence
    assert not held.pipeline.cancel(waiting)
    assert not held.pipeline.cancel_all([mine, waiting])
    assert not held.pipeline.cancel_all([])
    assert held.let_go(first, mine) == [SUCCESS] * 2
    assert not held.pipeline.cancel(first)  # finished and reported
    assert other.let_go(foreign, waiting) == [SUCCESS] * 2
    held.world.close()
    other.world.close()


def test_cancelled_jobs_are_reported_once_and_in_order():
    held = Held()
    jobs = [held.hold()]
    jobs += [held.world.store(range(n, n + 1), range(n, n + 1)) for n in range(2, 12)]
    chosen = jobs[1::2] + jobs[2:3]
    for job in reversed(chosen):
        assert held.pipeline.cancel(job)
    held.device.gate.set()
    held.world.finish(jobs[-1])
    assert held.world.reported() == [job.job_id for job in jobs]
    for job in jobs:
        assert (job.result.status is CANCELLED) == (job in chosen)
    held.world.close()


def test_a_cancelled_store_leaves_its_slots_as_what_they_were():
    """The next store clears what the one before the cancelled one left."""
    held = Held(pages=(16, 8), groups=[[(0, 16), (1, 8)], [(1, 8)]])
    held.world.finish(held.world.store(range(4), range(4, 8)))
    held.reported += held.world.reported()
    first = held.hold()
    cancelled = held.world.store(range(8, 12), range(4, 8), group=1)
    assert cancelled.held is not None
    assert held.pipeline.cancel(cancelled)
    again = held.world.store(range(12, 16), range(4, 8), group=1)
    held.reported = []
    assert held.let_go(first, cancelled, again) == [SUCCESS, CANCELLED, SUCCESS]
    assert torch.equal(held.world.pool.slots[4:8, 16:], held.world.tensors[1][12:16])
    assert not held.world.pool.slots[4:8, :16].any()
    held.world.close()


def test_a_store_waits_for_a_load_of_its_slots_behind_which_one_was_cancelled():
    for seed in range(10):
        with SimulatedDevice(seed) as device:
            world = PipelineWorld.build(device, path=Path.STAGED, window_bytes=1)
            world.finish(world.store(range(4), range(4)))
            loads = [world.load(range(n, n + 4), range(4)) for n in (8, 12)]
            if world.pipeline.cancel(loads[1]):
                assert not loads[0].finished or seed
            store = world.store(range(16, 20), range(4))
            world.finish(*loads, store)
            device.touch(reads=[world.pool.slots[:4]])
            assert torch.equal(world.tensors[0][8:12], world.tensors[0][:4])
            world.close()


# -- whose the pages are --


@paths
def test_pages_are_not_released_by_a_query_that_fails(path):
    world = PipelineWorld.build(SimulatedDevice(2), path=path)
    world.device.faults.never_ends("compute")
    world.device.launch("compute", world.device.compute_stream)
    job = world.store(range(4), range(4))
    world.device.faults.in_call("query", times=100)
    assert not world.pipeline.released(job)
    assert world.device.faults.num_struck == 1 + 2  # the lane's own question, and that of the pages
    world.device.faults.clear()
    assert not world.pipeline.released(job)
    world.device.end_hung()
    world.finish(job)
    assert world.pipeline.released(job)
    world.close()


# -- waiting and shutting down --


def test_the_timeout_of_a_shutdown_is_for_all_jobs_together():
    for last in ("store", "load"):
        device = SimulatedDevice(timing_only=True)
        world = PipelineWorld.build(device, path=Path.STAGED)
        for _ in range(3):
            device.launch("compute", device.compute_stream, seconds=0.4)
            world.store(range(2), range(2))
        getattr(world, last)(range(4, 6), range(4, 6))
        before = device.monotonic()
        with pytest.raises(TimeoutError, match="was not done within"):
            world.pipeline.shutdown(0.5)
        assert device.monotonic() - before < 0.6
        world.pipeline.shutdown(10)
        world.pool.close()


def test_a_shutdown_waits_no_longer_for_another_call_of_it_than_it_may():
    held = Held()
    held.hold()
    waiting = threading.Thread(target=held.pipeline.shutdown)
    waiting.start()
    while held.pipeline._shutting_down.acquire(blocking=False):  # until the thread has it
        held.pipeline._shutting_down.release()
        time.sleep(0.001)
    late = threading.Timer(30, held.device.gate.set)  # where this call waits for the other
    late.start()
    with pytest.raises(TimeoutError, match="another call of shutdown"):
        held.pipeline.shutdown(0.01)
    late.cancel()
    late.join(60)
    held.device.gate.set()
    waiting.join(60)
    held.pipeline.shutdown(0.01)
    held.world.pool.close()


def test_a_lane_that_hangs_keeps_no_other_from_being_closed():
    device = SimulatedDevice(1)
    world = PipelineWorld.build(device, path=Path.STAGED)
    device.faults.never_ends("gather")
    stuck = world.store(range(4), range(4))
    with pytest.raises(TimeoutError, match=f"job {stuck.job_id} was not done"):
        world.pipeline.shutdown(0.5)
    assert list(world.pipeline._lanes) == ["store"]
    assert len(device.streams) == 2 + 2
    assert device.background_names == []
    with pytest.raises(RuntimeError, match="shut down"):
        world.store(range(4, 5), range(4, 5))
    device.end_hung()
    world.close()
    assert stuck.result.status is SUCCESS
    assert len(device.streams) == 2


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("nth", range(1, 7))
def test_streams_that_could_not_be_closed_are_closed_by_a_later_call(nth, times):
    device = SimulatedDevice(1)
    world = PipelineWorld.build(device, path=Path.STAGED)
    world.store(range(4), range(4))
    for _ in range(times):
        device.faults.in_call("close_stream", nth)
        with pytest.raises(InjectedError):
            world.pipeline.shutdown(60)
        assert device.background_names == []
        assert len(device.streams) == 2 + 1, "the others are closed"
        nth = 1
    world.close()
    assert len(device.streams) == 2
    assert not world.pipeline._lanes


@pytest.mark.parametrize("step", ["feeder", "rings", "ids", "lane"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_step_of_the_shutdown_that_fails_keeps_no_other_from_being_taken(step, times):
    world = PipelineWorld.build(HostDevice(), path=Path.STAGED)
    threads = threading.active_count()
    pipeline, lane = world.pipeline, world.pipeline._lanes["load"]
    owner, name = {
        "feeder": (pipeline._feeder, "stop"),
        "rings": (lane.streams._ring, "close"),
        "ids": (lane._indices, "close"),
        "lane": (lane, "close"),
    }[step]
    left = times
    real = [getattr(owner, name)]  # a bound method, which keeps what it is of

    def fail():
        nonlocal left
        left -= 1
        if left >= 0:
            raise InjectedError(f"injected: {step}")
        real[0]()

    if step == "ids":  # a step that was noted when the lane was made
        steps = lane._closing._steps
        assert [step.func for step in steps].count(real[0]) == 1
        steps[:] = [partial(fail) if step.func == real[0] else step for step in steps]
    elif step in ("feeder", "lane"):
        setattr(owner, name, fail)
    else:
        lane.streams._ring.close = fail
    memory = _memory_of(pipeline)
    for _ in range(times):
        with pytest.raises(InjectedError, match=step):
            pipeline.shutdown(60)
        assert list(pipeline._lanes) == ([] if step == "feeder" else ["load"])
    pipeline.shutdown(60)
    pipeline.shutdown(60)
    assert left == -1 or step == "feeder"
    del owner, lane
    real.clear()
    gc.collect()
    assert all(each.expired() for each in memory)
    assert threading.active_count() == threads - 7  # a feeder, and two streams for each lane
    world.pool.close()


class StubbornDevice(HostDevice):
    """Closes no stream as long as `stubborn`."""

    stubborn = True

    def close_stream(self, stream):
        if self.stubborn:
            raise InjectedError("injected: not closed")
        super().close_stream(stream)


def test_streams_that_cannot_be_closed_keep_no_memory():
    device = StubbornDevice()
    world = PipelineWorld.build(device, path=Path.STAGED)
    memory = _memory_of(world.pipeline)
    with pytest.raises(InjectedError):
        world.pipeline.shutdown(60)
    assert world.pipeline._lanes.keys() == {"store", "load", "expedited"}
    gc.collect()
    assert all(each.expired() for each in memory)
    device.stubborn = False
    world.close()


def test_a_shutdown_that_raised_lets_another_thread_try_again():
    device = SimulatedDevice(1)
    world = PipelineWorld.build(device, path=Path.STAGED)
    device.faults.in_call("close_stream")
    with pytest.raises(InjectedError):
        world.pipeline.shutdown(60)
    errors = []

    def shut_down():
        try:
            world.pipeline.shutdown(0.2)
        except TimeoutError as error:
            errors.append(error)

    thread = threading.Thread(target=shut_down)
    thread.start()
    thread.join(60)
    assert not errors
    assert not world.pipeline._lanes
    world.pool.close()


def test_what_an_error_came_of_is_told_and_its_frames_are_gone():
    def fail(error):
        raise error

    try:
        try:
            fail(ValueError("first"))
        except ValueError:
            try:
                fail(KeyError("second"))
            except KeyError as second:
                raise RuntimeError("third") from second
    except RuntimeError as third:
        error = third
    for _ in range(2):  # an error may end several jobs
        forget_frames(error)
    chain = [error, error.__cause__, error.__cause__.__context__]
    assert [str(each) for each in chain] == ["third", "'second'", "first"]
    assert [each.__traceback__ for each in chain] == [None] * 3
    assert [len(each.__notes__) for each in chain] == [1] * 3
    assert "in fail" in chain[2].__notes__[0]


def _memory_of(pipeline: Pipeline) -> list[StorageWeakRef]:
    """All staging memory, and that of ids."""
    tensors = []
    for lane in pipeline._lanes.values():
        tensors += [buffer.memory for buffer in lane.streams._ring._buffers]
        tensors += [lane.streams._zeros, lane.streams._places, lane._indices._memory]
    return [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]


@paths
@pytest.mark.parametrize("fails", [False, True], ids=["landed", "failed"])
def test_after_a_shutdown_nobody_keeps_memory_that_jobs_moved(path, fails):
    """Neither the pipeline does, nor a job that a caller keeps, nor the error in its result."""
    device = GatedDevice()
    world = PipelineWorld.build(device, path=path, buffer_bytes=256)
    pipeline = world.pipeline
    tensors = [world.tensors[0], world.pool.slots]
    memory = _memory_of(pipeline) + [StorageWeakRef(each.untyped_storage()) for each in tensors]
    assert not any(each.expired() for each in memory)
    kinds = {"gather", "scatter", "copy", "copy_batch"}
    if fails:
        device.fail_submission = kinds
    jobs = [world.store(range(8), range(8)), world.load(range(8, 16), range(8))]
    world.finish(*jobs)
    device.fail_submission = set()
    if fails:
        device.fail_running = kinds
    jobs.append(world.store(range(16, 24), range(8)))
    world.finish(*jobs)
    device.fail_running = set()
    assert [job.result.success for job in jobs] == [not fails] * 3
    for job in jobs:  # where it failed is told all the same
        assert not fails or "gated.py" in "".join(job.result.error.__notes__)
    del tensors
    world.close()
    del world
    gc.collect()
    assert [each.expired() for each in memory] == [True] * len(memory)
    assert pipeline.take_finished(Direction.STORE) == [jobs[0], jobs[2]]  # still to be had, once
    assert all(pipeline.released(job) for job in jobs)


def test_a_finished_job_keeps_no_arrays():
    device = GatedDevice()
    world = PipelineWorld.build(device, path=Path.STAGED)
    ids = np.arange(4)
    alive = weakref.ref(ids)
    device.gate.clear()
    jobs = [world.store(ids, range(4)), world.load(range(8, 12), range(4))]
    assert jobs[1].slots is None
    device.gate.set()
    world.finish(*jobs)
    for job in jobs:  # the load has followed the store
        assert (job.runs, job.after) == ([], [])
        kept = ("planned", "held", "pages", "slots", "compute", "start", "end", "last")
        assert [getattr(job, name) for name in kept] == [None] * len(kept)
        assert job.result.num_bytes == job.num_bytes == 4 * 64
    del ids
    gc.collect()
    assert alive() is None
    world.close()


def test_a_pipeline_that_is_dropped_is_no_circle():
    """Its memory goes with it, and not when a collector comes by."""
    device = SimulatedDevice(1)
    world = PipelineWorld.build(device, path=Path.STAGED)
    lanes = list(world.pipeline._lanes.values())
    world.finish(world.store(range(4), range(4)))
    world.reported()
    gc.collect()
    gc.disable()  # from here on
    world.close()
    alive = [weakref.ref(world.pipeline)]
    for lane in lanes:
        alive += [weakref.ref(lane), weakref.ref(lane.streams)]
    lanes.clear()
    del lane
    world.pipeline._feeder._step = None  # the device's
    try:
        del world
        assert [each() for each in alive] == [None] * 7
    finally:
        gc.enable()


# -- where and how torch makes tensors is the caller's business --


class OwnMemory(HostDevice):
    """Makes its buffers outside of what the caller's torch is set to, as a device should."""

    def empty(self, num_bytes):
        with torch.inference_mode(False), torch.device("cpu"):
            return super().empty(num_bytes)

    def empty_indices(self, count):
        with torch.inference_mode(False), torch.device("cpu"):
            return super().empty_indices(count)


@paths
def test_jobs_submitted_in_inference_mode_with_a_default_device_move_their_bytes(path):
    world = PipelineWorld.build(
        OwnMemory(),
        pages=(16, 8),
        groups=[[(0, 16), (1, 8)], [(0, 9)]],
        blocks_per_chunk=2,
    )
    world.pipeline.shutdown()
    torch.set_default_device("meta")
    try:
        with torch.inference_mode():
            options = PipelineOptions(path=path, buffer_bytes=128)
            world.pipeline = Pipeline(world.layout, world.pool, options)
            jobs = [
                world.store(range(8), range(4)),
                world.store(range(8, 16), range(4), group=1),
                world.load(range(16, 24), range(4), group=1),
            ]
            world.finish(*jobs)
        jobs.append(world.store(range(1, 4), range(8, 10), group=1))
        with torch.inference_mode():
            jobs.append(world.load(range(24, 27), range(8, 10), group=1))
        world.finish(*jobs)
    finally:
        torch.set_default_device("cpu")
    assert [job.result.error for job in jobs] == [None] * 5
    pages = world.tensors[0]
    assert torch.equal(pages[16:24, :9], pages[8:16, :9])
    assert torch.equal(pages[24:27, :9], pages[1:4, :9])
    fill(pages[:8], 7)
    again = world.store(range(8), range(4))  # and what was made then is usable outside
    world.finish(again)
    assert again.result.success
    torch.set_default_device("meta")
    try:
        with torch.inference_mode():
            world.close()
    finally:
        torch.set_default_device("cpu")
    world.close()


# -- work that grows as jobs do, and no faster --


def steps(count: int) -> dict[str, int]:
    """The calls that each public method takes for so many jobs, the first of them under way."""
    device = SimulatedDevice(1)
    world = PipelineWorld.build(device, path=Path.STAGED, buffer_bytes=128, window_bytes=1)
    world.device.background("engine", lambda: None)
    device.faults.never_ends("compute")
    device.launch("compute", device.compute_stream)
    pipeline, jobs = world.pipeline, []
    side = device.new_stream("side")

    def submit():
        for i in range(count):
            place = range(i % 8, i % 8 + 1)
            kind = (world.store, world.load)[i % 2]  # each after the one before it
            jobs.append(kind(place if i % 2 == 0 else range(i % 8 + 8, i % 8 + 9), place))

    def wait():
        for job in jobs:
            pipeline.wait(job)

    def take():
        while any(pipeline.take_finished(direction) for direction in Direction):
            pass

    taken = {"submit": count_calls(submit)}
    taken["released"] = count_calls(lambda: [pipeline.released(job) for job in jobs])
    taken["cancel"] = count_calls(lambda: [pipeline.cancel(job) for job in jobs[count // 2 :]])
    device.end_hung()
    taken["wait"] = count_calls(wait)
    taken["wait_on"] = count_calls(lambda: [pipeline.wait_on(job, side) for job in jobs])
    taken["take"] = count_calls(take)
    waiting = [world.store(range(1), range(1)) for _ in range(count)]
    taken["cancel all"] = count_calls(lambda: pipeline.cancel_all(waiting[count // 2 :]))
    taken["shutdown"] = count_calls(lambda: pipeline.shutdown(60))
    world.pool.close()
    return taken


def test_twice_as_many_jobs_take_twice_as_many_steps():
    few, many = steps(100), steps(200)
    for name in few:
        assert many[name] <= 2.3 * few[name] + 100, (name, few, many)


def test_a_table_of_paths_is_asked_where_no_path_is_given():
    world = PipelineWorld.build(SimulatedDevice(), paths=PathTable(Path.ZERO_COPY))
    world.finish(world.store(range(4), range(4)))
    assert (world.device.calls["gather"], world.device.calls["copy"]) == (1, 0)
    world.close()


def test_a_staging_buffer_holds_a_chunk_at_least():
    options = {"path": Path.STAGED, "blocks_per_chunk": 4, "buffer_bytes": 64}
    world = PipelineWorld.build(SimulatedDevice(2), pages=(64, 32), **options)
    stored, before = world.store(range(8), range(2)), world.tensors[1][:8].clone()
    world.finish(stored, world.load(range(8, 16), range(2)))
    assert torch.equal(world.tensors[1][8:16], before)
    world.close()


def test_an_expedited_load_has_a_lane_of_its_own():
    device = SimulatedDevice(1)
    world = PipelineWorld.build(device, path=Path.STAGED)
    world.finish(world.store(range(4), range(4)))
    device.faults.never_ends("scatter")
    stuck = world.load(range(8, 12), range(4))
    quick = world.load(range(12, 16), range(4), expedited=True)
    world.finish(quick)
    assert not stuck.finished
    assert torch.equal(world.tensors[0][12:16], world.tensors[0][:4])
    device.end_hung()
    world.close()


def test_a_job_is_refused_while_the_stream_that_it_names_captures():
    with SimulatedDevice(0) as device:
        world = PipelineWorld.build(device)
        other = device.new_stream("other")
        device.is_capturing = True
        with pytest.raises(RuntimeError, match="the current stream captures a graph"):
            world.store(range(2), range(2))
        with pytest.raises(RuntimeError, match=r"^stream captures a graph"):
            world.store(range(2), range(2), stream=device.compute_stream)
        world.finish(world.store(range(2), range(2), stream=other))
        device.is_capturing = False
        device.close_stream(other)
        world.close()


def test_a_pipeline_has_memory_for_the_lanes_that_jobs_come_for():
    with SimulatedDevice(0) as device:
        made = device.calls["new_stream"]
        world = PipelineWorld.build(device)
        assert device.calls["new_stream"] - made == 6
        stores = Pipeline(world.layout, world.pool, PipelineOptions(buffer_bytes=64), ("store",))
        assert device.calls["new_stream"] - made == 6 + 2
        job = stores.submit(
            1, Direction.STORE, world.pages(range(3), 0), CPULoadStoreSpec(range(3))
        )
        stores.wait(job, 60)
        assert job.result.success
        stores._check()
        stores.shutdown(60)
        world.close()
