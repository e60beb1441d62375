"""Stores and loads by every path and by peers, in turn with one plain copy of the same bytes.

    python bench/run.py transfers

A time runs from submission to the last byte, with cold caches. Every contender is seen to move
every byte right before it is timed. Without a GPU the same runs on the host device.
"""

from __future__ import annotations

from typing import Any

import pytest
from stage import OURS, PEERS, Stage, measure
from timing import HAS_GPU
from world import KIB, MIB, jobs

from triton_offload.sizes import format_bytes
from triton_offload.specs import Direction

BUDGET = 0.15 if HAS_GPU else 0.2  # seconds of rounds for each
GRID = jobs()
LAYOUT_BYTES = 256 * MIB if HAS_GPU else 32 * MIB
EITHER = [(Direction.STORE,), (Direction.LOAD,)]
both_ways = pytest.mark.parametrize("directions", EITHER, ids=["store", "load"])


def name_of(job: tuple[int, int]) -> str:
    return f"{format_bytes(job[0])} x {job[1]}".replace(".0", "")


@both_ways
@pytest.mark.parametrize("name", [*OURS, "vLLM"])
@pytest.mark.parametrize("slots", ["recycled", "ranks"])
@pytest.mark.parametrize("page_bytes", [4 * KIB, 64 * KIB], ids=["4 KiB", "64 KiB"])
def test_slots(
    benchmark: Any,
    stage: Stage,
    page_bytes: int,
    slots: str,
    name: str,
    directions: tuple[Direction, ...],
) -> None:
    """Slots that are not adjacent, as an engine hands them out."""
    job = page_bytes, LAYOUT_BYTES // page_bytes, slots
    measure(benchmark, stage, "slots", name, directions, job, BUDGET)


@both_ways
@pytest.mark.parametrize("name", [*OURS, "vLLM", "whole slots"])
@pytest.mark.parametrize("page_bytes", [4 * KIB, 64 * KIB], ids=["4 KiB", "64 KiB"])
def test_a_group(
    benchmark: Any,
    stage: Stage,
    page_bytes: int,
    name: str,
    directions: tuple[Direction, ...],
) -> None:
    """A group that covers an eighth of the slot: its own runs, beside one copy of whole slots."""
    job = page_bytes, LAYOUT_BYTES // 8 // page_bytes, "groups"
    measure(benchmark, stage, "groups", name, directions, job, BUDGET)


@pytest.mark.parametrize("name", [*OURS, *(PEERS if HAS_GPU else ())])
@pytest.mark.parametrize(
    "page_bytes", [4 * KIB, 64 * KIB, 2 * MIB], ids=["4 KiB", "64 KiB", "2 MiB"]
)
def test_both_at_once(benchmark: Any, stage: Stage, page_bytes: int, name: str) -> None:
    job = page_bytes, LAYOUT_BYTES // page_bytes, "duplex"
    measure(benchmark, stage, "both at once", name, tuple(Direction), job, BUDGET)


@both_ways
@pytest.mark.parametrize("name", [*OURS, *PEERS])
@pytest.mark.parametrize("job", GRID, ids=map(name_of, GRID))
def test_alone(
    benchmark: Any,
    stage: Stage,
    job: tuple[int, int],
    name: str,
    directions: tuple[Direction, ...],
) -> None:
    measure(benchmark, stage, "transfer", name, directions, (*job, "adjacent"), BUDGET)
