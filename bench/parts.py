"""Which benchmarks show what is promised of a GPU: they are measured first.

What is promised is in `promises.py`. Each is one transfer, or one model, beside one plain copy,
which every transfer is timed in turn with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from results import ONE_COPY
from units import KIB
from world import jobs

PARTS = ("promised", "rest")
DEFAULT = "auto"  # as a user gets it who names no path
CHOSEN = (DEFAULT, "staged")


def is_promised(test: str, facts: Mapping[str, Any]) -> bool:
    """`test`: a benchmark's function. `facts`: its parameters."""
    name = facts.get("name")
    if test == "test_alone":
        size, pages = facts["job"]
        largest = max(count for each, count in jobs() if each == size)
        return name in CHOSEN and size >= 4 * KIB and pages == largest
    if test == "test_both_at_once":
        return name == DEFAULT
    if test == "test_slowdown":
        return name in (DEFAULT, ONE_COPY)
    return test == "test_small_copy_during_a_load" and facts["window"] is None


def belongs(item: pytest.Item, part: str) -> bool:
    """Whether a benchmark is of this part."""
    test = getattr(item, "originalname", item.name)
    facts = item.callspec.params if hasattr(item, "callspec") else {}
    return is_promised(test, facts) == (part == "promised")
