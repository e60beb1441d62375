"""Functions that a real device calls on a thread: when, and until when."""

from __future__ import annotations

import gc
import itertools
import math
import threading
import time
import warnings

import pytest
import torch

from triton_offload import KVOffloader
from triton_offload.device import threads
from triton_offload.device.realtime import BackgroundThread, RealTime
from triton_offload.device.threads import OwnThread, _running, on_own_thread
from triton_offload.testing import SimulatedDevice


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_wake_up_during_the_step_is_not_lost():
    inside, go_on, again = threading.Event(), threading.Event(), threading.Event()

    def step():
        if inside.is_set():
            again.set()
        inside.set()
        assert go_on.wait(60)

    thread = BackgroundThread("test", step)
    assert inside.wait(60)
    thread.wake()
    thread.wake()
    go_on.set()
    assert again.wait(60)
    thread.stop()


def test_it_sleeps_until_it_is_woken_and_each_time_anew():
    calls = []
    called = threading.Semaphore(0)

    def step():
        calls.append(on_own_thread())
        called.release()

    thread = BackgroundThread("test", step)
    for count in (1, 2, 3):
        assert called.acquire(timeout=60)
        assert len(calls) == count
        thread.wake()
    assert called.acquire(timeout=60)
    thread.stop()
    assert calls == [True] * 4
    assert not on_own_thread()


def test_it_is_called_again_after_the_seconds_that_it_returned_woken_or_not():
    times = []
    thread = BackgroundThread("test", lambda: times.append(time.monotonic()) or 0.05)
    while len(times) < 4:
        thread.wake()
        time.sleep(0.001)
    thread.stop()
    assert all(b - a >= 0.05 for a, b in itertools.pairwise(times))


def test_stopping_ends_a_long_sleep_and_is_done_when_no_call_is_under_way():
    state = []

    def step():
        state.append("in")
        time.sleep(0.03)
        state.append("out")
        return 1e6

    thread = RealTime().background("test", step)
    until(lambda: state)
    thread.stop()
    assert state == ["in", "out"]
    thread.stop()
    thread.wake()
    assert state == ["in", "out"]


def test_infinity_ends_the_thread_and_a_step_may_stop_itself():
    thread = BackgroundThread("test", lambda: math.inf)
    thread._thread.join(60)
    assert not thread._thread.is_alive()
    holder = []

    def step():
        until(lambda: holder)
        holder[0].stop()
        return 0.0

    holder.append(BackgroundThread("test", step))
    holder[0]._thread.join(60)
    assert not holder[0]._thread.is_alive()


class Owner:
    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.called = threading.Event()

    def step(self) -> float | None:
        self.called.set()
        return self.seconds


@pytest.mark.parametrize("seconds", [None, 0.0, 1e6])
def test_it_goes_with_the_object_whose_method_it_calls(seconds):
    owner, orphaned = Owner(seconds), []
    thread = BackgroundThread("test", owner.step, lambda: orphaned.append(on_own_thread()))
    assert owner.called.wait(60)
    gc.collect()
    assert not orphaned
    del owner
    gc.collect()
    thread._thread.join(60)
    assert orphaned == [True]
    assert thread._thread not in _running


def test_one_that_was_stopped_is_no_orphan():
    owner, orphaned = Owner(None), []
    thread = BackgroundThread("test", owner.step, lambda: orphaned.append(1))
    thread.stop()
    del owner
    gc.collect()
    assert not orphaned


def test_a_thread_that_could_not_be_started_is_not_waited_for_at_exit(monkeypatch):
    def fail(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    before = set(_running)
    with pytest.raises(RuntimeError, match="can't start"):
        OwnThread("test", lambda: None, lambda: None)
    assert _running == before


def test_a_simulation_calls_no_step_whose_object_is_gone():
    with SimulatedDevice(0) as device:
        owner = Owner(0.001)
        device.background("test", owner.step)
        device.sleep(0.01)
        assert owner.called.is_set()
        assert device.background_names == ["test"]
        del owner
        device.sleep(0.01)
        assert device.background_names == []


@pytest.mark.parametrize("path", ["staged", "zero_copy", "copy_engine"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_offloader_that_is_dropped_ends_its_transfers_and_frees_all(path):
    tensors = [torch.zeros(64, 4096, dtype=torch.uint8) for _ in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        offloader = KVOffloader(tensors, "8MiB", path=path)
        keys = [b"%d" % i for i in range(64)]
        offloader.store(keys, range(64)).wait(60)
        start = offloader._pool.slots.data_ptr()
        offloader._pool.slots.fill_(7)
        for tensor in tensors:
            tensor.fill_(0)
        for _ in range(20):
            offloader.load(keys, range(64))
        del offloader
        gc.collect()
        until(lambda: not _running)
    assert all(bool((tensor == 7).all()) for tensor in tensors)  # what was queued is done
    with open("/proc/self/maps") as lines:
        ranges = [line.split()[0].split("-") for line in lines]
    assert not any(int(begin, 16) <= start < int(end, 16) for begin, end in ranges)


def test_at_exit_every_thread_is_told_and_waited_for(monkeypatch):
    monkeypatch.setattr(threads, "_running", set())
    ended = []

    def start(told: threading.Event) -> OwnThread:
        def work() -> None:
            was_told = told.wait(5)
            time.sleep(0.05)  # the operation that it is in
            ended.append(was_told)

        return OwnThread("test", work, told.set)

    kept = [start(threading.Event()) for _ in range(2)]
    threads._end_all()
    assert ended == [True, True]
    assert not any(each.is_alive() for each in kept)
