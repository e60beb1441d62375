"""The imitated driver's captures of graphs: what they forbid, and to whom."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
from card import build
from card_calls import (
    CAPTURE_IMPLICIT,
    CAPTURE_INVALIDATED,
    CAPTURE_ISOLATION,
    CAPTURE_UNSUPPORTED,
    CAPTURED_EVENT,
    GLOBAL,
    LEGACY,
    NEWEST,
    NOT_READY,
    RELAXED,
    THREAD_LOCAL,
    WRONG_THREAD,
    Driver,
    read,
)

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.NO_COMPILER)


@pytest.fixture
def driver():
    return Driver(NEWEST).begin()


@pytest.fixture
def elsewhere():
    """Calls a function on a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda function: pool.submit(function).result(60)


def status(driver: Driver, stream: int) -> int:
    found = ctypes.c_int()
    assert driver.cuStreamIsCapturing(stream, ctypes.byref(found)) == 0
    return found.value


def end(driver: Driver, stream: int) -> int:
    return driver.cuStreamEndCapture(stream, ctypes.byref(ctypes.c_uint64()))


def test_what_is_captured_does_not_run(driver):
    stream, other, event = driver.stream(), driver.stream(), driver.event()
    memory = driver.device(1, 0)
    assert driver.cuStreamBeginCapture_v2(stream, GLOBAL) == 0
    assert driver.cuMemsetD8Async(memory, 1, 1, stream) == 0
    assert driver.cuEventRecord(event, stream) == 0
    assert driver.cuStreamWaitEvent(other, event, 0) == 0  # now it captures, too
    assert (status(driver, stream), status(driver, other)) == (1, 1)
    assert driver.cuMemsetD8Async(memory, 2, 1, other) == 0
    assert end(driver, stream) == 0
    assert (status(driver, stream), status(driver, other)) == (0, 0)
    assert driver.cuCtxSynchronize() == 0
    assert read(memory, 1) == b"\0"
    assert driver.cuEventQuery(event) == CAPTURED_EVENT


def test_a_graph_has_no_copies_of_pageable_memory(driver):
    stream, memory, host = driver.stream(), driver.device(8, 0), driver.pinned(bytes(8))
    assert driver.cuStreamBeginCapture_v2(stream, GLOBAL) == 0
    assert driver.cuMemcpyAsync(memory, host, 8, stream) == 0
    assert driver.cuMemcpyAsync(memory, driver.pageable(8), 8, stream) == CAPTURE_UNSUPPORTED
    assert end(driver, stream) == CAPTURE_INVALIDATED
    assert driver.card.num_operations == 0


CALLS_THAT_CAPTURES_FORBID = {
    "event query": lambda driver, event, stream: driver.cuEventQuery(event),
    "event wait": lambda driver, event, stream: driver.cuEventSynchronize(event),
    "stream query": lambda driver, event, stream: driver.cuStreamQuery(stream),
    "stream wait": lambda driver, event, stream: driver.cuStreamSynchronize(stream),
    "context wait": lambda driver, event, stream: driver.cuCtxSynchronize(),
    "registration": lambda driver, event, stream: driver.cuMemHostRegister_v2(
        driver.pageable(64), 64, 3
    ),
    "allocation": lambda driver, event, stream: driver.cuMemAlloc_v2(
        ctypes.byref(ctypes.c_uint64()), 16
    ),
}


@pytest.mark.parametrize("call", CALLS_THAT_CAPTURES_FORBID)
def test_a_global_capture_is_spoilt_by_unsafe_calls_of_any_thread(driver, elsewhere, call):
    stream, other, event = driver.stream(), driver.stream(), driver.event()
    forbidden = CALLS_THAT_CAPTURES_FORBID[call]
    assert driver.cuEventRecord(event, other) == 0

    def on_another_thread():
        driver.use(0)
        return forbidden(driver, event, other)

    assert driver.cuStreamBeginCapture_v2(stream, GLOBAL) == 0
    assert elsewhere(on_another_thread) == CAPTURE_UNSUPPORTED
    assert "not permitted while a graph is captured" in driver.card.last_complaint
    assert status(driver, stream) == 2
    assert driver.cuEventRecord(driver.event(), stream) == CAPTURE_INVALIDATED
    assert end(driver, stream) == CAPTURE_INVALIDATED
    assert elsewhere(on_another_thread) in (0, NOT_READY)


@pytest.mark.parametrize("call", CALLS_THAT_CAPTURES_FORBID)
def test_a_thread_in_relaxed_mode_spoils_nothing(driver, elsewhere, call):
    stream, other, event = driver.stream(), driver.stream(), driver.event()
    assert driver.cuEventRecord(event, other) == 0
    assert driver.cuStreamBeginCapture_v2(stream, GLOBAL) == 0

    def on_another_thread():
        driver.use(0)
        mode = ctypes.c_int(RELAXED)
        assert driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == 0
        assert mode.value == GLOBAL
        return CALLS_THAT_CAPTURES_FORBID[call](driver, event, other)

    assert elsewhere(on_another_thread) in (0, NOT_READY)
    assert end(driver, stream) == 0


@pytest.mark.parametrize(("mode", "own"), [(THREAD_LOCAL, CAPTURE_UNSUPPORTED), (RELAXED, 0)])
def test_a_capture_of_one_thread_is_spoilt_by_that_thread_alone(driver, elsewhere, mode, own):
    stream, other = driver.stream(), driver.stream()
    elsewhere(lambda: driver.use(0))
    assert driver.cuStreamBeginCapture_v2(stream, mode) == 0
    assert elsewhere(lambda: driver.cuStreamQuery(other)) == 0
    assert driver.cuStreamQuery(other) == own
    assert end(driver, stream) == (CAPTURE_INVALIDATED if own else 0)


def test_the_stream_that_captures_can_t_be_asked_in_any_mode(driver):
    stream = driver.stream()
    assert driver.cuStreamBeginCapture_v2(stream, RELAXED) == 0
    assert driver.cuStreamQuery(stream) == CAPTURE_UNSUPPORTED
    assert end(driver, stream) == CAPTURE_INVALIDATED


def test_a_capture_depends_on_nothing_of_outside(driver):
    stream, event = driver.stream(), driver.event()
    assert driver.cuEventRecord(event, driver.stream()) == 0
    assert driver.cuStreamBeginCapture_v2(stream, GLOBAL) == 0
    assert driver.cuStreamWaitEvent(stream, event, 0) == CAPTURE_ISOLATION
    assert end(driver, stream) == CAPTURE_INVALIDATED


def test_the_legacy_stream_does_not_go_with_the_capture_of_a_blocking_one(driver):
    stream, memory = driver.stream(flags=0), driver.device(1)
    assert driver.cuStreamBeginCapture_v2(LEGACY, GLOBAL) == CAPTURE_UNSUPPORTED
    assert driver.cuStreamBeginCapture_v2(stream, GLOBAL) == 0
    assert driver.cuMemsetD8Async(memory, 1, 1, 0) == CAPTURE_IMPLICIT
    assert end(driver, stream) == CAPTURE_INVALIDATED


def test_a_capture_ends_on_the_thread_where_it_began(driver, elsewhere):
    stream = driver.stream()
    elsewhere(lambda: driver.use(0))
    assert driver.cuStreamBeginCapture_v2(stream, GLOBAL) == 0
    assert elsewhere(lambda: end(driver, stream)) == WRONG_THREAD
    assert end(driver, stream) == CAPTURE_INVALIDATED
