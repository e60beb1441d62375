"""Which blocks lie in which chunk, and how a store of some of them is cut into runs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_offload.scheduler.chunks import ChunkSpan, StoreRun, positions, runs_to_store


@settings(deadline=None)
@given(first=st.integers(0, 20), count=st.integers(0, 20), size=st.integers(1, 7))
def test_the_masks_of_a_span_are_its_blocks(first: int, count: int, size: int) -> None:
    span = ChunkSpan.of(first, count, size)
    assert span == ChunkSpan(first % size, count, size)
    blocks = [(first % size + i) for i in range(count)]
    chunks = [[block % size for block in blocks if block // size == i] for i in range(40)]
    expected = [sum(1 << position for position in chunk) for chunk in chunks if chunk]
    assert span.masks() == expected
    assert span.num_chunks == len(expected)
    assert not count or span.is_whole == (set(expected) == {(1 << size) - 1})


@settings(deadline=None)
@given(
    first=st.integers(0, 6),
    count=st.integers(0, 20),
    size=st.integers(1, 5),
    dice=st.randoms(use_true_random=False),
)
def test_the_runs_of_a_store_are_its_blocks_each_once_and_as_few_as_can_be(
    first: int, count: int, size: int, dice: Any
) -> None:
    span = ChunkSpan.of(first, count, size)
    wanted = {i: mask & dice.getrandbits(size) for i, mask in enumerate(span.masks())}
    wanted = {i: mask for i, mask in wanted.items() if mask}
    chunks, masks = list(wanted), list(wanted.values())
    runs = runs_to_store(span, chunks, masks)
    ids, places = np.arange(count), np.arange(len(chunks))
    seen = []
    for run in runs:
        slots, blocks = places[run.chunks], ids[run.blocks]
        assert len(slots) == -(-(run.first + len(blocks)) // size)
        for i, block in enumerate(blocks):
            chunk = chunks[slots[(run.first + i) // size]]
            position = (run.first + i) % size
            assert block == chunk * size + position - span.first
            seen.append((chunk, position))
    expected = [(i, p) for i, mask in wanted.items() for p in range(size) if mask >> p & 1]
    assert seen == expected
    # Two stored blocks are in one run where they follow each other, in one chunk or over its end.
    places_in_order = [(chunks.index(chunk), position) for chunk, position in expected]
    joined = sum(
        (j, q) in ((i, p + 1), (i + 1, p + 1 - size)) and (i == j or (p == size - 1 and q == 0))
        for (i, p), (j, q) in pairwise(places_in_order)
    )
    assert len(runs) == len(expected) - joined


def test_a_whole_store_is_one_run_of_everything() -> None:
    span = ChunkSpan.of(3, 5, 4)
    assert runs_to_store(span, [0, 1], span.masks()) == [StoreRun(slice(None), 3, slice(None))]
    assert runs_to_store(span, [], []) == []
    assert runs_to_store(ChunkSpan.of(3, 0, 4), [], []) == []
    assert runs_to_store(span, [0, 1], [0b1000, 0b0101]) == [
        StoreRun([0, 1], 3, [0, 1]),
        StoreRun([3], 2, [1]),
    ]


def test_numpy_s_integers_are_integers() -> None:
    span = ChunkSpan.of(np.int64(65), np.int32(64), np.int64(64))
    assert span == ChunkSpan(1, 64, 64)
    assert {type(n) for n in (span.first, span.num_blocks, span.blocks_per_chunk)} == {int}
    assert span.masks() == [(1 << 64) - 2, 1]


@pytest.mark.parametrize(
    "bad", [-1, np.int64(-1), 1.0, np.float32(1), None, True, np.bool_(1), "1"]
)
@pytest.mark.parametrize("name", ["first_block", "num_blocks", "blocks_per_chunk"])
def test_what_is_no_integer_is_named(bad: Any, name: str) -> None:
    arguments = {"first_block": 0, "num_blocks": 1, "blocks_per_chunk": 2, name: bad}
    with pytest.raises(ValueError, match=rf"^{name}: expected an integer of at least [01], got"):
        ChunkSpan.of(**arguments)


def test_a_chunk_has_a_block() -> None:
    with pytest.raises(ValueError, match=r"blocks_per_chunk: expected .* at least 1, got 0"):
        ChunkSpan.of(0, 1, 0)
    assert ChunkSpan.of(0, 0, 1).num_chunks == 0


@pytest.mark.parametrize(
    ("mask", "text"),
    [(0, ""), (1, "0"), (0b11, "0-1"), (0b1001, "0, 3"), (0b11100110, "1-2, 5-7"), (1 << 70, "70")],
)
def test_masks_are_written_as_block_numbers(mask: int, text: str) -> None:
    assert positions(mask) == text


def test_an_empty_span_has_no_chunk_wherever_it_begins() -> None:
    for first in range(3):
        span = ChunkSpan.of(first, 0, 3)
        assert (span.num_chunks, span.masks()) == (0, [])
