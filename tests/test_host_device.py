"""The host device keeps the seam's rules, and its threads and memory go with their owners."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from triton_offload import KVOffloader
from triton_offload.calibration import default_calibration
from triton_offload.device import device_for
from triton_offload.device.host import HostDevice
from triton_offload.device.threads import _running
from triton_offload.kernels.table import PageTable


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Held:
    """Work on a stream that goes on when it is told to."""

    def __init__(self, stream, *, error: Exception | None = None) -> None:
        self.begun, self.end = threading.Event(), threading.Event()
        self._error = error
        stream.put(self._run)

    def _run(self) -> None:
        self.begun.set()
        assert self.end.wait(60)
        if self._error is not None:
            raise self._error


@pytest.fixture
def device():
    return HostDevice()


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


# -- the seam's rules --


def test_a_wait_is_for_the_record_at_the_time_of_the_call(device, streams):
    first, second = Held(streams[0]), None
    event = recorded(device, streams[0])
    second = Held(streams[0])
    device.wait(streams[1], event)
    after = recorded(device, streams[1])
    device.record(event, streams[0])  # too late to be waited for
    first.end.set()
    device.synchronize(after, 60)
    assert not device.query(event)
    second.end.set()
    device.synchronize(event, 60)


def test_a_wait_is_not_over_when_a_later_record_on_another_stream_is_reached(device, streams):
    first = Held(streams[0])
    event = recorded(device, streams[0])
    device.wait(streams[1], event)
    after = recorded(device, streams[1])
    device.record(event, streams[2])
    device.synchronize(event, 60)
    assert not device.query(after)
    first.end.set()
    device.synchronize(after, 60)


def test_an_event_that_was_never_recorded_blocks_nobody(device, streams):
    event = device.new_event()
    device.wait(streams[0], event)
    device.synchronize(recorded(device, streams[0]), 60)
    assert device.query(event)
    device.synchronize(event, 60)


def test_a_query_sees_the_latest_record(device, streams):
    event = recorded(device, streams[0])
    device.synchronize(event, 60)
    work = Held(streams[0])
    device.record(event, streams[0])
    assert not device.query(event)
    with pytest.raises(TimeoutError, match=r"not reached within 0\.01 s"):
        device.synchronize(event, 0.01)
    work.end.set()
    device.synchronize(event, 60)


def test_a_failure_is_told_by_the_next_record_alone_and_not_handed_on_by_a_wait(device, streams):
    error = RuntimeError("injected")
    Held(streams[0], error=error).end.set()
    Held(streams[0], error=RuntimeError("second")).end.set()
    event = recorded(device, streams[0])
    later = recorded(device, streams[0])
    device.wait(streams[1], event)
    other = recorded(device, streams[1])
    with pytest.raises(RuntimeError, match="injected"):
        device.synchronize(event, 60)
    with pytest.raises(RuntimeError, match="injected"):
        device.query(event)
    device.synchronize(later, 60)
    device.synchronize(other, 60)


def test_the_time_between_two_events_is_that_of_the_work_between(device, streams):
    start = recorded(device, streams[0])
    streams[0].put(lambda: time.sleep(0.02))
    end = recorded(device, streams[0])
    device.synchronize(end, 60)
    assert device.elapsed(start, end) >= 0.02
    assert device.elapsed(end, start) == -device.elapsed(start, end)


def test_a_copy_reads_its_source_when_it_runs(device, streams):
    work = Held(streams[0])
    source, copied, batch = (torch.zeros(8, dtype=torch.uint8) for _ in range(3))
    device.copy(copied, source, streams[0])
    ends = np.array([[each.data_ptr() + 2] for each in (batch, source)])
    device.copy_batch(*ends, np.array([3]), streams[0])
    source[:] = 7
    work.end.set()
    device.synchronize(recorded(device, streams[0]), 60)
    assert copied.tolist() == [7] * 8
    assert batch.tolist() == [0, 0, 7, 7, 7, 0, 0, 0]
    device.fill_zero(copied[:4], streams[0])
    device.synchronize(recorded(device, streams[0]), 60)
    assert copied.tolist() == [0, 0, 0, 0, 7, 7, 7, 7]


# -- streams that end --


def test_closing_a_stream_drains_it(device):
    stream = device.new_stream("test")
    work = Held(stream)
    target = torch.zeros(4, dtype=torch.uint8)
    device.copy(target, torch.ones(4, dtype=torch.uint8), stream)
    threading.Timer(0.05, work.end.set).start()
    device.close_stream(stream)
    assert target.tolist() == [1] * 4
    assert not stream.thread.is_alive()
    device.close_stream(stream)


def test_what_is_queued_on_a_closed_stream_is_dropped_and_says_so(device):
    stream = device.new_stream("test")
    device.close_stream(stream)
    target = torch.zeros(4, dtype=torch.uint8)
    device.copy(target, torch.ones(4, dtype=torch.uint8), stream)
    event = recorded(device, stream)
    device.copy(target, torch.ones(4, dtype=torch.uint8), stream)
    later = recorded(device, stream)
    stream.put(target.zero_)
    for each in (event, later, recorded(device, stream)):
        with pytest.raises(RuntimeError, match="the stream was closed"):
            device.synchronize(each, 5)
    assert target.tolist() == [0] * 4


def test_a_stream_told_to_end_drops_what_is_queued_and_the_rest_of_a_batch(device):
    stream = device.new_stream("test")
    source, target = torch.ones(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)

    class Sizes:
        """Of a batch; its stream is told to end between the first range and the second."""

        def sum(self):
            return 2

        def tolist(self):
            yield 1
            stream.tasks.end()
            yield 1

    begin, places = Held(stream), np.arange(2)
    ends = (target.data_ptr() + places, source.data_ptr() + places)
    device.copy_batch(*ends, Sizes(), stream)
    event = recorded(device, stream)
    device.copy(target, source, stream)
    dropped = recorded(device, stream)
    begin.end.set()
    for each in (event, dropped):
        with pytest.raises(RuntimeError, match="the process is at its end"):
            device.synchronize(each, 60)
    stream.thread.join(60)
    assert target.tolist() == [1, 0, 0, 0]


def test_a_stream_that_nobody_holds_does_what_is_queued_and_ends(device):
    stream = device.new_stream("test")
    thread, work = stream.thread, Held(stream)
    target = torch.zeros(4, dtype=torch.uint8)
    device.copy(target, torch.ones(4, dtype=torch.uint8), stream)
    event = recorded(device, stream)
    assert thread in _running
    del stream
    gc.collect()
    work.end.set()
    device.synchronize(event, 60)
    thread.join(60)
    assert not thread.is_alive()
    assert thread not in _running
    assert target.tolist() == [1] * 4


@pytest.mark.parametrize("fails", [False, True])
def test_a_stream_holds_nothing_of_what_it_has_done(device, streams, fails):
    source = torch.ones(4, dtype=torch.uint8)
    target = torch.zeros(5 if fails else 4, dtype=torch.uint8)
    gone = weakref.ref(target.untyped_storage()), weakref.ref(target)
    device.copy(target, source, streams[0])
    event = recorded(device, streams[0])
    if fails:
        with pytest.raises(RuntimeError, match="size of tensor"):
            device.synchronize(event, 60)
        assert event.latest.failure is not None
    else:
        device.synchronize(event, 60)
    del target
    until(lambda: gone[1]() is None)  # the thread may be on its way to the next


def test_a_failed_gather_holds_nothing_of_its_operands(device, streams):
    table = PageTable([torch.zeros(4, 8, dtype=torch.uint8)], 1)
    slots = torch.zeros(4, 8, dtype=torch.uint8)
    gone = weakref.ref(slots)
    ids = torch.tensor([3, 0]), torch.tensor([2, 9])  # there is no slot 9
    device.gather(table, ids[0], slots, ids[1], 0, streams[0], zero_copy=False)
    event = recorded(device, streams[0])
    with pytest.raises(Exception, match=r"out of (range|bounds)"):
        device.synchronize(event, 60)
    del slots
    assert event.latest.failure is not None
    until(lambda: gone() is None)


# -- the boundary --


@pytest.mark.parametrize("stream", [3, "compute", torch.Stream(device="cpu"), object()])
def test_a_stream_of_another_kind_is_refused_before_anything_is_queued(stream):
    tensor = torch.zeros(8, 64, dtype=torch.uint8)
    with KVOffloader([tensor], "1MiB") as offloader:
        with pytest.raises(ValueError, match="stream: expected None, or one that"):
            offloader.store([b"a"], [1], stream=stream)
        assert offloader.lookup([b"a"]) == 0
        assert offloader.get_finished() == []
        own = offloader._pool.device.new_stream("compute")
        held = Held(own)
        job = offloader.store([b"a"], [1], stream=own)
        with pytest.raises(ValueError, match="stream: expected None, or one that"):
            job.wait_on(stream)
        with pytest.raises(ValueError, match="stream: expected the one that is to follow"):
            job.wait_on(None)
        held.end.set()
        job.wait(60)
        with pytest.raises(ValueError, match="stream: expected None, or one that"):
            offloader.load([b"a"], [2], stream=stream)
        offloader.load([b"a"], [2]).wait(60)


@pytest.mark.parametrize("kind", ["meta", "xpu"])
def test_a_device_of_another_kind_is_refused(kind):
    with pytest.raises(ValueError, match=f"kv_caches: expected tensors on .* got some on {kind}"):
        device_for(torch.device(kind))


def test_a_cpu_gets_the_host_device():
    assert isinstance(device_for(torch.device("cpu")), HostDevice)


@pytest.mark.parametrize("path", ["staged", "zero_copy", "copy_engine"])
@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta")])
def test_all_of_it_works_where_tensors_are_made_otherwise(mode, path):
    with mode():
        caches = [
            torch.arange(64 * size, device="cpu").to(torch.uint8).view(64, size) for size in (24, 7)
        ]
        offloader = KVOffloader(caches, "1MiB", blocks_per_chunk=2, path=path)
        offloader.store([b"%d" % i for i in range(6)], range(12)).wait(60)
    pages = [tensor[:12].clone() for tensor in caches]
    pool = offloader._pool.slots
    assert not pool.is_inference()
    pool[100:].fill_(3)  # outside of the mode
    offloader.load([b"%d" % i for i in range(6)], list(range(63, 51, -1))).wait(60)
    for tensor, wanted in zip(caches, pages, strict=True):
        assert torch.equal(tensor[52:].flip(0), wanted)
    offloader.close()


def test_buffers_are_the_host_s_and_can_be_written_in_any_mode(device):
    with torch.inference_mode(), torch.device("meta"):
        made = device.empty(8), device.empty_indices(8)
    for buffer in made:
        assert buffer.device.type == "cpu"
        assert not buffer.is_inference()
        buffer.zero_()


def test_a_card_launches_as_its_calibration_says(monkeypatch):
    made = []
    monkeypatch.setattr("triton_offload.device.cuda.CUDADevice", lambda *a: made.append(a) or a)
    card, calibration = torch.device("cuda", 1), default_calibration("cuda")
    assert device_for(card, calibration) == (card, calibration)
    assert made == [(card, calibration)]
