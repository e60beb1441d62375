"""The imitated driver's memory, and copies of it: what they may touch."""

from __future__ import annotations

import ctypes

import pytest
from card import build
from card.card import CONFIGURATIONS, Configuration
from card_calls import (
    ALREADY_REGISTERED,
    ILLEGAL_ADDRESS,
    INVALID_VALUE,
    LOAD_BYTE,
    NEWEST,
    NOT_REGISTERED,
    OUT_OF_MEMORY,
    Driver,
    launch,
    load,
    read,
)

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.NO_COMPILER)


@pytest.fixture
def driver():
    return Driver(NEWEST).begin()


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
