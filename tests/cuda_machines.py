"""The CUDA device on cards, drivers and systems that differ in what they have (run by
tests/test_cuda_imitation.py, on the imitated card)."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from cards import CONFIGURATIONS, Transfers, left, named, replace, use

from triton_offload.calibration import Path
from triton_offload.device import device_for
from triton_offload.device.cuda import CUDADevice

PATHS = [path.value for path in Path]
CARD = torch.device("cuda", 0)
BATCHES = ("cuMemcpyBatchAsync", "cuMemcpyBatchAsync_v2")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("machine", sorted({*CONFIGURATIONS} - {"unpinned"}))
def test_bytes_come_back_by_every_path_on_every_machine(machine, path, caplog):
    card = use(machine)
    with caplog.at_level(logging.WARNING), Transfers(path) as transfers:
        transfers.there_and_back()
        stats = transfers.offloader.stats()
    assert stats.broken_paths == ()
    assert stats.store.failed == stats.load.failed == 0
    assert card.complaints() == [
        complaint for complaint in card.complaints() if "cuMemHost" in complaint
    ]
    del transfers
    assert left(card) == {}


@pytest.mark.parametrize(
    ("machine", "has"),
    [("12.4", False), ("12.8", True), ("12.9", True), ("13.0", True), ("13.1", True)],
)
def test_batches_are_had_where_the_driver_has_them_whatever_the_bindings(machine, has):
    card = use(machine)
    device = CUDADevice(CARD)
    assert device.batches_copies is has
    assert any("no batches of copies" in limit for limit in device.limits) is not has
    assert len(named(card, *BATCHES)) == has
    with Transfers("copy_engine") as transfers:
        transfers.there_and_back(1)
        # Without them, big pages are staged.
        by_path = transfers.offloader.stats().store.paths
    assert set(by_path) == {"copy_engine" if has else "staged"}


def test_a_driver_that_has_batches_and_refuses_them_has_none():
    card = use("12.8")
    card.inject("cuMemcpyBatchAsync", 801, last=-1)
    with Transfers("copy_engine") as transfers:
        transfers.there_and_back()
        (limit,) = transfers.offloader.stats().limits
    assert "no batches of copies (cuMemcpyBatchAsync: CUDA_ERROR_NOT_SUPPORTED (801))" in limit
    assert len(named(card, "cuMemcpyBatchAsync")) == 2  # with the flag, and without


@pytest.mark.parametrize("path", ["copy_engine", "staged"])
def test_a_batch_that_is_refused_later_ends_no_lane(path, caplog):
    card = use("12.8")
    with caplog.at_level(logging.WARNING), Transfers(path) as transfers:
        transfers.scattered()
        card.inject("cuMemcpyBatchAsync", 1, last=-1)
        transfers.scattered()
        transfers.there_and_back()
        stats = transfers.offloader.stats()
    assert stats.store.failed == stats.load.failed == 0
    assert stats.broken_paths == ()
    (told,) = caplog.messages
    assert "a batch of copies was refused (cuMemcpyBatchAsync: CUDA_ERROR_INVALID_VALUE" in told
    assert "microseconds for each" in told
    assert any("no batches of copies" in limit for limit in stats.limits)


def test_what_is_wrong_with_a_batch_of_a_lost_device_is_not_the_batch(caplog):
    card = use("12.8")
    device = CUDADevice(CARD)
    stream, memory = device.new_stream("test"), device.empty(8)
    for name in ("cuMemcpyBatchAsync", "cuMemcpyAsync"):
        card.inject(name, 700, last=-1)
    places = memory.data_ptr() + np.arange(8)
    with pytest.raises(RuntimeError, match="cuMemcpyAsync: CUDA_ERROR_ILLEGAL_ADDRESS"):
        device.copy_batch(places[4:], places[:4], np.ones(4, dtype=np.int64), stream)
    assert device.batches_copies
    assert caplog.messages == []


@pytest.mark.parametrize("refuses", [0, 1])
def test_batches_overlap_with_compute_where_the_driver_knows_it(refuses):
    use(replace(CONFIGURATIONS["12.8"], refuses_overlap_flag=refuses))
    device = CUDADevice(CARD)
    assert device._batches._attributes.flags == 1 - refuses
    assert device.limits == ()


def test_nothing_is_left_of_a_trial_that_failed():
    for name in ("cuStreamCreate", "cuMemcpyBatchAsync", "cuStreamSynchronize", "cuMemAlloc_v2"):
        card = use("12.8")
        card.inject(name, 2, last=-1)
        device = CUDADevice(CARD)
        assert not device.batches_copies
        assert left(card) == {}


# -- host memory --


def test_where_registered_memory_has_another_address_no_kernel_and_no_batch_is_given_it():
    card = use("wsl2")
    with Transfers("zero_copy") as transfers:
        assert transfers.offloader._pool.pinned
        transfers.there_and_back()
        stats = transfers.offloader.stats()
    assert set(stats.store.paths) == {"staged"}
    assert named(card, *BATCHES) == []
    assert stats.limits == (
        "registered host memory has another address on the card: no zero_copy, and no batches of "
        "copies",
    )


def test_where_memory_can_not_be_registered_the_pool_is_allocated_pinned():
    card = use("confidential")
    with Transfers("zero_copy") as transfers:
        assert transfers.offloader._pool.pinned
        assert not transfers.offloader._pool.slots.any()
        transfers.there_and_back()
        before = card.num_pageable_copies
        transfers.store()[0].wait(60)
        assert card.num_pageable_copies == before + 1  # which the test made, to look at the cache
        stats = transfers.offloader.stats()
    assert set(stats.load.paths) == {"zero_copy"}
    assert stats.pinned
    (limit,) = stats.limits
    assert "can't be registered (cuMemHostRegister: CUDA_ERROR_NOT_SUPPORTED (801))" in limit
    del transfers
    assert left(card) == {}


def test_where_pinned_memory_is_not_to_be_had_either_the_pool_is_pageable(caplog):
    card = use("confidential")
    card.inject("cuMemHostAlloc", 2)
    with Transfers("zero_copy") as transfers:
        transfers.there_and_back()
        stats = transfers.offloader.stats()
    assert set(stats.load.paths) == {"staged"}
    assert not stats.pinned
    assert "cuMemHostRegister: CUDA_ERROR_NOT_SUPPORTED (801)" in stats.pin_error
    not_had, not_pinned, *_ = caplog.messages
    assert "2097152 bytes of pinned host memory are not to be had: cuMemHostAlloc" in not_had
    assert "could not be pinned" in not_pinned
    del transfers
    assert left(card) == {}


def test_where_no_pinned_memory_is_to_be_had_at_all_that_is_said():
    use("unpinned")
    with pytest.raises(RuntimeError, match="cuMemHostAlloc: CUDA_ERROR_OUT_OF_MEMORY"):
        Transfers()


@pytest.mark.parametrize("machine", ["gb10", "gh200"])
def test_unified_memory_is_known_by_its_attributes(machine):
    card = use(machine)
    with Transfers("zero_copy") as transfers:
        transfers.there_and_back()
        stats = transfers.offloader.stats()
    assert set(stats.load.paths) == {"zero_copy"}
    assert card.complaints() == []
    told = ("the card's memory is the host's: what is offloaded frees none of it",)
    assert stats.limits == (told if machine == "gb10" else ())


def test_a_driver_of_rocm_is_refused_with_the_reason(monkeypatch):
    use("12.8")
    monkeypatch.setattr(torch.version, "hip", "7.2")
    with pytest.raises(
        ValueError, match=r"kv_caches: .* ROCm 7\.2: transfers call the CUDA driver"
    ):
        device_for(CARD)


def test_the_node_of_a_card_is_what_the_driver_says_or_the_system(monkeypatch):
    use(replace(CONFIGURATIONS["12.8"], host_numa_id=3))
    assert CUDADevice(CARD).numa_node == 3
    use(replace(CONFIGURATIONS["12.8"], host_numa_id=-1))
    asked = []
    monkeypatch.setattr(
        "triton_offload.device.cuda.node_of_card", lambda bus_id: asked.append(bus_id) or 5
    )
    assert CUDADevice(CARD).numa_node == 5
    assert len(asked) == 1
    domain, bus, rest = asked[0].split(":")
    assert (len(domain), len(bus), rest) == (4, 2, "00.0")


# -- two cards --


@pytest.mark.parametrize("path", PATHS)
def test_every_thread_and_call_is_in_the_context_of_its_card(path):
    card = use("two devices")
    with Transfers(path, index=1) as transfers:
        torch.cuda.set_device(0)  # the caller works with another one
        first = card.num_calls
        transfers.there_and_back()
        work = [
            call
            for call in card.calls(first)
            if call.name.startswith(("cuEvent", "cuStreamWait", "cuMemcpyBatch", "cuLaunch"))
            and call.stream != 0
        ]
        assert {call.ordinal for call in work} == {1}
        assert torch.cuda.current_device() == 0
    assert card.complaints() == []
    threads = {call.thread for call in card.calls()}
    main = card.calls()[0].thread
    assert {c.ordinal for c in card.calls() if c.thread != main and c.ordinal != -1} == {1}
    assert len(threads) > 1
    retained = named(card, "cuDevicePrimaryCtxRetain")
    assert {call.thread for call in retained} == {main}


def test_the_callers_context_is_as_it_was_after_a_call_that_failed():
    card = use("two devices")
    device = CUDADevice(torch.device("cuda", 1))
    torch.cuda.set_device(0)
    stream, event = device.new_stream("test"), device.new_event()
    host = torch.zeros(4096, dtype=torch.uint8)
    for name, method, arguments in (
        ("cuMemHostRegister_v2", device.register, (host,)),
        ("cuMemAlloc_v2", device.empty, (64,)),
        ("cuEventRecord", device.record, (event, stream)),
        ("cuStreamCreateWithPriority", device.new_stream, ("other",)),
        ("cuEventCreate", device.new_event, ()),
        ("cuEventQuery", device.query, (event,)),
        ("cuMemHostAlloc", device.empty_indices, (8,)),
    ):
        card.inject(name, 304, last=-1)
        with pytest.raises(RuntimeError, match="304"):
            method(*arguments)
        card.clear_injections()
        assert torch.cuda.current_device() == 0
    device.close_stream(stream)
    del event, arguments
    assert left(card) == {}


def test_a_stream_that_torch_does_not_take_is_destroyed(monkeypatch):
    card = use("12.8")
    device = CUDADevice(CARD)

    def refuse(*args):
        raise RuntimeError("injected")

    monkeypatch.setattr(torch.cuda, "ExternalStream", refuse)
    with pytest.raises(RuntimeError, match="injected"):
        device.new_stream("test")
    assert left(card) == {}


def test_streams_are_our_own_and_none_is_left():
    card = use("12.8")
    engine = [torch.cuda.Stream() for _ in range(64)]
    first = card.num_calls
    with Transfers() as transfers:
        transfers.there_and_back(1)
    ours = {call.stream for call in named(card, "cuEventRecord", first=first)} - {0}
    assert len(ours) >= 4
    assert not ours & {stream.cuda_stream for stream in engine}
    made = named(card, "cuStreamCreateWithPriority", first=first)
    destroyed = named(card, "cuStreamDestroy_v2", first=first)
    assert len(made) == 6
    assert len(destroyed) == 6 + 1  # and that of the trial
    del transfers
    assert left(card, first) == {}


def test_registering_asks_the_driver_and_leaves_no_error_for_torch_to_find(monkeypatch):
    use("confidential")
    monkeypatch.setattr(torch.cuda, "cudart", None)
    with Transfers() as transfers:
        transfers.there_and_back(1)
