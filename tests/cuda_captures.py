"""The CUDA device beside a graph capture, which in its default mode forbids all threads to ask
whether work is done (run by tests/test_cuda_imitation.py, on the imitated card)."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch
from cards import Transfers, left, named, use
from cuda.bindings import driver

from triton_offload.calibration import Path
from triton_offload.device.cuda import CUDADevice
from triton_offload.pool.host_pool import HostPool

PATHS = [path.value for path in Path]
CARD = torch.device("cuda", 0)
CAPTURE_ERRORS = [900, 901, 905, 906, 907, 908]


@contextmanager
def capture_elsewhere():
    """Another thread captures, all the while; the capture must come to a good end."""
    begun, enough, failed = threading.Event(), threading.Event(), []

    def capture() -> None:
        try:
            torch.cuda.set_device(0)
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                begun.set()
                enough.wait(60)
        except BaseException as error:
            failed.append(error)
        finally:
            begun.set()

    thread = threading.Thread(target=capture)
    thread.start()
    assert begun.wait(60)
    try:
        yield
    finally:
        enough.set()
        thread.join()
    assert failed == []


@pytest.mark.parametrize("path", PATHS)
def test_jobs_go_on_and_end_while_another_thread_captures(path):
    card = use("12.8")
    with Transfers(path) as transfers:
        done = [transfers.store()]
        before = transfers.cache.cpu()
        with capture_elsewhere():
            for job, _ in done:
                while not job.done:
                    transfers.offloader.get_finished()
            for _ in range(
                3
            ):  # without the cache's own stream, which would be in the capture's way
                transfers.offloader.load([b"1-%d" % i for i in range(12)], range(12)).wait(60)
        assert not torch.equal(transfers.cache.cpu(), before)
        stats = transfers.offloader.stats()
    assert stats.store.failed == stats.load.failed == 0
    assert card.complaints() == []


def test_all_is_made_pinned_and_freed_while_another_thread_captures():
    card = use("12.8")
    with capture_elsewhere():
        first = card.num_calls
        device = CUDADevice(CARD)
        pool = HostPool.allocate(device, 8, 4096)
        pool.wait_ready(60)
        assert pool.pinned
        stream, event = device.new_stream("test"), device.new_event(timed=True)
        memory, ids = device.empty(8192), device.empty_indices(4)
        device.copy(memory, pool.slots.view(-1)[:8192], stream)
        device.record(event, stream)
        device.synchronize(event, None)
        device.close_stream(stream)
        pool.close()
        del event, memory, ids, pool
        assert left(card, first) == {}
    assert card.complaints() == []


@pytest.mark.parametrize("error", CAPTURE_ERRORS)
def test_an_error_of_a_capture_says_nothing_of_the_event(error):
    card = use("12.8")
    device = CUDADevice(CARD)
    stream, event = device.new_stream("test"), device.new_event()
    device.record(event, stream)
    card.inject("cuEventQuery", error, last=2)
    assert not device.query(event)
    card.inject("cuEventSynchronize", error)
    device.synchronize(event, None)  # asks until it is told
    assert device.query(event)
    assert [call.result for call in named(card, "cuEventQuery")][:3] == [error, error, 0]
    device.close_stream(stream)


def test_a_job_follows_the_stream_that_it_names_not_the_current_one():
    use("12.8")
    with Transfers("staged") as transfers:
        free, capturing = torch.cuda.Stream(), torch.cuda.Stream()
        offloader = transfers.offloader
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=capturing):
            with pytest.raises(RuntimeError, match="the current stream captures a graph"):
                offloader.store([b"a"], [1])
            with pytest.raises(RuntimeError, match="stream captures a graph"):
                offloader.store([b"a"], [1], stream=capturing)
            job = offloader.store([b"a"], [1], stream=free)
            job.wait(60)
        assert job.result.success
        with torch.cuda.stream(free), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=capturing):
            pass
        offloader.load([b"a"], [2]).wait(60)


def test_the_legacy_stream_is_in_a_capture_of_one_that_waits_for_it():
    use("12.8")
    device = CUDADevice(CARD)
    legacy = torch.cuda.current_stream()
    blocking = torch.cuda.ExternalStream(int(driver.cuStreamCreate(0)[1]), CARD)
    assert not device.capturing(None)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=blocking):
        assert device.capturing(legacy)
        assert device.capturing(blocking)
        assert not device.capturing(torch.cuda.Stream())
    assert not device.capturing(legacy)


def test_a_question_about_captures_that_fails_is_not_answered():
    card = use("12.8")
    device = CUDADevice(CARD)
    card.inject("cuStreamIsCapturing", 700)
    with pytest.raises(RuntimeError, match="ILLEGAL_ADDRESS"):
        device.capturing(None)


def test_a_thread_that_captures_finds_its_mode_as_it_was():
    use("12.8")
    modes = driver.CUstreamCaptureMode
    device = CUDADevice(CARD)
    event = device.new_event()
    for mode in (modes.CU_STREAM_CAPTURE_MODE_GLOBAL, modes.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL):
        driver.cuThreadExchangeStreamCaptureMode(mode)
        device.query(event)
        assert driver.cuThreadExchangeStreamCaptureMode(mode)[1] == mode
    driver.cuThreadExchangeStreamCaptureMode(modes.CU_STREAM_CAPTURE_MODE_GLOBAL)
