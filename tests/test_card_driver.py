"""The imitated card's driver: what runs when, and what it refuses as the real one does."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from card import build
from card.card import CONFIGURATIONS, Configuration
from card_calls import ANY, DURING_API_CALL, Attributes, Driver, read, write

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.NO_COMPILER)

INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED = 1, 2, 3
INVALID_CONTEXT, INVALID_HANDLE, NOT_FOUND, NOT_READY = 201, 400, 500, 600
ILLEGAL_ADDRESS, ALREADY_REGISTERED, NOT_REGISTERED = 700, 712, 713
LAUNCH_FAILED, NOT_SUPPORTED = 719, 801
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 900, 901
CAPTURE_ISOLATION, CAPTURE_IMPLICIT, CAPTURED_EVENT, WRONG_THREAD = 905, 906, 907, 908
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2
LEGACY, PER_THREAD = 1, 2
NEWEST = CONFIGURATIONS["13.1"]


@pytest.fixture
def driver():
    return Driver(NEWEST).begin()


@pytest.fixture
def elsewhere():
    """Calls a function on a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda function: pool.submit(function).result(60)


# -- contexts --


def test_nothing_works_before_it_is_initialised():
    driver = Driver(NEWEST)
    assert driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == NOT_INITIALIZED
    assert driver.cuInit(1) == INVALID_VALUE


def test_a_context_is_current_to_one_thread_alone(driver, elsewhere):
    made, stream = ctypes.c_uint64(), driver.stream()
    assert elsewhere(lambda: driver.cuMemAlloc_v2(ctypes.byref(made), 16)) == INVALID_CONTEXT
    assert "cuMemAlloc_v2: no context is current to thread" in driver.card.last_complaint
    assert elsewhere(lambda: driver.cuStreamQuery(stream)) == INVALID_CONTEXT
    elsewhere(lambda: driver.use(0))
    assert elsewhere(lambda: driver.cuStreamQuery(stream)) == 0


def test_contexts_are_pushed_and_popped():
    driver = Driver(CONFIGURATIONS["two devices"]).begin()
    second = driver.value("cuDevicePrimaryCtxRetain", 1)
    assert driver.cuCtxPushCurrent_v2(second) == 0
    assert driver.value("cuCtxGetDevice") == 1
    assert driver.value("cuCtxPopCurrent_v2") == second
    assert driver.value("cuCtxGetDevice") == 0
    assert driver.cuCtxSetCurrent(0) == 0
    assert driver.value("cuCtxGetCurrent") == 0
    assert driver.cuCtxPopCurrent_v2(None) == INVALID_CONTEXT
    assert driver.cuCtxSetCurrent(12345) == INVALID_CONTEXT


def test_a_device_that_is_not_there_has_no_context(driver):
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_uint64()), 1) == 101


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [
        ("13.1", 91, 1),  # CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
        ("wsl2", 91, 0),
        ("13.1", 41, 1),  # UNIFIED_ADDRESSING
        ("13.1", 75, 9),  # COMPUTE_CAPABILITY_MAJOR
        ("13.1", 18, 0),  # INTEGRATED
        ("gb10", 18, 1),
        ("gb10", 88, 1),  # PAGEABLE_MEMORY_ACCESS
        ("gh200", 88, 1),
        ("gh200", 18, 0),
        ("13.1", 134, 0),  # HOST_NUMA_ID
        ("13.1", 10, 32),  # WARP_SIZE
    ],
)
def test_a_device_has_its_configurations_attributes(name, attribute, value):
    driver = Driver(CONFIGURATIONS[name]).begin()
    assert driver.value("cuDeviceGetAttribute", attribute, 0) == value


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


# -- memory --


def test_host_memory_is_registered_once_and_given_back_once(driver):
    memory = driver.pageable(4096)
    assert driver.cuMemHostRegister_v2(memory + 64, 1024, 3) == 0
    for start, length in ((64, 1024), (0, 65), (1087, 8), (100, 1)):
        error = driver.cuMemHostRegister_v2(memory + start, length, 3)
        assert error == ALREADY_REGISTERED
    assert driver.cuMemHostRegister_v2(memory, 64, 3) == 0
    assert driver.cuMemHostUnregister(memory + 65) == NOT_REGISTERED
    for start in (0, 64):
        assert driver.cuMemHostUnregister(memory + start) == 0
        assert driver.cuMemHostUnregister(memory + start) == NOT_REGISTERED
    assert driver.cuMemHostRegister_v2(memory, 0, 3) == INVALID_VALUE
    assert driver.cuMemHostRegister_v2(memory, 16, 0x80) == INVALID_VALUE


def test_pinned_memory_is_freed_as_such(driver):
    memory, plain = driver.pinned(bytes(64)), driver.pageable(64)
    assert driver.cuMemHostRegister_v2(memory, 64, 3) == ALREADY_REGISTERED
    assert driver.cuMemHostUnregister(memory) == NOT_REGISTERED
    assert driver.cuMemFree_v2(memory) == INVALID_VALUE
    assert driver.cuMemFreeHost(plain) == INVALID_VALUE
    assert driver.cuMemFreeHost(memory) == 0
    assert driver.cuMemFreeHost(memory) == INVALID_VALUE


@pytest.mark.parametrize("name", ["13.1", "wsl2"])
def test_registered_memory_has_an_address_on_the_device(name):
    driver = Driver(CONFIGURATIONS[name]).begin()
    memory, offset = driver.pageable(64), CONFIGURATIONS[name].registered_offset
    device = ctypes.c_uint64()
    error = driver.cuMemHostGetDevicePointer_v2(ctypes.byref(device), memory, 0)
    assert error == INVALID_VALUE
    assert driver.cuMemHostRegister_v2(memory, 64, 3) == 0
    assert driver.value("cuMemHostGetDevicePointer_v2", memory + 5, 0) == memory + 5 + offset
    assert driver.value("cuPointerGetAttribute", 3, memory + 5) == memory + 5 + offset
    assert driver.value("cuPointerGetAttribute", 2, memory) == 1  # of the host
    assert driver.value("cuPointerGetAttribute", 2, driver.device(8)) == 2
    assert driver.value("cuMemHostGetFlags", memory) == 3


def test_a_copy_takes_either_address_of_registered_memory():
    driver = Driver(CONFIGURATIONS["wsl2"]).begin()
    stream, memory, host = driver.stream(), driver.device(4, 0), driver.pageable(4, 9)
    assert driver.cuMemHostRegister_v2(host, 4, 3) == 0
    driver.copy(memory, host, 2, stream)
    driver.copy(memory + 2, driver.value("cuMemHostGetDevicePointer_v2", host, 0), 2, stream)
    assert driver.card.num_pageable_copies == 0
    assert driver.cuStreamSynchronize(stream) == 0
    assert read(memory, 4) == b"\t" * 4


def test_the_device_s_memory_is_as_large_as_it_is():
    driver = Driver(Configuration(device_bytes=1000)).begin()
    made = ctypes.c_uint64()
    first = driver.device(600)
    assert driver.cuMemAlloc_v2(ctypes.byref(made), 401) == OUT_OF_MEMORY
    assert driver.cuMemFree_v2(first) == 0
    assert driver.cuMemAlloc_v2(ctypes.byref(made), 401) == 0
    total = ctypes.c_uint64()
    assert driver.cuMemGetInfo_v2(ctypes.byref(made), ctypes.byref(total)) == 0
    assert (made.value, total.value) == (599, 1000)


def test_memory_is_freed_in_the_order_of_a_stream(driver):
    stream, other = driver.stream(), driver.stream()
    memory, host = driver.device(8, 1), driver.pinned(bytes(8))
    driver.copy(host, memory, 8, stream)
    assert driver.cuMemFreeAsync(memory, stream) == 0
    assert driver.cuStreamSynchronize(stream) == 0
    assert read(host, 8) == b"\1" * 8
    assert driver.cuMemFreeAsync(memory, stream) == INVALID_VALUE
    driver.copy(early := driver.device(8), host, 8, other)
    assert driver.cuMemFreeAsync(early, stream) == 0  # not ordered after the copy
    assert driver.cuStreamSynchronize(stream) == 0
    assert driver.cuStreamSynchronize(other) == ILLEGAL_ADDRESS


def test_freeing_waits_for_the_device_and_unregistering_does_not(driver):
    stream, memory = driver.stream(), driver.device(8, 0)
    host, plain = driver.pinned(b"x" * 8), driver.pageable(8)
    driver.copy(memory, host, 8, stream)
    assert driver.cuMemFreeHost(host) == 0
    assert read(memory, 8) == b"x" * 8
    assert driver.cuMemHostRegister_v2(plain, 8, 3) == 0
    driver.copy(memory, plain, 8, stream)
    assert driver.cuMemHostUnregister(plain) == 0
    assert driver.cuStreamSynchronize(stream) == ILLEGAL_ADDRESS
    assert "cuMemcpyAsync: the source at" in driver.card.last_complaint
    assert driver.cuMemFree_v2(memory) == ILLEGAL_ADDRESS  # the context is lost


# -- copies --


def test_a_copy_stays_inside_of_what_was_allocated(driver):
    stream, memory, host = driver.stream(), driver.device(16, 0), driver.pinned(bytes(64))
    assert driver.cuMemcpyAsync(memory, host, 16, stream) == 0
    assert driver.cuMemcpyAsync(memory, host, 17, stream) == INVALID_VALUE
    assert "cuMemcpyAsync: the destination of 17 bytes leaves its memory" in (
        driver.card.last_complaint
    )
    assert driver.cuMemcpyAsync(host + 60, memory, 5, stream) == INVALID_VALUE
    assert driver.cuMemsetD8Async(memory + 10, 0, 7, stream) == INVALID_VALUE
    assert driver.cuCtxSynchronize() == 0


def test_rows_move_alone(driver):
    stream, memory = driver.stream(), driver.device(40, 0xA5)
    host = driver.pinned(bytes(range(64)))
    assert driver.copy_rows((memory + 1, 10), (host + 3, 16), 4, 3, stream) == 0
    assert driver.cuStreamSynchronize(stream) == 0
    expected = bytearray(b"\xa5" * 40)
    for row in range(3):
        expected[1 + 10 * row : 5 + 10 * row] = range(3 + 16 * row, 7 + 16 * row)
    assert read(memory, 40) == bytes(expected)
    assert driver.copy_rows((memory, 3), (host, 16), 4, 2, stream) == INVALID_VALUE


def test_rows_and_entries_that_lie_in_two_registrations_are_refused(driver):
    stream, memory, host = driver.stream(), driver.device(256, 0), driver.pageable(256)
    for start in (0, 128):
        assert driver.cuMemHostRegister_v2(host + start, 128, 3) == 0
    assert driver.copy_rows((memory, 64), (host, 64), 16, 2, stream) == 0
    assert driver.copy_rows((memory, 64), (host, 64), 16, 4, stream) == INVALID_VALUE
    assert driver.copy_rows((host, 64), (memory, 64), 16, 4, stream) == INVALID_VALUE
    assert driver.cuMemcpyAsync(memory, host + 120, 16, stream) == INVALID_VALUE
    entries = [(memory, host, 128), (memory, host + 127, 2)]
    assert driver.copy_batch(entries, stream, version=1) == (INVALID_VALUE, 1)
    assert driver.card.num_operations == 0


def test_a_copy_from_pageable_memory_into_registered_is_refused(driver):
    stream, memory, host = driver.stream(), driver.device(256), driver.pageable(256)
    assert driver.cuMemHostRegister_v2(host + 100, 8, 3) == 0
    assert driver.cuMemcpyAsync(memory, host + 90, 10, stream) == 0
    assert driver.cuMemcpyAsync(memory, host + 90, 11, stream) == INVALID_VALUE
    assert driver.cuMemcpyAsync(memory, host, 256, stream) == INVALID_VALUE


def test_a_copy_of_pageable_memory_makes_its_submitter_wait(driver):
    stream, memory, host = driver.stream(), driver.device(8, 0), driver.pageable(8, 4)
    assert driver.cuMemsetD8Async(memory, 1, 8, stream) == 0
    driver.copy(memory, host, 4, stream)
    assert read(memory, 8) == b"\4" * 4 + b"\1" * 4
    driver.copy(host, memory, 8, stream)
    assert read(host, 8) == b"\4" * 4 + b"\1" * 4
    assert driver.card.num_pageable_copies == 2


def test_what_was_never_written_is_copied_as_such(driver):
    """A copy of it is no fault; what a kernel would read of the copy is one."""
    stream, source, target = driver.stream(), driver.device(4), driver.device(4)
    driver.copy(target, source, 4, stream)
    assert driver.cuMemsetD8Async(target, 0, 2, stream) == 0
    function = load(driver, LOAD_BYTE)
    launch(driver, function, stream, target + 1)
    assert driver.cuStreamSynchronize(stream) == 0
    launch(driver, function, stream, target + 2)
    assert driver.cuStreamSynchronize(stream) == ILLEGAL_ADDRESS
    assert "never written" in driver.card.last_complaint


# -- batches --


@pytest.mark.parametrize(("name", "version"), [("12.8", 1), ("12.9", 1), ("13.0", 1), ("13.0", 2)])
def test_a_batch_moves_its_entries(name, version):
    driver = Driver(CONFIGURATIONS[name]).begin()
    stream, memory = driver.stream(), driver.device(16, 0xA5)
    host = driver.pinned(bytes(range(16)))
    entries = [(memory + 1, host + 4, 3), (memory + 8, host, 2)]
    assert driver.copy_batch(entries, stream, version=version)[0] == 0
    assert read(memory, 16) == b"\xa5" * 16
    assert driver.cuStreamSynchronize(stream) == 0
    expected = b"\xa5\4\5\6" + b"\xa5" * 4 + b"\0\1" + b"\xa5" * 6
    assert read(memory, 16) == expected


def test_a_batch_is_no_operation_of_older_drivers():
    for name, version in (("12.4", 1), ("12.4", 2), ("12.9", 2)):
        driver = Driver(CONFIGURATIONS[name]).begin()
        entries = [(driver.device(8), driver.pinned(bytes(8)), 8)]
        assert driver.copy_batch(entries, driver.stream(), version=version)[0] == NOT_SUPPORTED


def test_the_entries_of_a_batch_are_in_no_order():
    found = set()
    for seed in range(20):
        driver = Driver(replace(NEWEST, seed=seed)).begin()
        stream, memory, host = driver.stream(), driver.device(1, 0), driver.pinned(b"\1\2\3")
        entries = [(memory, host + place, 1) for place in range(3)]
        assert driver.copy_batch(entries, stream)[0] == 0
        assert driver.cuStreamSynchronize(stream) == 0
        found.add(read(memory, 1))
    assert found == {b"\1", b"\2", b"\3"}


@pytest.mark.parametrize("order", [DURING_API_CALL, ANY])
def test_a_source_that_needs_no_order_is_read_at_the_call(driver, order):
    stream, memory, host = driver.stream(), driver.device(4, 0), driver.pinned(b"abcd")
    error, _ = driver.copy_batch(
        [(memory, host, 2), (memory + 2, host + 2, 2)],
        stream,
        attributes=[Attributes(order=1), Attributes(order=order)],
        first_entries=[0, 1],
    )
    assert error == 0
    write(host, b"ABCD")
    assert driver.cuStreamSynchronize(stream) == 0
    assert read(memory, 4) == b"ABcd"


@pytest.mark.parametrize(
    ("attributes", "first_entries"),
    [
        ([], []),
        ([Attributes(order=0)], [0]),
        ([Attributes(order=4)], [0]),
        ([Attributes(order=1, flags=2)], [0]),
        ([Attributes(order=1)], [1]),
        ([Attributes(order=1)] * 2, [0, 0]),
        ([Attributes(order=1)] * 2, [0, 2]),
        ([Attributes(order=1)] * 3, [0, 1, 2]),
    ],
)
def test_attributes_of_a_batch_that_make_no_sense_are_refused(driver, attributes, first_entries):
    memory, host, stream = driver.device(4, 0), driver.pinned(bytes(4)), driver.stream()
    entries = [(memory, host, 2), (memory + 2, host + 2, 2)]
    error, _ = driver.copy_batch(
        entries, stream, attributes=attributes, first_entries=first_entries
    )
    assert error == INVALID_VALUE


def test_a_driver_may_know_no_hint_to_overlap():
    for refuses, error in ((0, 0), (1, INVALID_VALUE)):
        driver = Driver(replace(NEWEST, refuses_overlap_flag=refuses)).begin()
        entries = [(driver.device(8), driver.pinned(bytes(8)), 8)]
        hint = [Attributes(order=1, flags=1)]
        assert driver.copy_batch(entries, driver.stream(), attributes=hint)[0] == error


def test_a_batch_needs_a_stream_that_is_not_the_legacy_one_and_entries_with_bytes(driver):
    memory, host, stream = driver.device(4), driver.pinned(bytes(4)), driver.stream()
    for legacy in (0, LEGACY):
        assert driver.copy_batch([(memory, host, 4)], legacy)[0] == INVALID_VALUE
    assert "a batch on the legacy stream" in driver.card.last_complaint
    assert driver.copy_batch([(memory, host, 4), (memory, host, 0)], stream)[0] == INVALID_VALUE
    assert driver.cuStreamBeginCapture_v2(stream, RELAXED) == 0
    assert driver.copy_batch([(memory, host, 4)], stream)[0] == CAPTURE_UNSUPPORTED


# -- captures --


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


# -- launches --

HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n"
STORE_BYTE = (
    HEADER
    + """
.visible .entry kernel(.param .u64 kernel_param_0, .param .u32 kernel_param_1)
.reqntid 32
{
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<2>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b32 %r1, [kernel_param_1];
    mov.u32 %r2, %tid.x;
    setp.eq.b32 %p1, %r2, 0;
    @%p1 st.global.b8 [ %rd1 + 0 ], { %r1 };
    ret;
}
"""
)
LOAD_BYTE = (
    HEADER
    + """
.visible .entry kernel(.param .u64 kernel_param_0)
.reqntid 32
{
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<2>;
    ld.param.b64 %rd1, [kernel_param_0];
    mov.u32 %r2, %tid.x;
    setp.eq.b32 %p1, %r2, 0;
    @%p1 ld.global.b8 { %r1 }, [ %rd1 + 0 ];
    ret;
}
"""
)


def load(driver: Driver, text: str) -> int:
    module = driver.value("cuModuleLoadData", text.encode())
    return driver.value("cuModuleGetFunction", module, b"kernel")


def launch(driver: Driver, function: int, stream: int, *values: int, threads: int = 32) -> int:
    # The arguments' memory is the caller's again when this returns.
    arguments = [ctypes.c_uint64(value) for value in values]
    pointers = (ctypes.c_void_p * max(1, len(values)))(*map(ctypes.addressof, arguments))
    shape = (1, 1, 1, threads, 1, 1, 0)
    error = driver.cuLaunchKernel(function, *shape, stream, pointers, None)
    for argument in arguments:
        argument.value = 0
    return error


def test_a_kernel_runs_in_the_order_of_its_stream_with_the_arguments_of_the_call(driver):
    stream, memory = driver.stream(), driver.device(4, 0)
    function = load(driver, STORE_BYTE)
    assert launch(driver, function, stream, memory + 1, 42) == 0
    assert read(memory, 4) == bytes(4)
    assert driver.cuStreamSynchronize(stream) == 0
    assert read(memory, 4) == b"\0\x2a\0\0"
    ((name, counters),) = driver.card.launches()
    assert (name, counters.bytes_written) == ("kernel", 1)


def test_a_kernel_that_writes_where_nothing_is_loses_the_context(driver):
    stream, other, memory = driver.stream(), driver.stream(), driver.device(4, 0)
    function = load(driver, STORE_BYTE)
    assert driver.cuMemsetD8Async(memory, 1, 1, other) == 0
    assert launch(driver, function, stream, memory + 4, 42) == 0
    assert driver.cuStreamSynchronize(stream) == ILLEGAL_ADDRESS
    complaint = driver.card.last_complaint
    assert complaint.startswith("cuLaunchKernel: ")
    assert "st.global" in complaint
    for error in (
        driver.cuStreamQuery(other),
        driver.cuMemsetD8Async(memory, 1, 1, other),
        driver.cuCtxSynchronize(),
        driver.cuEventCreate(ctypes.byref(ctypes.c_uint64()), 0),
    ):
        assert error == ILLEGAL_ADDRESS
    assert read(memory, 1) == b"\0"  # nothing runs there any more
    assert driver.value("cuCtxGetDevice") == 0


def test_a_launch_that_can_t_be_is_refused_at_the_call(driver):
    stream, function = driver.stream(), load(driver, STORE_BYTE)
    module = driver.value("cuModuleLoadData", STORE_BYTE.encode())
    found = ctypes.c_uint64()
    assert driver.cuModuleGetFunction(ctypes.byref(found), module, b"other") == NOT_FOUND
    assert driver.cuModuleLoadData(ctypes.byref(found), b"\x7fELF" + bytes(60)) == 209
    assert driver.cuModuleLoadData(ctypes.byref(found), b"no PTX") == 218
    assert launch(driver, function, stream, 0, 0, threads=64) == INVALID_VALUE
    assert launch(driver, function, stream, 0, 0, threads=0) == INVALID_VALUE
    assert launch(driver, 12345, stream, 0, 0) == INVALID_HANDLE
    assert driver.cuModuleUnload(module) == 0
    assert driver.cuModuleUnload(module) == INVALID_HANDLE
    assert driver.value("cuFuncGetAttribute", 0, function) == 32  # the threads it was made for


def test_a_module_that_is_unloaded_while_its_kernel_is_queued_still_runs(driver):
    stream, memory = driver.stream(), driver.device(4, 0)
    module = driver.value("cuModuleLoadData", STORE_BYTE.encode())
    function = driver.value("cuModuleGetFunction", module, b"kernel")
    assert launch(driver, function, stream, memory, 3) == 0
    assert driver.cuModuleUnload(module) == 0
    assert launch(driver, function, stream, memory, 4) == INVALID_HANDLE
    assert driver.cuStreamSynchronize(stream) == 0
    assert read(memory, 1) == b"\3"


def test_a_kernel_runs_on_the_device_that_it_was_loaded_for():
    driver = Driver(CONFIGURATIONS["two devices"]).begin()
    function, memory = load(driver, STORE_BYTE), driver.device(4, 0)
    driver.use(1)
    assert launch(driver, function, driver.stream(), memory, 1) == INVALID_HANDLE
    stream = driver.stream()
    assert launch(driver, load(driver, STORE_BYTE), stream, memory, 1) == 0
    assert driver.cuStreamSynchronize(stream) == ILLEGAL_ADDRESS
    assert "of device 0, not of device 1" in driver.card.last_complaint


# -- entry points --


def find(driver: Driver, name: str, version: int) -> tuple[int, int]:
    """The address, and how the search went."""
    found, how = ctypes.c_uint64(1), ctypes.c_int(-1)
    driver.cuGetProcAddress_v2(name.encode(), ctypes.byref(found), version, 0, ctypes.byref(how))
    return found.value, how.value


def address(driver: Driver, name: str) -> int:
    return ctypes.cast(driver.card.entry(name), ctypes.c_void_p).value or 0


def test_an_entry_point_is_found_by_the_version_that_is_asked_for():
    first, second = "cuMemcpyBatchAsync", "cuMemcpyBatchAsync_v2"
    wanted = {
        ("12.4", 12040): None,
        ("12.4", 12080): None,
        ("12.8", 12080): first,
        ("12.8", 13000): None,  # newer than the driver: nothing at all is found
        ("13.0", 12080): first,
        ("13.0", 13000): second,
        ("13.1", 13010): second,
        ("13.1", 12040): None,  # older than the function
    }
    for (name, version), symbol in wanted.items():
        driver = Driver(CONFIGURATIONS[name])
        expected = address(driver, symbol) if symbol else 0
        assert find(driver, first, version)[0] == expected, (name, version)


def test_what_is_not_found_is_noted_and_is_no_failure(driver):
    assert find(driver, "cuNoSuchThing", 12000) == (0, 1)
    assert find(driver, "cuMemcpyBatchAsync", 12040) == (0, 2)
    assert find(driver, "cuMemAlloc", 12000) == (address(driver, "cuMemAlloc_v2"), 0)
    assert driver.card.complaints() == []
    assert driver.card.not_found()[0] == "cuNoSuchThing of CUDA 12000 is not there"


# -- systems that allow less --


def test_confidential_computing_registers_nothing_and_pins_what_it_allocates():
    driver = Driver(CONFIGURATIONS["confidential"]).begin()
    assert driver.cuMemHostRegister_v2(driver.pageable(64), 64, 3) == NOT_SUPPORTED
    memory, host, stream = driver.device(4), driver.pinned(b"abcd"), driver.stream()
    driver.copy(memory, host, 4, stream)
    assert driver.card.num_pageable_copies == 0


def test_a_system_may_pin_nothing_at_all():
    driver = Driver(CONFIGURATIONS["unpinned"]).begin()
    assert driver.cuMemHostRegister_v2(driver.pageable(64), 64, 3) == NOT_SUPPORTED
    made = ctypes.c_uint64()
    assert driver.cuMemHostAlloc(ctypes.byref(made), 64, 0) == OUT_OF_MEMORY
    assert driver.cuMemAllocHost_v2(ctypes.byref(made), 64) == OUT_OF_MEMORY


# -- what tests ask for, and read --


def test_calls_fail_as_a_test_says(driver):
    driver.card.inject("cuEventCreate", 2)
    driver.card.inject("cuStreamCreate", 304, first=2, last=-1)
    made = ctypes.c_uint64()
    events = [driver.cuEventCreate(ctypes.byref(made), 0) for _ in range(3)]
    streams = [driver.cuStreamCreate(ctypes.byref(made), 1) for _ in range(4)]
    assert (events, streams) == ([2, 0, 0], [0, 304, 304, 304])
    driver.card.clear_injections()
    assert driver.cuStreamCreate(ctypes.byref(made), 1) == 0


def test_an_operation_fails_when_it_runs_and_takes_the_context_along(driver):
    stream, memory, event = driver.stream(), driver.device(3, 0), driver.event()
    driver.card.inject_operation(2, LAUNCH_FAILED)
    for place in range(3):
        assert driver.cuMemsetD8Async(memory + place, 1, 1, stream) == 0
        assert driver.cuEventRecord(event, stream) == 0
    assert driver.cuEventSynchronize(event) == LAUNCH_FAILED
    assert read(memory, 3) == b"\1\0\0"
    assert driver.cuEventQuery(event) == LAUNCH_FAILED
    assert driver.cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), 16) == LAUNCH_FAILED
    assert driver.card.complaints()[0] == "cuMemsetD8Async: injected"


def test_every_call_is_noted(driver, elsewhere):
    stream, before = driver.stream(), driver.card.num_calls
    driver.cuStreamQuery(stream)
    elsewhere(lambda: driver.cuStreamSynchronize(stream))
    first, second = driver.card.calls(before)
    assert (first.name, first.stream, first.ordinal, first.result) == (
        "cuStreamQuery",
        stream,
        0,
        0,
    )
    assert (second.name, second.ordinal, second.result) == (
        "cuStreamSynchronize",
        -1,
        INVALID_CONTEXT,
    )
    assert first.thread != second.thread


def test_a_card_that_is_reset_knows_nothing_of_the_one_before(driver):
    stream, memory = driver.stream(), driver.device(8, 0)
    assert driver.cuMemsetD8Async(memory, 1, 1, stream) == 0
    again = Driver(NEWEST)
    assert again.card.num_calls == 0
    again.begin()
    assert again.cuStreamQuery(stream) == INVALID_HANDLE
    assert again.cuMemFree_v2(memory) == INVALID_VALUE
    assert again.card.num_operations == 0
