"""The imitated driver's batches of copies."""

from __future__ import annotations

from dataclasses import replace

import pytest
from card import build
from card.card import CONFIGURATIONS
from card_calls import (
    ANY,
    CAPTURE_UNSUPPORTED,
    DURING_API_CALL,
    INVALID_VALUE,
    LEGACY,
    NEWEST,
    NOT_SUPPORTED,
    RELAXED,
    Attributes,
    Driver,
    read,
    write,
)

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.NO_COMPILER)


@pytest.fixture
def driver():
    return Driver(NEWEST).begin()


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
