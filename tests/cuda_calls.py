"""What each call of the seam asks of the driver: on which stream, with which bytes, and what it
leaves (run by tests/test_cuda_imitation.py, on the imitated card)."""

from __future__ import annotations

import gc
import math
import threading

import numpy as np
import pytest
import torch
from cards import CONFIGURATIONS, left, named, replace, use
from cuda.bindings import driver as bindings

from triton_offload.calibration import LaunchShape, default_calibration
from triton_offload.device import driver
from triton_offload.device.cuda import CUDADevice, _rows, launch_config
from triton_offload.errors import DeviceLostError
from triton_offload.kernels import pages
from triton_offload.kernels.table import PageTable
from triton_offload.specs import Direction

CARD = torch.device("cuda", 0)


@pytest.fixture
def card():
    return use("12.8")


@pytest.fixture
def device(card):
    return CUDADevice(CARD)


@pytest.fixture
def stream(device):
    return device.new_stream("test")


def on_card(device, data: torch.Tensor) -> torch.Tensor:
    memory = device.empty(data.numel()).view(data.shape)
    memory.copy_(data)
    torch.cuda.synchronize()
    return memory


def finish(device, stream) -> None:
    event = device.new_event()
    device.record(event, stream)
    device.synchronize(event, None)


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.int64).to(torch.uint8).view(shape)


# -- work --


def test_work_is_queued_on_the_stream_that_was_named(card, device, stream):
    memory, host = device.empty(4096), device.empty_indices(512).view(torch.uint8)
    other = torch.cuda.current_stream().cuda_stream
    first = card.num_calls
    device.fill_zero(memory, stream)
    device.copy(host, memory, stream)
    device.copy(host.view(64, 64)[:, :8], memory.view(64, 64)[:, 8:16], stream)
    places = np.array([0, 64])
    device.copy_batch(memory.data_ptr() + places, host.data_ptr() + places, places + 8, stream)
    calls = [call for call in card.calls(first) if call.stream]
    assert [(call.name, call.stream, call.result) for call in calls] == [
        (name, stream.cuda_stream, 0)
        for name in ("cuMemsetD8Async", "cuMemcpyAsync", "cuMemcpy2DAsync_v2", "cuMemcpyBatchAsync")
    ]
    assert torch.cuda.current_stream().cuda_stream == other
    finish(device, stream)


@pytest.mark.parametrize("zero_copy", [False, True])
@pytest.mark.parametrize("kind", ["gather", "scatter"])
def test_kernels_run_on_the_stream_that_was_named_in_the_shape_of_their_path(
    kind, zero_copy, device, stream, monkeypatch
):
    made = []
    for each in ("gather", "scatter"):
        monkeypatch.setattr(
            pages,
            f"launch_{each}",
            lambda *args, each=each: made.append((each, torch.cuda.current_stream(), args)),
        )
    arguments = [object() for _ in range(5)]
    getattr(device, kind)(*arguments, stream, zero_copy=zero_copy)
    way = Direction.STORE if kind == "gather" else Direction.LOAD
    wanted = launch_config(device_shape(way, zero_copy), zero_copy=zero_copy)
    assert made == [(kind, stream, (*arguments, wanted, None))]


def device_shape(way, zero_copy):
    defaults = default_calibration("cuda")
    return (defaults.zero_copy if zero_copy else defaults.staged).of(way)


def test_kernels_are_prepared_in_the_shape_of_where_the_slots_lie(device, monkeypatch):
    made = []
    monkeypatch.setattr(pages, "prepare", lambda *args, sums: made.append(args))
    table = PageTable([torch.zeros(4, 16, dtype=torch.uint8)], 1)
    device.prepare(table, torch.zeros(2, table.slot_bytes, dtype=torch.uint8))
    device.prepare(table, device.empty(2 * table.slot_bytes).view(2, -1))
    wanted = [
        {launch_config(device_shape(way, zero_copy), zero_copy=zero_copy) for way in Direction}
        for zero_copy in (True, False)
    ]
    configs = [each[2] for each in made]
    count = len(wanted[0])
    assert [set(configs[:count]), set(configs[count:])] == wanted
    assert len(configs) == count + len(wanted[1])


def test_kernels_that_add_up_have_no_ring_and_no_more_in_flight_than_registers_hold(device):
    device._configs[Direction.LOAD, True] = pages.ring_config(2)
    for way in Direction:
        for zero_copy in (False, True):
            config = device._config(way, zero_copy=zero_copy, sums=True)
            assert config.stages == 1
            assert config.tile_bytes // (32 * config.warps) <= 256  # bytes of a thread


def test_a_launch_is_late_on_the_stream_with_its_arguments(card, device, stream):
    """The real launcher's, of each kernel: where the bytes end says which arguments it had."""
    cache = on_card(device, numbers(4, 16))
    table = PageTable([cache], 1)
    slots = on_card(device, torch.full((3, 16), 0xA5, dtype=torch.uint8))
    blocks, ids = device.empty_indices(2), device.empty_indices(2)
    blocks[:], ids[:] = torch.tensor([3, 1]), torch.tensor([0, 2])
    device.prepare(table, slots)
    torch.cuda.synchronize()
    first, launched = card.num_calls, len(card.launches())
    device.gather(table, blocks, slots, ids, 0, stream, zero_copy=False)
    assert {c.stream for c in named(card, "cuLaunchKernelEx", first=first)} == {stream.cuda_stream}
    assert len(card.launches()) == launched
    finish(device, stream)
    ((name, counters),) = card.launches(launched)
    assert (name, counters.bytes_written) == ("gather_kernel", 32)
    pages_of = numbers(4, 16).tolist()
    assert slots.tolist() == [pages_of[3], [0xA5] * 16, pages_of[1]]
    blocks[:] = torch.tensor([1, 3])
    device.scatter(table, blocks, slots, ids, 0, stream, zero_copy=False)
    finish(device, stream)
    assert cache.tolist() == [pages_of[i] for i in (0, 3, 2, 1)]


@pytest.mark.parametrize("sides", [(False, True), (True, False), (False, False)])
def test_rows_that_lie_apart_are_one_copy_of_their_bytes_and_no_other(sides, card, device, stream):
    host, memory = device.empty_indices(40).view(torch.uint8), on_card(device, numbers(320))
    host.fill_(0xA5)
    expected = host.clone()
    whole_host, whole_card = sides
    dst = host[:40].view(5, 8) if whole_host else host.view(5, 64)[:, 4:12]
    src = memory[:40].view(5, 8) if whole_card else memory.view(5, 64)[:, 16:24]
    wanted = expected[:40].view(5, 8) if whole_host else expected.view(5, 64)[:, 4:12]
    wanted.copy_(src.cpu())
    first = card.num_calls
    device.copy(dst, src, stream)
    finish(device, stream)
    assert torch.equal(host, expected)
    assert len(named(card, "cuMemcpy2DAsync_v2", first=first)) == 1


def test_a_single_row_may_have_any_stride(card, device, stream):
    host, memory = device.empty_indices(8).view(torch.uint8), on_card(device, numbers(64))
    row = torch.as_strided(host, (1, 4), (1 << 40, 1))
    source = torch.as_strided(memory, (1, 3), (1 << 41, 1), 7)
    device.copy(row[:, :3], source, stream)
    finish(device, stream)
    copy = _rows(row[:, :3], source)
    assert (copy.dstPitch, copy.srcPitch) == (3, 3)  # a card's longest is 2 GiB
    assert host[:3].tolist() == [7, 8, 9]
    assert card.complaints() == []


def test_a_batch_moves_its_bytes_after_what_is_queued_before_it(card, device, stream):
    memory, host = on_card(device, numbers(64)), device.empty_indices(8).view(torch.uint8)
    host.fill_(0xA5)
    for seed in range(8):
        host.fill_(0xA5)
        device.copy(memory[:32], memory[32:], stream)
        to, source = np.array([1, 9, 20]), np.array([0, 5, 11])
        device.copy_batch(
            host.data_ptr() + to, memory.data_ptr() + source, np.array([2, 3, 1]), stream
        )
        finish(device, stream)
        expected = [0xA5] * 64
        expected[1:3], expected[9:12], expected[20] = [32, 33], [37, 38, 39], 43
        assert host.tolist() == expected, seed
        memory.copy_(numbers(64))
        torch.cuda.synchronize()


def test_no_copies_are_no_batch(card, device, stream):
    none = np.empty(0, dtype=np.int64)
    first = card.num_calls
    device.copy_batch(none, none, none, stream)
    assert card.num_calls == first


def test_batches_are_arrays_of_any_stride(device, stream):
    host, memory = device.empty_indices(8).view(torch.uint8), on_card(device, numbers(64))
    host.fill_(0xA5)
    ends = np.array([host.data_ptr(), memory.data_ptr()])
    addresses = ends + np.array([[0], [8], [20]])
    device.copy_batch(addresses[:, 0], addresses[:, 1], np.array([2, 9, 1, 9, 3, 9])[::2], stream)
    finish(device, stream)
    expected = [0xA5] * 64
    expected[0:2], expected[8:9], expected[20:23] = [0, 1], [8], [20, 21, 22]
    assert host.tolist() == expected


@pytest.mark.parametrize("machine", ["12.4", "12.8"])
def test_without_batches_every_range_is_a_copy_on_the_stream(machine):
    card = use(machine)
    card.inject("cuMemcpyBatchAsync", 801, last=-1)
    device = CUDADevice(CARD)
    stream = device.new_stream("test")
    host, memory = device.empty_indices(8).view(torch.uint8), on_card(device, numbers(64))
    places = np.array([0, 8])
    device.copy_batch(host.data_ptr() + places, memory.data_ptr() + places, places + 1, stream)
    finish(device, stream)
    assert [host[i].item() for i in (0, 8, 16)] == [0, 8, 16]
    assert {call.stream for call in named(card, "cuMemcpyAsync")[-2:]} == {stream.cuda_stream}


def test_a_copy_that_the_driver_refuses_raises_by_name(card, device, stream):
    memory = device.empty(64)
    card.inject("cuMemcpyAsync", 1)
    with pytest.raises(driver.DriverError, match=r"cuMemcpyAsync: CUDA_ERROR_INVALID_VALUE \(1\)"):
        device.copy(memory[:8], memory[8:16], stream)


# -- memory --


def pageable(card, device, stream, host: torch.Tensor) -> bool:
    before = card.num_pageable_copies
    device.copy(host, device.empty(host.numel()).fill_(0), stream)
    return card.num_pageable_copies != before


def test_memory_is_registered_from_its_first_byte_to_its_last(card, device, stream):
    memory = torch.zeros(16 * 64, dtype=torch.uint8)
    rows = memory[64 : 64 * 6].view(5, 64)[:, :24]
    assert device.register(rows)
    last = 64 + 4 * 64 + 24
    assert not pageable(card, device, stream, memory[64:65])
    assert not pageable(card, device, stream, memory[last - 1 : last])
    assert pageable(card, device, stream, memory[last : last + 1])
    device.unregister(rows)
    assert pageable(card, device, stream, memory[64:65])
    assert device.register(memory.view(16, 64))
    assert not pageable(card, device, stream, memory[-1:])
    device.unregister(memory)


def test_kernels_and_other_contexts_reach_what_was_registered(device):
    memory = torch.zeros(4096, dtype=torch.uint8)
    device.register(memory)
    _, flags = bindings.cuMemHostGetFlags(memory.data_ptr())
    assert flags == 0x3
    device.unregister(memory)


def test_new_memory_is_the_drivers_and_goes_with_the_last_tensor_over_it(card, device):
    first = card.num_calls
    with torch.inference_mode():
        buffer = device.empty(48)
    assert (buffer.shape, buffer.dtype, buffer.device) == ((48,), torch.uint8, CARD)
    assert not buffer.is_inference()
    (made,) = named(card, "cuMemAlloc_v2", first=first)
    assert made.result == 0
    part = buffer[8:]
    del buffer
    gc.collect()
    assert named(card, "cuMemFree_v2", first=first) == []
    del part
    gc.collect()
    assert len(named(card, "cuMemFree_v2", first=first)) == 1
    assert left(card, first) == {}


def test_memory_that_torch_holds_free_is_asked_for_before_there_is_none(card, device, monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    card.inject("cuMemAlloc_v2", 2)
    assert device.empty(64).shape == (64,)
    assert emptied == [1]
    card.inject("cuMemAlloc_v2", 2, last=-1)
    with pytest.raises(driver.DriverError, match="OUT_OF_MEMORY"):
        device.empty(64)
    card.clear_injections()
    card.inject("cuMemAlloc_v2", 700)
    with pytest.raises(driver.DriverError, match="ILLEGAL_ADDRESS"):
        device.empty(64)
    assert emptied == [1, 1]


def test_ids_lie_in_pinned_memory_whatever_the_default_device(card, device, stream):
    first = card.num_calls
    with torch.inference_mode(), torch.device("meta"):
        ids = device.empty_indices(5)
    assert (ids.dtype, ids.shape, ids.device.type) == (torch.int64, (5,), "cpu")
    assert not ids.is_inference()
    _, flags = bindings.cuMemHostGetFlags(ids.data_ptr())
    assert flags == 0x3
    assert not pageable(card, device, stream, ids.view(torch.uint8)[-1:])
    del ids
    gc.collect()
    assert len(named(card, "cuMemFreeHost", first=first)) == 1


# -- streams and events --


def test_an_error_of_the_device_is_its_loss(card, device, stream):
    event, memory = device.new_event(), device.empty(8)
    card.inject_operation(1, 700)
    device.fill_zero(memory, stream)
    device.record(event, stream)
    for ask in (
        lambda: device.synchronize(event, None),
        lambda: device.query(event),
        lambda: device.synchronize(event, 1),
    ):
        with pytest.raises(DeviceLostError, match="ILLEGAL_ADDRESS"):
            ask()
    device.close_stream(stream)  # frees what there is


def test_waiting_for_an_event_ends_when_it_is_reached_or_the_time_is_over(device, monkeypatch):
    event, answers = device.new_event(), iter([False, False, True])
    monkeypatch.setattr(device, "query", lambda event: next(answers))
    device.synchronize(event, 60)
    assert list(answers) == []
    monkeypatch.setattr(device, "query", lambda event: False)
    with pytest.raises(TimeoutError, match=r"not reached within 0\.002 s"):
        device.synchronize(event, 0.002)


def test_an_event_is_reached_when_what_is_before_it_is_done(device, stream):
    memory = device.empty(1 << 20)
    event = device.new_event()
    assert device.query(event)  # never recorded
    answers = []
    for _ in range(20):
        device.fill_zero(memory, stream)
        device.record(event, stream)
        answers.append(device.query(event))
    assert False in answers
    device.synchronize(event, None)
    assert device.query(event)


def test_streams_are_as_they_were_asked_for(card, device):
    high, low = device.new_stream("a", high_priority=True), device.new_stream("a")
    _, least, greatest = bindings.cuCtxGetStreamPriorityRange()
    assert least > greatest
    priorities = [int(bindings.cuStreamGetPriority(s.cuda_stream)[1]) for s in (high, low)]
    assert priorities == [greatest, least]
    flags = [int(bindings.cuStreamGetFlags(s.cuda_stream)[1]) for s in (high, low)]
    assert flags == [1, 1]  # neither waits for the legacy stream
    first = card.num_calls
    device.fill_zero(device.empty(8), low)
    device.close_stream(low)
    assert [
        call.stream
        for call in named(card, "cuStreamSynchronize", "cuStreamDestroy_v2", first=first)
    ] == [low.cuda_stream] * 2


def test_a_timed_event_tells_seconds_and_another_none(card, device, stream):
    start, end = device.new_event(timed=True), device.new_event(timed=True)
    device.record(start, stream)
    for _ in range(5):
        device.fill_zero(device.empty(1 << 20), stream)
    device.record(end, stream)
    device.synchronize(end, None)
    _, milliseconds = bindings.cuEventElapsedTime(start.handle, end.handle)
    assert device.elapsed(start, end) == pytest.approx(float(milliseconds) * 1e-3)
    plain = device.new_event()
    device.record(plain, stream)
    device.synchronize(plain, None)
    with pytest.raises(driver.DriverError, match="cuEventElapsedTime"):
        device.elapsed(start, plain)


@pytest.mark.parametrize("machine", ["12.4", "12.8", "13.1"])
def test_every_driver_tells_the_time_between_events(machine):
    use(machine)
    device = CUDADevice(CARD)
    stream = device.new_stream("test")
    start, end = device.new_event(timed=True), device.new_event(timed=True)
    device.record(start, stream)
    device.record(end, stream)
    device.synchronize(end, None)
    assert device.elapsed(start, end) >= 0


def test_a_stream_waits_for_what_was_recorded_on_the_other(card, device, stream):
    other, event = device.new_stream("other"), device.new_event()
    first = card.num_calls
    device.record(event, other)
    device.wait(stream, event)
    calls = named(card, "cuEventRecord", "cuStreamWaitEvent", first=first)
    assert [(call.name, call.stream) for call in calls] == [
        ("cuEventRecord", other.cuda_stream),
        ("cuStreamWaitEvent", stream.cuda_stream),
    ]


def test_events_go_when_nobody_holds_them(card, device, stream):
    first = card.num_calls
    events = [device.new_event(), device.new_event(timed=True)]
    for event in events:
        device.record(event, stream)
    del event, events
    gc.collect()
    assert left(card, first) == {}


def test_a_stream_of_another_kind_or_card_is_refused():
    use("two devices")
    device = CUDADevice(CARD)
    device.check_stream(None)
    device.check_stream(device.new_stream("a"))
    device.check_stream(torch.cuda.Stream())
    for stream in (3, torch.Stream(device="cpu"), torch.cuda.Stream(torch.device("cuda", 1))):
        with pytest.raises(ValueError, match=r"stream: expected a torch\.cuda\.Stream on cuda:0"):
            device.check_stream(stream)


# -- threads, machines --


def test_a_thread_of_ours_begins_on_the_card():
    use("two devices")
    device = CUDADevice(torch.device("cuda", 1))
    torch.cuda.set_device(0)
    seen, done = [], threading.Event()

    def step() -> float:
        seen.append((torch.cuda.current_device(), threading.current_thread().name))
        done.set()
        return math.inf

    device.background("ours", step)
    assert done.wait(60)
    assert seen == [(1, "ours")]


def test_a_card_that_shares_no_addresses_is_refused(card, monkeypatch):
    monkeypatch.setattr(driver.Context, "attribute", lambda self, name: 0)
    with pytest.raises(ValueError, match="kv_caches: expected tensors on a card that shares"):
        CUDADevice(CARD)


def test_a_question_that_the_driver_does_not_know_has_no_answer(card):
    context = driver.context_of(0)
    card.inject("cuDeviceGetAttribute", 1)
    assert context.attribute("HOST_NUMA_ID") is None
    assert context.attribute("HOST_NUMA_ID") == 0


def test_without_bindings_it_is_said_what_is_missing(monkeypatch):
    driver.bindings.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.driver", None)
    monkeypatch.delattr("cuda.bindings.driver", raising=False)
    with pytest.raises(RuntimeError, match=r"pip install 'triton-offload\[cuda\]'"):
        driver.bindings()
    monkeypatch.undo()
    driver.bindings.cache_clear()


def test_a_trial_of_registering_leaves_nothing_registered():
    card = use(replace(CONFIGURATIONS["12.8"], registering=0))
    CUDADevice(CARD)
    assert len(named(card, "cuMemHostRegister_v2")) == 1
    assert left(card) == {}


def test_a_calibrated_shape_keeps_the_bytes_of_a_thread():
    own = launch_config(None, zero_copy=False)
    shape = launch_config(LaunchShape(warps=2 * own.warps, programs=7), zero_copy=False)
    assert (shape.warps, shape.programs) == (2 * own.warps, 7)
    assert shape.tile_bytes == 2 * own.tile_bytes
