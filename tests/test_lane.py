"""One lane: where a job begins and ends, what is tried when a path fails, how a lane is lost."""

from __future__ import annotations

import pytest
import torch
from gated import GatedDevice
from pipelines import PipelineWorld

from triton_offload.calibration import Path
from triton_offload.errors import DeviceLostError
from triton_offload.specs import TransferStatus
from triton_offload.testing import InjectedError, SimulatedDevice
from triton_offload.transfer.segment import Gate

paths = pytest.mark.parametrize("path", Path, ids=lambda path: path.value)
WORK = ("gather", "scatter", "copy", "copy_batch", "fill_zero")


class WatchedDevice(SimulatedDevice):
    """Notes the streams of all work, and of the records of timed events."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.work: list[tuple[str, object]] = []
        self._timed: list[object] = []

    def new_event(self, *, timed=False):
        event = super().new_event(timed=timed)
        if timed:
            self._timed.append(event)
        return event

    def record(self, event, stream):
        if any(event is timed for timed in self._timed):
            self.work.append(("timed", stream))
        super().record(event, stream)


def _noting(name):
    def call(self, *args, **kwargs):
        stream = args[5] if name in ("gather", "scatter") else args[-1]
        self.work.append((name, stream))
        return getattr(SimulatedDevice, name)(self, *args, **kwargs)

    return call


for _name in WORK:
    setattr(WatchedDevice, _name, _noting(_name))


def statuses(world: PipelineWorld, *jobs) -> list[TransferStatus]:
    return [job.result.status for job in jobs]


SUCCESS, FAILED = TransferStatus.SUCCESS, TransferStatus.FAILED


@paths
@pytest.mark.parametrize("direction", ["store", "load"])
def test_a_job_is_timed_from_the_stream_that_it_begins_on_to_the_one_that_it_ends_on(
    path, direction
):
    device = WatchedDevice()
    world = PipelineWorld.build(device, path=path, buffer_bytes=256)
    device.work.clear()
    job = getattr(world, direction)(range(8), range(8))
    (started, first), (_, begins) = device.work[:2]
    (_, ends), (ended, last) = device.work[-2:]
    assert (started, ended) == ("timed", "timed")
    assert first is begins
    assert last is ends
    world.finish(job)
    assert job.result.seconds > 0
    world.close()


def test_every_stream_waits_for_the_events_of_a_gate_once():
    device = SimulatedDevice()
    events = [device.new_event() for _ in range(2)]
    streams = [device.new_stream(name) for name in "ab"]
    waits = []
    device.wait = lambda stream, event: waits.append((stream, event))
    gate = Gate(device, events)
    for stream in (streams[0], streams[0], streams[1], streams[0], streams[1]):
        gate.hold(stream)
    assert waits == [(stream, event) for stream in streams for event in events]


def test_settling_orders_each_stream_behind_the_other():
    for seed in range(5):
        with SimulatedDevice(seed) as device:
            world = PipelineWorld.build(device)
            paths = world.pipeline._lanes["store"].streams
            buffers = [device.empty(8) for _ in range(2)]
            streams = [paths.kernels, paths.copies]
            for stream, buffer in zip(streams, buffers, strict=True):
                device.fill_zero(buffer, stream)
            ends = paths.settle()
            for stream, other in zip(streams, reversed(buffers), strict=True):
                device.launch("write", stream, writes=[other], run=lambda b=other: b.fill_(7))
            for stream in streams:
                device.synchronize(device_record(device, stream), None)
            device.synchronize(ends[-1], None)
            device.touch(reads=buffers)
            assert [buffer.tolist() for buffer in buffers] == [[7] * 8] * 2
            world.close()


def device_record(device, stream):
    event = device.new_event()
    device.record(event, stream)
    return event


@paths
def test_a_load_waits_for_a_store_of_its_slots_on_the_device(path):
    for seed in range(6):
        with SimulatedDevice(seed) as device:
            world = PipelineWorld.build(device, path=path)
            store = world.store(range(4), range(1, 5))
            loads = [
                world.load(range(8, 12), range(5, 1, -1)),  # the first of its slots is another's
                world.load(range(12, 16), range(1, 5), expedited=True),
            ]
            world.finish(store, *loads)
            assert torch.equal(world.tensors[0][9:12], world.tensors[0][1:4].flip(0))
            assert torch.equal(world.tensors[0][12:16], world.tensors[0][:4])
            world.close()


# -- what cannot be queued --


def refuse(world: PipelineWorld, lane_name: str, times: int = 1000) -> list[Path]:
    """Let no path queue anything in a lane; the paths that were tried."""
    lane = world.pipeline._lanes[lane_name]
    queue, tried = lane.paths.queue, []

    def queue_nothing(path, segment, pages, slots):
        if len(tried) >= times:
            return queue(path, segment, pages, slots)
        tried.append(path)
        raise InjectedError("injected: not queued")

    lane.paths.queue = queue_nothing
    return tried


STAND_IN = {
    Path.STAGED: Path.COPY_ENGINE,
    Path.ZERO_COPY: Path.COPY_ENGINE,
    Path.COPY_ENGINE: Path.STAGED,
}


@paths
@pytest.mark.parametrize("direction", ["store", "load"])
def test_a_segment_is_tried_by_its_path_and_by_one_that_stands_in_and_no_more(path, direction):
    world = PipelineWorld.build(SimulatedDevice(1), path=path, buffer_bytes=256)
    tried = refuse(world, direction)
    job = getattr(world, direction)(range(12), range(12))
    world.finish(job)
    assert tried == [path, STAND_IN[path]]
    assert isinstance(job.result.error, InjectedError)
    world.pipeline._check()
    world.close()


@paths
def test_a_path_that_failed_is_not_tried_again_and_one_is_always_left(path):
    world = PipelineWorld.build(SimulatedDevice(1), path=path, buffer_bytes=256)
    tried = refuse(world, "store")
    for block in range(4):
        world.finish(world.store(range(block, block + 1), range(block, block + 1)))
        world.pipeline._check()
    first = [path, STAND_IN[path]]
    left = Path.STAGED if path is Path.ZERO_COPY else STAND_IN[path]
    assert tried == first + [left] * 3
    world.close()


@paths
def test_ids_are_free_again_whatever_became_of_their_segments(path):
    world = PipelineWorld.build(SimulatedDevice(1), path=path, buffer_bytes=128, max_indices=8)
    for times in (1, 2, 1, 2):
        refuse(world, "store", times)
        job = world.store(range(8), range(8))
        world.finish(job)
        world.pipeline._check()
        assert not world.pipeline._lanes["store"]._indices._taken
        del world.pipeline._lanes["store"].paths.queue
    job = world.store(range(8), range(8))
    world.finish(job)
    assert job.result.status is SUCCESS
    assert torch.equal(world.pool.slots[:8], world.tensors[0][:8])
    world.close()


def test_the_slots_of_a_store_that_could_not_be_queued_are_cleared_by_the_next():
    """... which is queued before the failed one is over, and whose chunk covers less of them."""
    world = PipelineWorld.build(
        SimulatedDevice(1),
        pages=(16, 8),
        groups=[[(0, 16), (1, 8)], [(0, 16)], [(1, 8)]],
        path=Path.STAGED,
    )
    world.finish(world.store(range(4), range(4)))
    refuse(world, "store", 2)
    failed = world.store(range(4, 8), range(4), group=2)
    again = world.store(range(8, 12), range(4), group=2)
    assert not failed.finished
    world.finish(failed, again)
    assert statuses(world, failed, again) == [FAILED, SUCCESS]
    assert torch.equal(world.pool.slots[:4, 16:], world.tensors[1][8:12])
    assert not world.pool.slots[:4, :16].any()
    world.close()


# -- a lane that is lost --


def lose_at_the_next_job(lane) -> None:
    """Neither can the job be queued, nor an event recorded behind what was."""

    def fail(*args):
        raise InjectedError("injected: nothing can be queued")

    lane.paths.queue = lane.streams.settle = fail


def test_what_was_queued_before_a_lane_was_lost_has_ended_well_and_is_reported_first():
    world = PipelineWorld.build(SimulatedDevice(3), path=Path.STAGED, buffer_bytes=128)
    lane = world.pipeline._lanes["store"]
    before = [world.store(range(n, n + 4), range(n, n + 4)) for n in (0, 4)]
    assert lane._in_flight
    lose_at_the_next_job(lane)
    lost = world.store(range(8, 12), range(8, 12))
    after = world.store(range(12, 16), range(12, 16))
    world.finish(*before, lost, after)
    assert world.reported() == [job.job_id for job in (*before, lost, after)]
    assert statuses(world, *before, lost, after) == [SUCCESS, SUCCESS, FAILED, FAILED]
    assert isinstance(after.result.error, DeviceLostError)
    assert torch.equal(world.pool.slots[:8], world.tensors[0][:8])
    world.pipeline._check()
    world.close()


def test_where_a_lost_lane_could_not_be_drained_its_jobs_fail_in_order():
    device = SimulatedDevice(3)
    world = PipelineWorld.build(device, path=Path.STAGED, buffer_bytes=128)
    lane = world.pipeline._lanes["store"]
    before = [world.store(range(n, n + 4), range(n, n + 4)) for n in (0, 4)]
    lose_at_the_next_job(lane)
    device.faults.in_call("close_stream", times=2)
    lost = world.store(range(8, 12), range(8, 12))
    world.finish(*before, lost)
    assert world.reported() == [job.job_id for job in (*before, lost)]
    assert statuses(world, *before, lost) == [FAILED] * 3
    assert all(isinstance(job.result.error, DeviceLostError) for job in before)
    world.close()
    assert len(device.streams) == 2


def test_other_lanes_go_on_when_one_is_lost():
    world = PipelineWorld.build(SimulatedDevice(3), path=Path.STAGED, buffer_bytes=128)
    world.finish(world.store(range(4), range(4)))
    lose_at_the_next_job(world.pipeline._lanes["store"])
    lost = world.store(range(8, 12), range(8, 12))
    loads = [
        world.load(range(16, 20), range(4)),
        world.load(range(20, 24), range(4), expedited=True),
    ]
    world.finish(lost, *loads)
    assert statuses(world, lost, *loads) == [FAILED, SUCCESS, SUCCESS]
    assert torch.equal(
        world.tensors[0][16:24].view(2, 4, 64), world.pool.slots[:4].expand(2, 4, 64)
    )
    world.close()


# -- order, room --


def test_a_job_waits_in_the_backlog_for_one_of_another_lane_that_does():
    device = GatedDevice()
    world = PipelineWorld.build(device, path=Path.STAGED, buffer_bytes=128, window_bytes=128)
    device.gate.clear()
    stores = [world.store(range(n, n + 2), range(n, n + 2)) for n in (0, 2, 4)]
    load = world.load(range(16, 18), range(4, 6))
    assert not stores[2].queued
    assert not load.started
    device.gate.set()
    world.finish(*stores, load)
    assert torch.equal(world.tensors[0][16:18], world.tensors[0][4:6])
    world.close()


def test_a_window_admits_what_fits_and_one_segment_always():
    device = GatedDevice()
    world = PipelineWorld.build(device, path=Path.STAGED, buffer_bytes=128, window_bytes=256)
    device.gate.clear()
    lane = world.pipeline._lanes["store"]
    jobs = [world.store(range(n, n + 2), range(n, n + 2)) for n in range(0, 8, 2)]
    assert [job.queued for job in jobs] == [True, True, False, False]
    assert lane._num_bytes == 256
    device.gate.set()
    world.finish(*jobs)
    assert lane._num_bytes == lane._num_ops == 0
    world.close()
    small = PipelineWorld.build(device, path=Path.STAGED, buffer_bytes=128, window_bytes=1)
    job = small.store(range(8), range(8))
    small.pipeline.wait(job, 10)
    assert job.result.status is SUCCESS
    small.close()


@pytest.mark.parametrize("what", ["jobs of no blocks", "cancelled jobs"])
def test_no_number_of_jobs_without_bytes_blocks_a_submission(what):
    device = SimulatedDevice(1, max_queued=1024)
    world = PipelineWorld.build(device, path=Path.STAGED, buffer_bytes=128, window_bytes=128)
    device.current_stream = lambda: None  # what is recorded there is the engine's to bound
    device.faults.never_ends("gather")
    first = world.store(range(2), range(2))
    count = 1100
    if what == "cancelled jobs":
        jobs = [world.store(range(2, 4), range(2, 4)) for _ in range(count)]
        assert world.pipeline.cancel_all(jobs)
    else:
        jobs = [world.store(range(0), range(0)) for _ in range(count)]
    assert world.reported() == []
    assert device.num_blocked == 0
    device.end_hung()
    world.finish(first, *jobs)
    assert world.reported() == [job.job_id for job in (first, *jobs)]
    world.close()
