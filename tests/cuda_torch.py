"""The imitation of torch.cuda itself: what it queues, what it computes at once, and what it gives
back (tests/test_cuda_imitation.py runs this)."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import imitation_cuda
import pytest
import torch
import triton
import triton.language as tl
from card.card import CONFIGURATIONS

CARD = imitation_cuda.CARD
POISON = 0xDB

card = imitation_cuda.card


@pytest.fixture(autouse=True)
def _new_card():
    imitation_cuda.use(CONFIGURATIONS["13.0"])


@pytest.fixture
def elsewhere():
    with ThreadPoolExecutor(1) as pool:
        yield lambda function: pool.submit(function).result(60)


def now(tensor: torch.Tensor) -> list[int]:
    """What lies there at this moment, whatever is still queued."""
    return [*ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())]


def test_tensors_of_the_card_say_so_and_so_do_their_views_and_results():
    zeros = torch.zeros(4, 3, dtype=torch.uint8, device="cuda")
    moved = torch.arange(12, dtype=torch.uint8).to(CARD)
    for each in (zeros, zeros[1:], zeros.t(), moved.view(4, 3), moved + 1, moved.clone()):
        assert (each.device, each.is_cuda) == (CARD, True)
    assert (zeros.view(-1) + moved).tolist() == [*range(12)]
    assert moved.cpu().device.type == "cpu"
    assert moved.to(torch.int64).dtype == torch.int64
    assert zeros[1:].untyped_storage().data_ptr() == zeros.data_ptr()
    with pytest.raises(TypeError, match="can't convert"):
        moved.numpy()


def test_results_lie_in_memory_of_the_device():
    result = torch.arange(12, dtype=torch.uint8).to(CARD) + 1
    attribute = ctypes.c_uint64()
    error = card.entry("cuPointerGetAttribute")(
        ctypes.byref(attribute), ctypes.c_uint64(2), ctypes.c_uint64(result.data_ptr())
    )
    assert (error, attribute.value) == (0, 2)


def test_a_tensor_is_on_the_device_that_it_was_made_for():
    imitation_cuda.use(CONFIGURATIONS["two devices"])
    other = torch.device("cuda", 1)
    first, second = torch.zeros(3, device=CARD), torch.zeros(3, device=other)
    assert (first.device, second.device) == (CARD, other)
    assert first.to(other).device == other
    with torch.cuda.device(other):
        assert torch.zeros(3, device="cuda").device == other
    assert torch.cuda.current_device() == 0


def test_work_on_another_device_s_tensor_is_queued_there():
    imitation_cuda.use(CONFIGURATIONS["two devices"])
    tensor = torch.zeros(4, dtype=torch.uint8, device="cuda:1")
    before = card.num_calls
    tensor.fill_(3)
    assert (tensor + 1).device == tensor.device
    asked = [call for call in card.calls(before) if call.name == "cuMemsetD8Async"]
    assert [call.ordinal for call in asked] == [1]
    assert torch.cuda.current_device() == 0
    assert tensor.tolist() == [3] * 4


def test_fills_and_copies_are_queued_on_the_current_stream():
    tensor, stream = torch.full((4,), 1, dtype=torch.uint8, device=CARD), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        tensor[:2] = 7
        host = torch.full((2,), 9, dtype=torch.uint8).pin_memory()
        tensor[2:].copy_(host, non_blocking=True)
    assert now(tensor) == [1, 1, 1, 1]
    stream.synchronize()
    assert now(tensor) == [7, 7, 9, 9]


def test_what_is_computed_comes_after_what_was_queued_before():
    tensor, other = torch.zeros(2, dtype=torch.uint8, device=CARD), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        tensor.fill_(100)
    tensor.fill_(5)
    tensor.add_(1)
    assert now(tensor) == [6, 6]  # and the other stream's, which nothing orders, comes later
    torch.cuda.synchronize()
    assert now(tensor) == [100, 100]


def test_a_tensor_that_goes_is_freed_in_the_order_of_the_default_stream():
    tensor, stream = torch.ones(64, dtype=torch.uint8, device=CARD), torch.cuda.Stream()
    target = torch.zeros(64, dtype=torch.uint8).pin_memory()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        target.copy_(tensor, non_blocking=True)
    del tensor
    torch.cuda.default_stream().synchronize()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        stream.synchronize()
    assert "cuMemcpyAsync: the source at" in card.last_complaint


def test_pinned_memory_that_goes_is_somebody_else_s():
    tensor, stream = torch.zeros(4, dtype=torch.uint8, device=CARD), torch.cuda.Stream()
    host = torch.ones(4, dtype=torch.uint8, pin_memory=True)
    assert host.is_pinned()
    assert not torch.ones(4).is_pinned()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        tensor.copy_(host, non_blocking=True)
    del host
    stream.synchronize()
    assert now(tensor) == [POISON] * 4


def test_a_thread_that_sets_no_device_gets_a_context_on_the_first(elsewhere):
    """As the runtime does: what a thread of an engine on another card would meet."""
    imitation_cuda.use(CONFIGURATIONS["two devices"])
    torch.cuda.set_device(1)
    event = torch.cuda.Event()
    event.record()
    event.synchronize()

    def asked() -> list[str]:
        before = card.num_calls
        event.query()
        return [call.name for call in card.calls(before)]

    assert "cuDevicePrimaryCtxRetain" not in asked()
    assert "cuDevicePrimaryCtxRetain" in elsewhere(asked)
    assert elsewhere(torch.cuda.current_device) == 0


def test_streams_come_out_of_a_pool_in_turn():
    streams = [torch.cuda.Stream() for _ in range(33)]
    assert len(set(streams)) == 32
    assert streams[0] == streams[32]
    assert torch.cuda.Stream(priority=-1).priority == -1
    assert streams[0].priority == 0


def test_each_thread_has_a_current_stream_of_its_own(elsewhere):
    stream, default = torch.cuda.Stream(), torch.cuda.current_stream()
    assert default.cuda_stream == 0
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
        assert elsewhere(torch.cuda.current_stream) == default
    assert torch.cuda.current_stream() == default


def test_a_capture_runs_nothing_and_forbids_other_threads_to_ask(elsewhere):
    tensor, event = torch.zeros(2, dtype=torch.uint8, device=CARD), torch.cuda.Event()
    event.record()
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert torch.cuda.is_current_stream_capturing()
        tensor.add_(1)
        tensor.fill_(3)
    torch.cuda.synchronize()
    assert now(tensor) == [0, 0]

    def capture_while_another_asks():
        refused = pytest.raises(RuntimeError, match="not permitted when stream is capturing")
        with torch.cuda.graph(torch.cuda.CUDAGraph()), refused:
            elsewhere(event.query)

    with pytest.raises(RuntimeError, match="previous error during capture"):
        capture_while_another_asks()


def test_what_lay_on_a_card_before_ends_without_a_trace_on_the_next():
    old = [torch.ones(64, dtype=torch.uint8, device=CARD), torch.ones(64, pin_memory=True)]
    addresses = {each.data_ptr() for each in old}
    imitation_cuda.use(CONFIGURATIONS["13.0"])
    new = [torch.ones(64, dtype=torch.uint8, device=CARD), torch.ones(64, pin_memory=True)]
    assert addresses.isdisjoint(each.data_ptr() for each in new)
    old.clear()
    torch.cuda.synchronize()
    assert (new[0] == 1).all()
    assert (new[1] == 1).all()
    assert card.complaints() == []


@triton.jit
def _add(left, right, total, count, SIZE: tl.constexpr):  # noqa: N803
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = place < count
    values = tl.load(left + place, mask=live) + tl.load(right + place, mask=live)
    tl.store(total + place, values, mask=live)


def add(left: torch.Tensor, right: torch.Tensor, total: torch.Tensor) -> None:
    grid = (triton.cdiv(total.numel(), 256),)
    # Named since triton 3.9 warns where it is not; there are no floats.
    _add[grid](left, right, total, total.numel(), SIZE=256, enable_fp_fusion=False)


def test_a_kernel_of_anybody_s_takes_tensors_that_the_device_reaches():
    """By Triton's own way of launching, which asks the driver of each pointer."""
    values = torch.arange(1000, dtype=torch.int32)
    plain = torch.zeros_like(values)
    left, pinned = values.to(CARD), plain.pin_memory()
    right, total = left * 3, torch.zeros_like(left)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        add(left, right, total)
        add(left, right, pinned)
        with pytest.raises(ValueError, match="cannot be accessed from Triton"):
            add(left, right, plain)
    assert (pinned == 0).all()
    stream.synchronize()
    assert torch.equal(pinned, values * 4)
    assert torch.equal(total.cpu(), values * 4)


def test_memory_of_others_becomes_a_tensor_that_keeps_it():
    torch.cuda.current_device()
    address = ctypes.c_uint64()
    assert card.entry("cuMemAlloc_v2")(ctypes.byref(address), ctypes.c_uint64(16)) == 0

    class Memory:
        def __init__(self):
            self.__cuda_array_interface__ = {
                "shape": (16,),
                "typestr": "|u1",
                "data": (address.value, False),
                "strides": None,
                "version": 3,
            }

        def __del__(self):
            gone.append(address.value)

    gone: list[int] = []
    tensor = torch.as_tensor(Memory(), device=CARD)
    assert (tensor.data_ptr(), tensor.device, tensor.shape) == (address.value, CARD, (16,))
    view = tensor[3:]
    del tensor
    assert gone == []
    del view
    assert gone == [address.value]
