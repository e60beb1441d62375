"""Sizes in bytes: every byte of what was written, and integers of numpy."""

from __future__ import annotations

import numpy as np
import pytest

from triton_offload.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("7B", 7),
        ("16K", 16 << 10),
        ("16kib", 16 << 10),
        ("16 KB", 16_000),
        ("1.5GiB", 3 << 29),
        ("2TB", 2 * 10**12),
        ("2T", 2 << 40),
        ("9007199254740993", 2**53 + 1),
        ("8191.000000000001TiB", 8191 * 2**40 + 1),
        ("1.001KB", 1001),
        ("2.3KB", 2300),
        ("8.7MB", 8_700_000),
        ("1.0005KiB", 1024),
    ],
)
def test_no_byte_is_lost(text, size):
    assert parse_bytes("size", text) == size


@pytest.mark.parametrize("value", [0, 5, np.int64(5), np.uint8(5)], ids=repr)
def test_integers_of_numpy_are_sizes(value):
    size = parse_bytes("size", value)
    assert (type(size), size) == (int, int(value))


@pytest.mark.parametrize(
    "value",
    [
        -1,
        np.int64(-1),
        True,
        1.0,
        np.float64(1),
        None,
        [1],
        "",
        "GiB",
        "-1",
        "1 PiB",
        "1e3",
        "1GiBs",
        "1.5.5",
        "1GiB 2",
    ],
    ids=repr,
)
def test_what_is_no_size_is_refused_by_the_name_of_the_argument(value):
    with pytest.raises(
        ValueError, match=r'^host_bytes: expected a number of bytes, or one like "8GiB"'
    ):
        parse_bytes("host_bytes", value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        (-(1 << 20), "-1.0 MiB"),
        (1 << 30, "1.0 GiB"),
        (np.int64(1 << 40), "1.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_a_size_is_shown_in_the_largest_unit_of_which_there_is_one(size, text):
    assert format_bytes(size) == text
