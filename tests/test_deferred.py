"""Copies of memory that is not pinned block nobody who submits; order and failures stay."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress

import pytest
import torch
from pipelines import PipelineWorld

from triton_offload.calibration import Path
from triton_offload.device.deferred import Deferred
from triton_offload.device.host import HostDevice
from triton_offload.specs import TransferStatus
from triton_offload.testing import InjectedError, SimulatedDevice


class Recorder:
    """Notes what it is called, fails where it is told to, and calls no function by itself."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.fails: set[str] = set()
        self.reached = True
        self.now = 0.0
        self.steps = {}

    def background(self, name, step, orphaned=None):
        self.steps[name] = step
        return self

    def wake(self):
        self.log.append("wake")

    def stop(self):
        self.log.append("stop")

    def sleep(self, seconds):
        self.now += seconds

    def monotonic(self):
        return self.now

    def new_stream(self, name, *, high_priority=False):
        return name

    def close_stream(self, stream):
        self.log.append(f"close {stream}")

    def new_event(self, *, timed=False):
        return f"event {len(self.log)}"

    def query(self, event):
        return self.reached

    def synchronize(self, event, timeout):
        self.log.append(f"synchronize {timeout and round(timeout, 1)}")

    def called(self) -> list[str]:
        """What was called since the last time, but for waking."""
        log, self.log = [each for each in self.log if each != "wake"], []
        return log


def _noting(name):
    def call(self, *args, **options):
        self.log.append(f"{name} {args[-1]}")
        if name in self.fails:
            raise InjectedError(name)

    return call


for _name in ("copy", "copy_batch", "fill_zero", "gather", "scatter", "record", "wait"):
    setattr(Recorder, _name, _noting(_name))


class World:
    def __init__(self) -> None:
        self.device = Recorder()
        self.blocks = True
        self.deferred = Deferred(self.device, lambda: self.blocks)
        self.a, self.b = (self.deferred.new_stream(name) for name in "ab")

    def record(self, stream):
        event = self.deferred.new_event()
        self.deferred.record(event, stream)
        return event

    def run(self, stream) -> list[str]:
        self.device.called()
        self.device.steps[f"{stream.stream}-calls"]()
        return self.device.called()


def test_a_copy_that_would_block_is_called_by_a_thread_and_all_behind_it():
    world = World()
    deferred, a = world.deferred, world.a
    deferred.fill_zero(0, a)
    assert world.device.called() == ["fill_zero a"]
    deferred.copy(1, 2, a)
    world.blocks = False  # pinned meanwhile, which changes nothing for what lies there
    deferred.copy_batch(1, 2, 3, a)
    deferred.gather(*range(5), a, zero_copy=False)
    event = world.record(a)
    assert world.device.called() == []
    assert not deferred.query(event)
    assert not deferred.is_recorded(event)
    assert world.run(a) == ["copy a", "copy_batch a", "gather a", "record a"]
    assert deferred.query(event)
    assert deferred.is_recorded(event)
    deferred.copy(1, 2, a)
    deferred.scatter(*range(5), a, zero_copy=True)
    assert world.device.called() == ["copy a", "scatter a"]


def test_a_batch_that_would_block_is_deferred_too():
    world = World()
    world.deferred.copy_batch(1, 2, 3, world.a)
    assert world.device.called() == []
    assert world.run(world.a) == ["copy_batch a"]


def test_what_is_submitted_while_a_call_is_made_comes_after_it():
    world = World()
    deferred, a = world.deferred, world.a

    def copy(dst, src, stream):
        world.blocks = False
        deferred.fill_zero(0, a)
        world.device.log.append("copy a")

    world.device.copy = copy
    deferred.copy(1, 2, a)
    assert world.run(a) == ["copy a", "fill_zero a"]


def test_the_first_failure_is_the_one_that_is_told():
    world = World()
    world.device.fails |= {"copy", "record"}
    world.deferred.copy(1, 2, world.a)
    event = world.record(world.a)
    world.run(world.a)
    with pytest.raises(InjectedError, match="copy"):
        world.deferred.query(event)


def test_a_stream_waits_for_a_record_that_is_not_made_yet():
    world = World()
    deferred, a, b = world.deferred, world.a, world.b
    deferred.copy(1, 2, a)
    event = world.record(a)
    deferred.wait(b, event)
    deferred.fill_zero(0, b)
    assert world.device.called() == []
    assert world.run(b) == []
    assert world.run(a) == ["copy a", "record a"]
    deferred.fill_zero(0, b)
    assert world.run(b) == ["wait " + event.latest.event, "fill_zero b", "fill_zero b"]


def test_a_wait_keeps_its_place_behind_what_was_deferred():
    world = World()
    event = world.record(world.b)
    world.deferred.copy(1, 2, world.a)
    world.device.called()
    world.deferred.wait(world.a, event)
    assert world.device.called() == []
    assert world.run(world.a) == ["copy a", f"wait {event.latest.event}"]


def test_whoever_waits_is_woken_when_the_record_is_made():
    world = World()
    world.deferred.copy(1, 2, world.a)
    event = world.record(world.a)
    world.deferred.wait(world.b, event)
    world.device.log.clear()
    world.device.steps["a-calls"]()
    assert "wake" in world.device.log


def test_after_a_failure_nothing_is_called_until_whoever_submits_was_told():
    world = World()
    deferred, a = world.deferred, world.a
    world.device.fails.add("copy")
    deferred.copy(1, 2, a)
    first = world.record(a)
    deferred.fill_zero(0, a)
    assert world.run(a) == ["copy a", "record a"]
    world.device.fails.clear()
    deferred.wait(a, world.record(world.b))
    deferred.fill_zero(0, a)
    second = world.record(a)
    assert world.device.called() == ["record b", "record a"]
    for event in (first, second):
        with pytest.raises(InjectedError, match="copy"):
            deferred.query(event)
    with pytest.raises(InjectedError, match="copy"):
        deferred.synchronize(first, None)
    world.device.called()
    deferred.fill_zero(0, a)
    third = world.record(a)
    assert world.device.called() == ["fill_zero a", "record a"]
    assert deferred.query(third)


def test_a_job_that_lacks_a_call_has_no_other_made_until_it_was_told_itself():
    """Its later segments take it that the stream waits for what the call was to wait for."""
    world = World()
    deferred, a = world.deferred, world.a
    world.device.fails.add("copy")
    deferred.copy(1, 2, a)
    first = world.record(a)
    world.run(a)
    deferred.wait(a, world.record(world.b))  # another job, before anybody was told
    second = world.record(a)
    world.device.called()
    with pytest.raises(InjectedError):
        deferred.query(first)
    deferred.fill_zero(0, a)  # its next segment
    third = world.record(a)
    assert world.device.called() == ["record a"]
    for event in (second, third):
        with pytest.raises(InjectedError):
            deferred.query(event)
    deferred.fill_zero(0, a)
    assert world.device.called() == ["fill_zero a"]


def test_a_segment_of_which_a_call_was_skipped_is_skipped_to_its_end():
    world = World()
    deferred, a = world.deferred, world.a
    world.device.fails.add("copy")
    deferred.copy(1, 2, a)
    first = world.record(a)
    world.run(a)
    deferred.fill_zero(0, a)
    with pytest.raises(InjectedError):
        deferred.query(first)
    deferred.fill_zero(0, a)
    assert world.device.called() == []
    second = world.record(a)
    with pytest.raises(InjectedError):
        deferred.query(second)
    deferred.fill_zero(0, a)
    assert world.device.called() == ["record a", "fill_zero a"]


def test_synchronizing_raises_the_failure_and_does_not_count_as_telling():
    world = World()
    world.device.fails.add("copy")
    world.deferred.copy(1, 2, world.a)
    event = world.record(world.a)
    world.run(world.a)
    with pytest.raises(InjectedError):
        world.deferred.synchronize(event, None)
    world.device.called()
    world.deferred.fill_zero(0, world.a)
    assert world.device.called() == []


def test_where_an_event_cannot_be_recorded_its_stream_is_drained_before_anybody_is_told():
    world = World()
    deferred, a = world.deferred, world.a
    world.device.fails.add("record")
    deferred.copy(1, 2, a)
    event = world.record(a)
    assert world.run(a) == ["copy a", "record a", "close a"]
    with pytest.raises(InjectedError, match="record"):
        deferred.query(event)
    with pytest.raises(InjectedError, match="record"):
        deferred.synchronize(event, 1.0)
    world.device.called()
    deferred.copy(1, 2, a)
    later = world.record(a)
    assert world.run(a) == []
    with pytest.raises(InjectedError, match="record"):
        deferred.query(later)
    deferred.close_stream(a)
    assert world.device.called() == ["stop"]


def test_what_is_called_at_once_raises_at_once():
    world = World()
    world.device.fails |= {"record", "fill_zero"}
    event = world.deferred.new_event()
    with pytest.raises(InjectedError, match="record"):
        world.deferred.record(event, world.a)
    assert event.latest is None
    with pytest.raises(InjectedError, match="fill_zero"):
        world.deferred.fill_zero(0, world.a)


def test_synchronizing_waits_for_the_record_and_then_for_what_is_left_of_the_time():
    world = World()
    world.deferred.copy(1, 2, world.a)
    event = world.record(world.a)
    with pytest.raises(TimeoutError, match=r"within 0.25 s"):
        world.deferred.synchronize(event, 0.25)
    assert 0.25 <= world.device.now < 0.26
    world.device.called()

    def sleep(seconds):
        world.device.now += 0.15
        world.device.steps["a-calls"]()

    world.device.sleep = sleep
    world.deferred.synchronize(event, 0.25)
    assert world.device.called() == ["copy a", "record a", "synchronize 0.1"]


def test_closing_a_stream_waits_for_its_calls():
    world = World()
    world.deferred.copy(1, 2, world.a)
    world.device.sleep = lambda seconds: world.device.steps["a-calls"]()
    world.device.called()
    world.deferred.close_stream(world.a)
    assert world.device.called() == ["copy a", "stop", "close a"]


# -- in a pipeline --


def pageable(device) -> PipelineWorld:
    device.blocks_on_pageable = True
    device.register = lambda host: False
    return PipelineWorld.build(device, path=Path.STAGED, buffer_bytes=128)


def test_a_store_behind_a_busy_engine_blocks_nobody():
    device = SimulatedDevice(1)
    world = pageable(device)
    device.faults.never_ends("engine")
    device.launch("engine", device.compute_stream)
    jobs = [world.store(range(n, n + 4), range(n, n + 4)) for n in range(0, 16, 4)]
    assert device.num_blocked == 0
    assert world.reported() == []
    device.end_hung()
    world.finish(*jobs)
    assert world.reported() == [job.job_id for job in jobs]
    assert device.num_blocked == 0
    assert torch.equal(world.pool.slots[:16, :64], world.tensors[0][:16])
    world.close()
    assert not device.background_names
    device.check()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("call", ["copy", "gather", "scatter", "wait", "record", "fill_zero"])
def test_a_failed_call_fails_jobs_and_touches_nothing_of_others(call, seed):
    with SimulatedDevice(seed) as device:
        world = pageable(device)
        device.faults.in_call(call, 2 + seed)
        first = world.store(range(8), range(8))
        with suppress(InjectedError):  # the record on the engine's stream
            world.finish(world.load(range(8, 16), range(8)))
        world.finish(first)
        device.faults.clear()
        after = world.store(range(16, 24), range(16, 24))
        world.finish(after)
        device.touch(reads=[world.tensors[0], world.pool.slots])
        for job, rows in ((first, slice(0, 8)), (after, slice(16, 24))):
            if job.result.status is TransferStatus.SUCCESS:
                assert torch.equal(world.pool.slots[rows, :64], world.tensors[0][rows])
            else:
                assert isinstance(job.result.error, Exception)
        if call != "record":
            assert after.result.status is TransferStatus.SUCCESS
        world.close()


def test_wait_on_returns_once_the_device_knows_of_the_release():
    for seed in range(20):
        with SimulatedDevice(seed) as device:
            world = pageable(device)
            job = world.load(range(8), range(8))
            stream = device.new_stream("engine's")
            world.pipeline.wait_on(job, stream)
            device.launch("reads", stream, reads=[world.tensors[0][:8]])
            device.launch("writes", stream, writes=[world.tensors[0][:8]])
            world.finish(job)
            device.drain()
            world.close()
            device.close_stream(stream)


def test_with_real_threads_bytes_land_and_the_pool_goes_with_the_pipeline():
    device = HostDevice()
    world = pageable(device)
    kept = world.tensors[0].clone()
    for turn in range(20):
        stored = [world.store(range(n, n + 8), range(n, n + 8)) for n in (0, 8, 16, 24)]
        world.finish(*stored)
        world.tensors[0].fill_(turn)
        loaded = [world.load(range(n, n + 8), range(n, n + 8)) for n in (24, 8, 0, 16)]
        world.finish(*loaded)
        assert torch.equal(world.tensors[0], kept)
    world.pipeline.shutdown(60)
    pool = weakref.ref(world.pool)
    world.pool.close()
    world.pool = None
    gc.collect()
    assert pool() is None
