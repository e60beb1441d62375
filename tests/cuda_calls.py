"""What the CUDA device asks of the driver, and on which stream; on the imitated card alone
(tests/test_cuda_imitation.py runs this)."""

from __future__ import annotations

import ctypes

import imitation_cuda
import numpy as np
import pytest
import torch
from cards import CONFIGURATIONS, use

from triton_offload.calibration import LaunchShape
from triton_offload.device import cuda
from triton_offload.device.cuda import CUDADevice, launch_config
from triton_offload.errors import DeviceLostError
from triton_offload.kernels import pages
from triton_offload.kernels.table import PageTable

CARD = imitation_cuda.CARD
LAUNCH_FAILED = 719

card = imitation_cuda.card


@pytest.fixture
def device():
    return CUDADevice(CARD)


@pytest.fixture
def stream(device):
    return device.new_stream("test")


def work(since: int) -> list[tuple[str, int]]:
    """The name and stream of the copies, fills and launches since there were so many calls."""
    return [
        (call.name, call.stream)
        for call in card.calls(since)
        if call.name.startswith(("cuMemcpy", "cuMemset", "cuLaunch"))
    ]


def on_card(size: int, fill: int = 0) -> torch.Tensor:
    return torch.full((size,), fill, dtype=torch.uint8, device=CARD)


def test_copies_and_fills_are_done_late_on_the_stream_that_was_named(device, stream):
    memory, host = on_card(8, 1), torch.arange(8, dtype=torch.uint8).pin_memory()
    before = card.num_calls
    device.fill_zero(memory, stream)
    device.copy(memory[:4], host[4:], stream)
    assert work(before) == [
        ("cuMemsetD8Async", stream.cuda_stream),
        ("cuMemcpyAsync", stream.cuda_stream),
    ]
    assert ctypes.string_at(memory.data_ptr(), 8) == b"\1" * 8
    stream.synchronize()
    assert memory.tolist() == [4, 5, 6, 7, 0, 0, 0, 0]
    assert torch.cuda.current_stream() != stream


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
    wanted = launch_config(device_shape(zero_copy), zero_copy=zero_copy)
    assert made == [(kind, stream, (*arguments, wanted))]


def device_shape(zero_copy):
    defaults = cuda.default_calibration("cuda")
    return defaults.zero_copy if zero_copy else defaults.staged


@pytest.mark.parametrize("pinned", [False, True])
def test_kernels_are_prepared_in_the_shape_of_where_the_slots_lie(device, monkeypatch, pinned):
    made = []
    monkeypatch.setattr(pages, "prepare", lambda *args: made.append(args))
    table = PageTable([torch.zeros(4, 16, dtype=torch.uint8, device=CARD)], 1)
    shape = (2, table.slot_bytes)
    slots = torch.zeros(shape, dtype=torch.uint8, device=None if pinned else CARD)
    device.prepare(table, slots)
    assert made[0][2] == launch_config(device_shape(pinned), zero_copy=pinned)


def test_a_launch_is_of_the_named_stream_with_its_grid_and_arguments(device, stream):
    """The real launcher's, of each kernel: where the bytes end says which arguments it had."""
    table = PageTable([torch.arange(64, dtype=torch.uint8).view(4, 16).to(CARD)], 1)
    slots = torch.full((3, 16), 0xA5, dtype=torch.uint8, device=CARD)
    blocks, ids = torch.tensor([3, 1], device=CARD), torch.tensor([0, 2], device=CARD)
    device.prepare(table, slots)
    torch.cuda.synchronize()
    before, launched = card.num_calls, len(card.launches())
    device.gather(table, blocks, slots, ids, 0, stream, zero_copy=False)
    assert work(before) == [("cuLaunchKernelEx", stream.cuda_stream)]
    assert len(card.launches()) == launched  # it is late, too
    stream.synchronize()
    ((name, counters),) = card.launches(launched)
    assert (name, counters.bytes_written) == ("_gather_kernel", 32)
    expected = [0xA5] * 16
    assert slots.tolist() == [[*range(48, 64)], expected, [*range(16, 32)]]
    device.scatter(table, blocks.flip(0), slots, ids, 0, stream, zero_copy=False)
    stream.synchronize()
    assert table.pages[0].view.tolist() == [
        [*range(16)],
        [*range(48, 64)],
        [*range(32, 48)],
        [*range(16, 32)],
    ]


@pytest.mark.parametrize("sides", [(False, True), (True, False), (False, False)])
def test_rows_that_lie_apart_are_one_copy_on_the_stream(sides, device, stream):
    rows = torch.arange(64, dtype=torch.uint8).view(4, 16)
    there, here = rows.to(CARD), (rows + 64).pin_memory()
    # A side that is whole, or the middle of longer rows.
    dst = there.flatten()[:32].view(4, 8) if sides[0] else there[:, 4:12]
    src = here.flatten()[:32].view(4, 8) if sides[1] else here[:, 4:12]
    expected = rows.clone()
    (expected.view(-1)[:32].view(4, 8) if sides[0] else expected[:, 4:12]).copy_(src)
    torch.cuda.synchronize()
    before = card.num_calls
    device.copy(dst, src, stream)
    assert work(before) == [("cuMemcpy2DAsync_v2", stream.cuda_stream)]
    stream.synchronize()
    assert torch.equal(there.cpu(), expected)
    device.copy(dst[:1], src[2:3], stream)  # a single row, of any stride
    stream.synchronize()
    assert torch.equal(dst[0].cpu(), src[2])


def test_a_batch_is_on_the_stream_and_none_is_nothing(device, stream):
    source, target = torch.arange(9, dtype=torch.uint8).pin_memory(), on_card(9)
    places = np.array([1, 5])
    ends = target.data_ptr() + places, source.data_ptr() + places
    torch.cuda.synchronize()
    before = card.num_calls
    device.copy_batch(*ends, np.array([2, 3]), stream)
    device.copy_batch(places[:0], places[:0], places[:0], stream)
    assert work(before) == [("cuMemcpyBatchAsync", stream.cuda_stream)]
    stream.synchronize()
    assert target.tolist() == [0, 1, 2, 0, 0, 5, 6, 7, 0]


def range_of(address: int) -> tuple[int, int]:
    """Where the memory of this address begins, and its bytes."""
    base, size = ctypes.c_uint64(), ctypes.c_uint64()
    torch.cuda.current_device()
    error = card.entry("cuMemGetAddressRange_v2")(
        ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
    )
    assert error == 0
    return base.value, size.value


def test_memory_is_registered_from_its_first_byte_to_its_last_on_this_card(device):
    whole = torch.zeros(5, 64, dtype=torch.uint8)
    for rows, num_bytes in ((whole[:, :24], 4 * 64 + 24), (whole, 5 * 64), (whole[0], 64)):
        before = card.num_calls
        assert device.register(rows)
        assert range_of(rows.data_ptr()) == (rows.data_ptr(), num_bytes)
        device.unregister(rows)
        assert {call.ordinal for call in card.calls(before)} <= {-1, 0}
        assert not rows.is_pinned()


def test_new_memory_is_no_inference_tensor_and_is_freed_with_its_last_view(device):
    torch.cuda.synchronize()
    with torch.inference_mode():
        buffer = device.empty(48)
    assert not buffer.is_inference()
    assert (buffer.shape, buffer.dtype, buffer.device) == ((48,), torch.uint8, CARD)
    view, address = buffer[8:], buffer.data_ptr()
    del buffer
    assert range_of(address) == (address, 48)
    before = card.num_calls
    del view
    assert [call.name for call in card.calls(before) if "Free" in call.name] == ["cuMemFree_v2"]


def test_ids_lie_in_pinned_memory_whatever_the_default_device(device):
    with torch.inference_mode(), torch.device("meta"):
        ids = device.empty_indices(5)
    assert (ids.dtype, ids.shape, ids.device.type) == (torch.int64, (5,), "cpu")
    assert not ids.is_inference()
    assert range_of(ids.data_ptr()) == (ids.data_ptr(), 40)
    assert ids.is_pinned()


def test_an_error_of_the_device_is_its_loss():
    configuration = card.configuration
    try:
        for wait in (
            lambda device, event: device.query(event),
            lambda device, event: device.synchronize(event, None),
            lambda device, event: device.synchronize(event, 1),
        ):
            use(configuration)
            device = CUDADevice(CARD)
            event, stream = device.new_event(), device.new_stream("test")
            buffer = device.empty(16)
            card.inject_operation(1, LAUNCH_FAILED)
            device.fill_zero(buffer, stream)
            device.record(event, stream)
            with pytest.raises(DeviceLostError, match="CUDA_ERROR_LAUNCH_FAILED"):
                wait_until_reached(device, event, wait)
            device.close_stream(stream)  # frees what there is
            del buffer, event
    finally:
        use(configuration)


def wait_until_reached(device, event, wait):
    for _ in range(10):  # each query lets one operation run
        if wait(device, event):
            return


def test_waiting_for_an_event_ends_when_it_is_reached_or_the_time_is_over(device, stream):
    event, never = device.new_event(), torch.cuda.Stream()
    memory = on_card(8)
    torch.cuda.synchronize()
    for _ in range(3):
        device.fill_zero(memory, stream)
    device.record(event, stream)
    before = card.num_calls
    device.synchronize(event, 60)
    asked = [call.name for call in card.calls(before)]
    assert asked.count("cuEventQuery") == 4
    assert "cuEventSynchronize" not in asked
    device.record(event, stream)
    before = card.num_calls
    device.synchronize(event, None)
    assert "cuEventSynchronize" in [call.name for call in card.calls(before)]
    for _ in range(1000):
        device.fill_zero(memory, stream)
    device.record(event, stream)
    with pytest.raises(TimeoutError, match=r"not reached within 0\.002 s"):
        device.synchronize(event, 0.002)
    del never


def test_streams_and_events_are_as_they_were_asked_for(device):
    assert device.new_stream("a", high_priority=True).priority == -5
    assert device.new_stream("a").priority == 0
    stream = device.new_stream("a")
    start, end = device.new_event(timed=True), device.new_event(timed=True)
    device.record(start, stream)
    device.record(end, stream)
    device.synchronize(end, None)
    assert 0 <= device.elapsed(start, end) < 60
    with pytest.raises(RuntimeError):
        device.elapsed(start, device.new_event())
    before = card.num_calls
    device.close_stream(stream)
    asked = [(call.name, call.stream) for call in card.calls(before)]
    assert ("cuStreamSynchronize", stream.cuda_stream) in asked
    assert ("cuStreamDestroy_v2", stream.cuda_stream) in asked


def test_no_two_streams_are_one(device):
    """torch would hand out the same one again after some."""
    streams = [device.new_stream("a") for _ in range(100)]
    assert len({stream.cuda_stream for stream in streams}) == 100


def test_a_stream_waits_for_an_event_of_another(device, stream):
    other, event = device.new_stream("b"), device.new_event()
    memory, target = on_card(4), on_card(4)
    source = torch.full((4,), 7, dtype=torch.uint8).pin_memory()
    torch.cuda.synchronize()
    device.copy(memory, source, other)
    device.record(event, other)
    device.wait(stream, event)
    device.copy(target, memory, stream)
    stream.synchronize()
    assert target.tolist() == [7] * 4


def test_a_stream_of_another_kind_or_card_is_refused(device):
    device.check_stream(None)
    device.check_stream(device.new_stream("a"))
    other = device.new_stream("a")
    other.device = torch.device("cuda", 1)
    for stream in (3, torch.Stream(device="cpu"), other):
        with pytest.raises(ValueError, match=r"stream: expected a torch\.cuda\.Stream on cuda:0"):
            device.check_stream(stream)


def test_a_calibrated_shape_keeps_the_bytes_of_a_thread():
    own = launch_config(None, zero_copy=False)
    shape = launch_config(LaunchShape(warps=2 * own.warps, programs=7), zero_copy=False)
    assert (shape.warps, shape.programs) == (2 * own.warps, 7)
    assert shape.tile_bytes == 2 * own.tile_bytes


def test_on_a_newer_driver_the_device_makes_the_same_calls():
    """Whatever the bindings ask for: batches have one name, and the version of 12.8."""
    configuration = card.configuration
    use(CONFIGURATIONS["13.0"])
    try:
        device = CUDADevice(CARD)
        stream = device.new_stream("test")
        source, target = torch.arange(9, dtype=torch.uint8).pin_memory(), on_card(9)
        torch.cuda.synchronize()
        ends = [np.array([each.data_ptr()]) for each in (target, source)]
        before = card.num_calls
        device.copy_batch(*ends, np.array([9]), stream)
        assert work(before) == [("cuMemcpyBatchAsync", stream.cuda_stream)]
        stream.synchronize()
        assert target.tolist() == [*range(9)]
        del source, target, device
    finally:
        use(configuration)
