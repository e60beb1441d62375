"""Stores and loads by every path and by peers, in turn with one plain copy of the same bytes.

    python bench/run.py transfers

A time runs from submission to the last byte, with cold caches. Every contender is seen to move
every byte right before it is timed. Without a GPU the same runs on the host device.
"""

from __future__ import annotations

from typing import Any

import pytest
from results import size_name
from sizes import HAS_GPU, SIZES
from stage import OURS, PEERS, Stage, measure
from world import jobs

from triton_offload.specs import Direction

BUDGET = SIZES.budget
GRID = jobs()
LAYOUT_BYTES = SIZES.layout_bytes
SMALL_PAGES = SIZES.layout_page_bytes[:2]
EITHER = [(Direction.STORE,), (Direction.LOAD,)]
both_ways = pytest.mark.parametrize("directions", EITHER, ids=["store", "load"])


def name_of(job: tuple[int, int]) -> str:
    return f"{size_name(job[0])} x {job[1]}"


@both_ways
@pytest.mark.parametrize("name", [*OURS, "vLLM"])
@pytest.mark.parametrize("slots", ["recycled", "ranks"])
@pytest.mark.parametrize("page_bytes", SMALL_PAGES, ids=size_name)
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
@pytest.mark.parametrize("page_bytes", SMALL_PAGES, ids=size_name)
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
@pytest.mark.parametrize("page_bytes", SIZES.layout_page_bytes, ids=size_name)
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
