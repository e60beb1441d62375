"""The imitated driver's streams and events: what runs when."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from card import build
from card.card import CONFIGURATIONS
from card_calls import (
    ILLEGAL_ADDRESS,
    INVALID_HANDLE,
    LEGACY,
    NEWEST,
    NOT_READY,
    PER_THREAD,
    Driver,
    read,
    write,
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


# -- when work runs --


def test_nothing_runs_at_the_call_and_all_that_was_queued_when_the_host_waits(driver):
    stream, memory = driver.stream(), driver.device(16, 0)
    source = driver.pinned(b"a" * 16)
    driver.copy(memory, source, 16, stream)
    assert read(memory, 16) == bytes(16)
    write(source, b"b" * 16)  # it is read when the copy runs
    assert driver.cuStreamSynchronize(stream) == 0
    assert read(memory, 16) == b"b" * 16


def test_waiting_for_a_stream_runs_no_other(driver):
    first, second, memory = driver.stream(), driver.stream(), driver.device(2, 0)
    assert driver.cuMemsetD8Async(memory, 1, 1, first) == 0
    assert driver.cuMemsetD8Async(memory + 1, 2, 1, second) == 0
    assert driver.cuStreamSynchronize(second) == 0
    assert read(memory, 2) == b"\0\2"
    assert driver.cuCtxSynchronize() == 0
    assert read(memory, 2) == b"\1\2"


def test_waiting_for_an_event_runs_its_stream_up_to_its_latest_record(driver):
    stream, event, memory = driver.stream(), driver.event(), driver.device(3, 0)
    for place in range(3):
        assert driver.cuMemsetD8Async(memory + place, 7, 1, stream) == 0
        if place < 2:
            assert driver.cuEventRecord(event, stream) == 0
    assert driver.cuEventSynchronize(event) == 0
    assert read(memory, 3) == b"\7\7\0"


def test_a_stream_that_waits_runs_after_what_it_waits_for(driver):
    first, second, event = driver.stream(), driver.stream(), driver.event()
    memory, target = driver.device(1, 0), driver.device(1, 0)
    assert driver.cuStreamWaitEvent(second, event, 0) == 0  # never recorded: holds nothing up
    assert driver.cuMemsetD8Async(memory, 5, 1, first) == 0
    assert driver.cuEventRecord(event, first) == 0
    assert driver.cuStreamWaitEvent(second, event, 0) == 0
    assert driver.cuMemsetD8Async(memory, 6, 1, first) == 0
    assert driver.cuEventRecord(event, first) == 0  # after the wait, which it does not change
    driver.copy(target, memory, 1, second)
    assert driver.cuStreamSynchronize(second) == 0
    assert read(target, 1) == b"\5"


def test_a_query_runs_one_operation_and_answers(driver):
    stream, event, memory = driver.stream(), driver.event(), driver.device(2, 0)
    assert driver.cuEventQuery(event) == 0  # never recorded
    assert driver.cuMemsetD8Async(memory, 1, 1, stream) == 0
    assert driver.cuMemsetD8Async(memory + 1, 1, 1, stream) == 0
    assert driver.cuEventRecord(event, stream) == 0
    assert driver.cuEventQuery(event) == NOT_READY
    assert read(memory, 2) == b"\1\0"
    assert driver.cuStreamQuery(stream) == NOT_READY
    assert read(memory, 2) == b"\1\1"
    assert driver.cuEventQuery(event) == 0
    assert driver.cuStreamQuery(stream) == 0
    assert driver.card.last_complaint == ""


def test_no_query_runs_what_still_waits():
    for seed in range(20):
        driver = Driver(replace(NEWEST, seed=seed)).begin()
        first, second, event = driver.stream(), driver.stream(), driver.event()
        memory, target = driver.device(1, 0), driver.device(1, 0)
        assert driver.cuMemsetD8Async(memory, 5, 1, first) == 0
        assert driver.cuEventRecord(event, first) == 0
        assert driver.cuStreamWaitEvent(second, event, 0) == 0
        driver.copy(target, memory, 1, second)
        while driver.cuStreamQuery(second) == NOT_READY:
            pass
        assert read(target, 1) == b"\5"


def order_of_two_streams(seed: int) -> bytes:
    """Which of two streams, that nothing orders, runs first."""
    driver = Driver(replace(NEWEST, seed=seed)).begin()
    memory, idle = driver.device(1, 0), driver.stream()
    for value, stream in enumerate((driver.stream(), driver.stream()), 1):
        assert driver.cuMemsetD8Async(memory, value, 1, stream) == 0
    driver.cuStreamQuery(idle)
    return read(memory, 1)


def test_what_nothing_orders_runs_as_the_seed_has_it():
    found = [order_of_two_streams(seed) for seed in range(20)]
    assert set(found) == {b"\1", b"\2"}
    assert found == [order_of_two_streams(seed) for seed in range(20)]


@pytest.mark.parametrize(("flags", "in_step"), [(0, True), (1, False)])
def test_the_legacy_stream_is_in_step_with_blocking_streams_alone(driver, flags, in_step):
    stream, memory = driver.stream(flags), driver.device(1, 0)
    assert driver.cuMemsetD8Async(memory, 1, 1, stream) == 0
    assert driver.cuMemsetD8Async(memory, 2, 1, LEGACY) == 0
    assert driver.cuStreamSynchronize(0) == 0
    assert driver.cuStreamSynchronize(stream) == 0
    assert read(memory, 1) == (b"\2" if in_step else b"\1")
    assert driver.cuMemsetD8Async(memory, 3, 1, 0) == 0
    assert driver.cuMemsetD8Async(memory, 4, 1, stream) == 0
    assert driver.cuStreamSynchronize(stream) == 0
    assert driver.cuStreamSynchronize(0) == 0
    assert read(memory, 1) == (b"\4" if in_step else b"\3")


def test_a_thread_has_a_default_stream_of_its_own(driver, elsewhere):
    memory = driver.device(2, 0)
    elsewhere(lambda: driver.use(0))
    assert driver.cuMemsetD8Async(memory, 1, 1, PER_THREAD) == 0
    assert elsewhere(lambda: driver.cuMemsetD8Async(memory + 1, 2, 1, PER_THREAD)) == 0
    assert driver.cuStreamSynchronize(PER_THREAD) == 0
    assert read(memory, 2) == b"\1\0"


def test_a_stream_that_is_destroyed_while_busy_still_runs(driver):
    stream, memory, event = driver.stream(), driver.device(1, 0), driver.event()
    assert driver.cuMemsetD8Async(memory, 1, 1, stream) == 0
    assert driver.cuEventRecord(event, stream) == 0
    assert driver.cuStreamDestroy_v2(stream) == 0
    assert driver.cuStreamQuery(stream) == INVALID_HANDLE
    assert read(memory, 1) == b"\0"
    assert driver.cuEventSynchronize(event) == 0
    assert read(memory, 1) == b"\1"
    assert driver.cuStreamDestroy_v2(LEGACY) == INVALID_HANDLE


def test_priorities_are_clamped_to_their_range(driver):
    for wanted, given in ((-1, -1), (-9, -5), (3, 0)):
        stream = driver.value("cuStreamCreateWithPriority", 1, wanted)
        found = ctypes.c_int()
        assert driver.cuStreamGetPriority(stream, ctypes.byref(found)) == 0
        assert found.value == given


def test_events_tell_the_time_between_them_where_they_were_made_to(driver):
    stream, start, end, timeless = (
        driver.stream(),
        driver.event(),
        driver.event(),
        driver.event(flags=2),
    )
    elapsed = ctypes.c_float(-1)
    for event in (start, end, timeless):
        assert driver.cuEventRecord(event, stream) == 0
    assert driver.cuEventElapsedTime(ctypes.byref(elapsed), start, end) == NOT_READY
    assert driver.cuStreamSynchronize(stream) == 0
    assert driver.cuEventElapsedTime(ctypes.byref(elapsed), start, end) == 0
    assert 0 <= elapsed.value < 60_000
    error = driver.cuEventElapsedTime(ctypes.byref(elapsed), start, timeless)
    assert error == INVALID_HANDLE
    assert driver.cuEventDestroy_v2(start) == 0
    assert driver.cuEventQuery(start) == INVALID_HANDLE


# -- two devices --


def test_work_and_records_on_a_stream_of_another_device_are_refused_and_waits_are_not():
    driver = Driver(CONFIGURATIONS["two devices"]).begin()
    stream, event, memory = driver.stream(), driver.event(), driver.device(4, 0)
    driver.use(1)
    other, other_event = driver.stream(), driver.event()
    assert driver.cuMemsetD8Async(memory, 1, 1, stream) == INVALID_HANDLE
    assert "is of device 0, while device 1's context is current" in driver.card.last_complaint
    assert driver.cuMemcpyAsync(memory, memory + 2, 2, stream) == INVALID_HANDLE
    assert driver.copy_batch([(memory, memory + 2, 2)], stream, version=1)[0] == INVALID_HANDLE
    assert driver.cuEventRecord(event, stream) == INVALID_HANDLE
    assert driver.cuEventRecord(event, other) == INVALID_HANDLE
    assert driver.cuEventRecord(other_event, other) == 0
    assert driver.cuStreamWaitEvent(stream, other_event, 0) == 0
    assert driver.cuStreamSynchronize(stream) == 0
    assert driver.cuEventQuery(other_event) == 0


def test_memory_of_a_device_is_another_one_s_to_copy_and_not_to_fill():
    driver = Driver(CONFIGURATIONS["two devices"]).begin()
    first = driver.device(4, 7)
    driver.use(1)
    second, stream = driver.device(4, 0), driver.stream()
    driver.copy(second, first, 4, stream)
    assert driver.cuStreamSynchronize(stream) == 0
    assert read(second, 4) == b"\7" * 4
    assert driver.cuMemsetD8Async(first, 1, 4, stream) == 0
    assert driver.cuStreamSynchronize(stream) == ILLEGAL_ADDRESS
    driver.use(0)
    assert driver.cuCtxSynchronize() == 0  # the other context is as it was
