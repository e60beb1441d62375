"""What the CUDA device asks of torch.cuda and cuda-bindings, and on which stream; with the
imitation alone (tests/test_cuda_imitation.py runs this)."""

from __future__ import annotations

import imitation_cuda
import numpy as np
import pytest
import torch

from triton_offload.calibration import LaunchShape
from triton_offload.device import cuda
from triton_offload.device.cuda import CUDADevice, launch_config
from triton_offload.errors import DeviceLostError
from triton_offload.kernels import pages
from triton_offload.kernels.table import PageTable
from triton_offload.specs import Direction

CARD = imitation_cuda.CARD


@pytest.fixture
def device():
    return CUDADevice(CARD)


@pytest.fixture
def stream(device):
    return device.new_stream("test")


class Tensor:
    """Notes on which stream it is asked for what."""

    def __init__(self, contiguous=True):
        self.done = []
        self._contiguous = contiguous

    def is_contiguous(self):
        return self._contiguous

    def zero_(self):
        self.done.append(("zero", torch.cuda.current_stream()))

    def copy_(self, source, non_blocking):
        assert non_blocking
        self.done.append(("copy", torch.cuda.current_stream()))


def test_what_torch_does_is_done_on_the_stream_that_was_named(device, stream):
    tensor = Tensor()
    device.fill_zero(tensor, stream)
    device.copy(tensor, Tensor(), stream)
    assert tensor.done == [("zero", stream), ("copy", stream)]
    assert torch.cuda.current_stream() is not stream


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
    assert made == [(kind, stream, (*arguments, wanted))]


def device_shape(way, zero_copy):
    defaults = cuda.default_calibration("cuda")
    return (defaults.zero_copy if zero_copy else defaults.staged).of(way)


def test_kernels_are_prepared_in_the_shape_of_where_the_slots_lie(device, monkeypatch):
    made = []
    monkeypatch.setattr(pages, "prepare", lambda *args: made.append(args))
    table = PageTable([torch.zeros(4, 16, dtype=torch.uint8)], 1)
    device.prepare(table, torch.zeros(2, table.slot_bytes, dtype=torch.uint8))
    wanted = [launch_config(device_shape(way, True), zero_copy=True) for way in Direction]
    assert {config for *_, config in made} == set(wanted)


@pytest.mark.parametrize("sides", [(False, True), (True, False), (False, False)])
def test_rows_that_lie_apart_are_one_copy_on_the_stream(sides, device, stream):
    imitation_cuda.asked.clear()
    made = [torch.arange(64, dtype=torch.uint8).view(4, 16) + 64 * i for i in range(2)]
    ends = [m[:, :8].contiguous() if whole else m[:, 4:12] for m, whole in zip(made, sides)]  # noqa: B905
    dst, src = ends
    device.copy(dst, src, stream)
    assert torch.equal(dst, src)
    assert imitation_cuda.asked == [("rows", stream.cuda_stream)]
    device.copy(dst[:1], src[2:3], stream)  # a single row, of any stride
    assert torch.equal(dst[0], src[2])


def test_without_bindings_rows_are_copied_one_by_one_on_the_stream(device, stream, monkeypatch):
    monkeypatch.setattr(cuda, "_bindings", lambda module: None)
    rows = [Tensor(), Tensor()]

    class Rows(list):
        def is_contiguous(self):
            return False

    device.copy(Rows(rows), Rows([1, 2]), stream)
    assert [row.done for row in rows] == [[("copy", stream)]] * 2
    with pytest.raises(RuntimeError, match=r"need cuda-bindings >= 12\.8"):
        device.copy_batch(np.array([1]), np.array([1]), np.array([1]), stream)


def test_a_batch_is_on_the_stream_and_none_is_nothing(device, stream):
    imitation_cuda.asked.clear()
    source, target = torch.arange(9, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8)
    places = np.array([1, 5])
    ends = target.data_ptr() + places, source.data_ptr() + places
    device.copy_batch(*ends, np.array([2, 3]), stream)
    assert target.tolist() == [0, 1, 2, 0, 0, 5, 6, 7, 0]
    device.copy_batch(places[:0], places[:0], places[:0], stream)
    assert imitation_cuda.asked == [("batch", stream.cuda_stream)]


def test_a_copy_that_the_driver_refuses_raises(device, stream, monkeypatch):
    monkeypatch.setattr(imitation_cuda.driver, "cuMemcpyBatchAsync", lambda *args: (1,))
    with pytest.raises(RuntimeError, match="the driver refused a copy: 1"):
        device.copy_batch(np.array([1]), np.array([1]), np.array([1]), stream)


def test_memory_is_registered_from_its_first_byte_to_its_last_on_this_card(device):
    registered = torch.cuda.cudart()._registered
    whole = torch.zeros(5, 64, dtype=torch.uint8)
    rows = whole[:, :24]
    assert device.register(rows)
    assert registered == {rows.data_ptr(): 4 * 64 + 24}
    device.unregister(rows)
    assert device.register(whole)
    assert registered == {whole.data_ptr(): 5 * 64}
    device.unregister(whole)
    assert not registered
    torch.cuda.cudart().refuses = True
    assert not device.register(whole)
    torch.cuda.cudart().refuses = False


def test_new_memory_is_not_in_use_by_torch_any_more(device):
    before = torch.cuda.current_stream().num_synchronized
    with torch.inference_mode():
        buffer = device.empty(48)
    assert torch.cuda.current_stream().num_synchronized == before + 1
    assert not buffer.is_inference()
    assert (buffer.shape, buffer.dtype) == ((48,), torch.uint8)


def test_ids_lie_in_pinned_memory_whatever_the_default_device(device):
    imitation_cuda.pinned.clear()
    with torch.inference_mode(), torch.device("meta"):
        ids = device.empty_indices(5)
    assert (ids.dtype, ids.shape) == (torch.int64, (5,))
    assert not ids.is_inference()
    assert [each["device"] for each in imitation_cuda.pinned] == ["cpu"]


def test_an_error_of_the_device_is_its_loss(device, monkeypatch):
    def fail(self):
        raise RuntimeError("illegal address")

    event, stream = device.new_event(), device.new_stream("test")
    for name in ("query", "synchronize"):
        monkeypatch.setattr(imitation_cuda.Event, name, fail)
    monkeypatch.setattr(imitation_cuda.Stream, "synchronize", fail)
    for call in (
        lambda: device.query(event),
        lambda: device.synchronize(event, None),
        lambda: device.synchronize(event, 1),
    ):
        with pytest.raises(DeviceLostError, match="illegal address"):
            call()
    device.close_stream(stream)  # frees what there is


def test_waiting_for_an_event_ends_when_it_is_reached_or_the_time_is_over(device, monkeypatch):
    event, answers = device.new_event(), iter([False, False, True])
    monkeypatch.setattr(event, "query", lambda: next(answers))
    device.synchronize(event, 60)
    assert list(answers) == []
    monkeypatch.setattr(event, "query", lambda: False)
    with pytest.raises(TimeoutError, match=r"not reached within 0\.002 s"):
        device.synchronize(event, 0.002)


def test_streams_and_events_are_as_they_were_asked_for(device):
    assert device.new_stream("a", high_priority=True).priority == -1
    assert device.new_stream("a").priority == 0
    assert device.new_event(timed=True)._timed
    assert not device.new_event()._timed
    stream = device.new_stream("a")
    device.close_stream(stream)
    assert stream.num_synchronized == 1
    start, end = device.new_event(timed=True), device.new_event(timed=True)
    device.record(start, stream)
    device.record(end, stream)
    assert device.elapsed(start, end) == start.elapsed_time(end) * 1e-3
    waited = []
    stream.wait_event = waited.append
    device.wait(stream, end)
    assert waited == [end]


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
