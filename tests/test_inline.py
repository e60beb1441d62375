"""Small work on an idle stream of the host device runs on its submitter's thread, in its order."""

from __future__ import annotations

import os
import random
import threading
import time

import numpy as np
import pytest
import torch

from triton_offload import KVOffloader
from triton_offload.device import host
from triton_offload.device.host import HostDevice
from triton_offload.kernels.table import PageTable


class Noting(HostDevice):
    """Notes which thread runs each piece of work."""

    def __init__(self) -> None:
        super().__init__()
        self.ran_on: list[int] = []

    def _submit(self, stream, work, num_bytes):
        def noted():
            self.ran_on.append(threading.get_ident())
            work()

        super()._submit(stream, noted, num_bytes)


@pytest.fixture
def device():
    return Noting()


@pytest.fixture
def streams(device):
    made = [device.new_stream(f"test {i}") for i in range(3)]
    yield made
    for stream in made:
        device.close_stream(stream)


def recorded(device, stream):
    event = device.new_event()
    device.record(event, stream)
    return event


def hold(stream):
    """The stream does nothing until the event is set."""
    begun, end = threading.Event(), threading.Event()

    def run():
        begun.set()
        assert end.wait(60)

    stream.put(run)
    assert begun.wait(60)
    return end


def bytes_of(value, count=4):
    return torch.full((count,), value, dtype=torch.uint8)


def test_small_work_on_an_idle_stream_is_done_when_it_is_submitted(device, streams):
    table = PageTable([torch.arange(32, dtype=torch.uint8).view(4, 8)], 1)
    slots = torch.zeros(4, 8, dtype=torch.uint8)
    target, batch = bytes_of(0), bytes_of(0)
    source = bytes_of(9)
    ids = torch.tensor([3]), torch.tensor([1])
    device.copy(target, source, streams[0])
    device.fill_zero(target[:1], streams[0])
    ends = (np.array([each.data_ptr()]) for each in (batch, source))
    device.copy_batch(*ends, np.array([3]), streams[0])
    device.gather(table, ids[0], slots, ids[1], 0, streams[0], zero_copy=True)
    device.scatter(table, ids[1], slots, ids[1], 0, streams[0], zero_copy=True)
    assert target.tolist() == [0, 9, 9, 9]
    assert batch.tolist() == [9, 9, 9, 0]
    assert slots[1].tolist() == list(range(24, 32))
    assert table.pages[0].view[1].tolist() == list(range(24, 32))
    assert device.query(recorded(device, streams[0]))
    assert device.ran_on == [threading.get_ident()] * 5


def test_small_work_behind_queued_work_keeps_its_turn(device, streams):
    end = hold(streams[0])
    assert not device.query(recorded(device, streams[0]))
    target = bytes_of(0)
    device.copy(target, bytes_of(1), streams[0])
    event = recorded(device, streams[0])
    assert not device.query(event)
    assert target.tolist() == [0] * 4
    end.set()
    device.synchronize(event, 60)
    assert target.tolist() == [1] * 4
    assert device.ran_on == [streams[0].thread.ident]
    deadline = time.monotonic() + 5
    while streams[0].tasks._unfinished:  # the event is reached a moment before its turn is over
        assert time.monotonic() < deadline


def test_small_work_behind_a_wait_waits_for_that(device, streams):
    end = hold(streams[0])
    device.wait(streams[1], recorded(device, streams[0]))
    target = bytes_of(0)
    device.copy(target, bytes_of(1), streams[1])
    event = recorded(device, streams[1])
    assert not device.query(event)
    assert target.tolist() == [0] * 4
    end.set()
    device.synchronize(event, 60)
    assert target.tolist() == [1] * 4


def test_a_wait_for_what_is_reached_queues_nothing(device, streams):
    device.wait(streams[1], recorded(device, streams[0]))
    target = bytes_of(0)
    device.copy(target, bytes_of(1), streams[1])
    assert target.tolist() == [1] * 4
    assert device.ran_on == [threading.get_ident()]


def test_large_work_never_runs_on_its_submitters_thread(device, streams, monkeypatch):
    monkeypatch.setattr(device, "_inline_left", 7)
    target = bytes_of(0, 8)
    device.copy(target, bytes_of(1, 8), streams[0])
    device.synchronize(recorded(device, streams[0]), 60)
    assert target.tolist() == [1] * 8
    assert device.ran_on == [streams[0].thread.ident]


@pytest.mark.parametrize("asked", ["query", "synchronize"])
def test_many_small_works_run_there_up_to_the_bound_until_an_event_is_asked(
    device, streams, monkeypatch, asked
):
    monkeypatch.setattr(host, "_INLINE_BYTES", 10)
    event = recorded(device, streams[0])
    device.query(event)
    mine = threading.get_ident()
    for stream in (streams[0], streams[1], streams[2]):
        device.copy(bytes_of(0), bytes_of(1), stream)
    device.synchronize(recorded(device, streams[2]), 60)
    assert device.ran_on == [mine, mine, streams[2].thread.ident]
    device._inline_left = 0
    if asked == "query":
        device.query(event)
    else:
        device.synchronize(event, 60)
    device.copy(bytes_of(0), bytes_of(1), streams[0])
    assert device.ran_on[3:] == [mine]


def test_what_fails_there_is_told_by_the_next_event_and_not_raised(device, streams):
    device.copy(bytes_of(0, 5), bytes_of(1, 4), streams[0])
    device.copy(bytes_of(0, 3), bytes_of(1, 4), streams[0])
    event = recorded(device, streams[0])
    later = recorded(device, streams[0])
    assert device.ran_on == [threading.get_ident()] * 2
    with pytest.raises(RuntimeError, match=r"size of tensor a \(5\)") as caught:
        device.query(event)
    assert any("in noted" in note for note in caught.value.__notes__)  # where it failed
    assert device.query(later)


def test_an_interrupt_there_reaches_the_submitter_and_the_stream_goes_on(device, streams):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device._submit(streams[0], interrupted, 1)
    with pytest.raises(KeyboardInterrupt):
        device.query(recorded(device, streams[0]))
    target = bytes_of(0)
    device.copy(target, bytes_of(1), streams[0])
    assert target.tolist() == [1] * 4


def test_what_others_submit_meanwhile_queues_behind_it(device, streams):
    begun, end, order = threading.Event(), threading.Event(), []

    def slow():
        begun.set()
        assert end.wait(60)
        order.append("slow")

    submitter = threading.Thread(target=device._submit, args=(streams[0], slow, 1))
    submitter.start()
    assert begun.wait(60)
    device._submit(streams[0], lambda: order.append("second"), 1)  # returns at once
    event = recorded(device, streams[0])
    assert not device.query(event)
    time.sleep(0.1)  # in which its thread could begin
    assert order == []
    end.set()
    device.synchronize(event, 60)
    submitter.join(60)
    assert order == ["slow", "second"]
    assert device.ran_on == [submitter.ident, streams[0].thread.ident]


def test_each_threads_order_is_kept_however_many_submit(device, streams):
    seen: list[tuple[int, int]] = []
    busy = threading.Lock()

    def work(thread, number):
        assert busy.acquire(blocking=False), "two at once on one stream"
        seen.append((thread, number))
        busy.release()

    def submit(thread):
        rng = random.Random(thread)
        for number in range(200):
            size = rng.choice([1, host._INLINE_BYTES + 1])
            device._submit(streams[0], lambda number=number: work(thread, number), size)
            if rng.random() < 0.3:
                event = recorded(device, streams[0])
                if rng.random() < 0.5:
                    device.synchronize(event, 60)
                assert (thread, number) in seen or not event.latest.reached

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    device.synchronize(recorded(device, streams[0]), 60)
    assert len(seen) == 4 * 200
    for thread in range(4):
        assert [n for t, n in seen if t == thread] == list(range(200))
    assert {streams[0].thread.ident} < set(device.ran_on)


def test_many_threads_store_and_load_small_jobs_at_once():
    caches = [torch.zeros(64, 16, dtype=torch.uint8) for _ in range(3)]
    with KVOffloader(caches, "64KiB") as offloader:
        failed: list[BaseException] = []

        def run(thread):
            try:
                mine = list(range(16 * thread, 16 * thread + 16))
                for turn in range(20):
                    value = 1 + (7 * thread + turn) % 255
                    for cache in caches:
                        cache[mine[:8]] = value
                    keys = [b"%d %d %d" % (thread, turn, i) for i in range(8)]
                    store = offloader.store(keys, mine[:8])
                    if turn % 2:
                        store.wait(60)
                    for cache in caches:
                        cache[mine[8:]] = 0xA5
                    store.wait(60)
                    offloader.load(keys, mine[:7:-1]).wait(60)
                    for cache in caches:
                        assert cache[mine[8:]].unique().tolist() == [value]
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failed == []
        offloader._check()


def test_a_job_of_small_work_that_fails_ends_as_failed(monkeypatch):
    caches = [torch.zeros(8, 16, dtype=torch.uint8)]
    with KVOffloader(caches, "4KiB") as offloader:
        offloader.store([b"a"], [1]).wait(60)

        def fail(*args):
            raise RuntimeError("injected")

        monkeypatch.setattr(host.host_pages, "gather", fail)
        job = offloader.store([b"b"], [2])
        job.block(60)
        assert "injected" in str(job.result.error)
        assert offloader.lookup([b"a"]) == 1
        assert offloader.lookup([b"b"]) == 0
        monkeypatch.undo()
        offloader.store([b"b"], [2]).wait(60)
        offloader._check()


def test_inference_tensors_are_written_there_too(device, streams):
    with torch.inference_mode():
        target = torch.zeros(4, dtype=torch.uint8)
    device.copy(target, bytes_of(1), streams[0])
    device.fill_zero(target[:2], streams[0])
    assert device.query(recorded(device, streams[0]))
    assert target.tolist() == [0, 0, 1, 1]
    assert device.ran_on == [threading.get_ident()] * 2


def test_on_a_stream_told_to_end_small_work_is_dropped(device):
    stream = device.new_stream("test")
    target = bytes_of(0)
    stream.tasks.end()
    stream.thread.join(60)
    device.copy(target, bytes_of(1), stream)
    with pytest.raises(RuntimeError, match="the process is at its end"):
        device.query(recorded(device, stream))
    assert target.tolist() == [0] * 4


def test_in_a_fork_a_stream_drops_small_work(device, streams):
    target = bytes_of(0)
    streams[0].tasks._lock.acquire()  # as another thread may have it at that moment
    child = os.fork()
    if child == 0:
        status = 1
        try:
            device.copy(target, bytes_of(1), streams[0])
            device.query(recorded(device, streams[0]))
        except RuntimeError:
            status = 0 if target.tolist() == [0] * 4 else 2
        finally:
            os._exit(status)
    streams[0].tasks._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
