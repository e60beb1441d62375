"""The imitated driver: contexts, launches, entry points, and what tests ask of it."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
from card import build
from card.card import CONFIGURATIONS
from card_calls import (
    ILLEGAL_ADDRESS,
    INVALID_CONTEXT,
    INVALID_HANDLE,
    INVALID_VALUE,
    LAUNCH_FAILED,
    NEWEST,
    NOT_FOUND,
    NOT_INITIALIZED,
    NOT_SUPPORTED,
    OUT_OF_MEMORY,
    STORE_BYTE,
    Driver,
    launch,
    load,
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


# -- launches --


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
    assert [name for name, _ in driver.card.launches()] == ["kernel"]


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


def test_a_call_that_nobody_makes_can_t_be_made_to_fail(driver):
    with pytest.raises(AttributeError, match="cuMemFree"):
        driver.card.inject("cuMemFree", 1)


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
