"""How a copy engine serves the streams that ask it, judged from how long a small copy waits."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum


class Arbitration(Enum):
    """What a small copy on a stream of its own waits for while a load is queued."""

    UNDISTURBED = "the small copy does not wait for the load"
    IN_TURN = "streams are served in turn: the small copy waits for a few slices"
    FIRST_IN_FIRST_OUT = "first in, first out: the small copy waits for what was queued before it"
    UNCLEAR = "between the two"


def infer_arbitration(
    alone: float, during: Sequence[float], slice_seconds: float, load_seconds: float
) -> Arbitration:
    """From latencies of a small copy, in seconds.

    `alone`: with an idle engine. `during`: each while the load was under way. `slice_seconds`: of
    one slice of the load. `load_seconds`: of all of it. A copy served in turn waits for a slice or
    two whenever it comes; one served in order waits for most of the load if it comes early. The
    bounds between are wide apart: 4 slices, and a fifth of the load.
    """
    if not during:
        raise ValueError("during: expected latencies taken while the load was under way, got none")
    median, longest = statistics.median(during) - alone, max(during) - alone
    if longest >= max(load_seconds / 5, 8 * slice_seconds):
        return Arbitration.FIRST_IN_FIRST_OUT
    if median <= max(alone, slice_seconds / 4):
        return Arbitration.UNDISTURBED
    if median <= 4 * slice_seconds:
        return Arbitration.IN_TURN
    return Arbitration.UNCLEAR


@dataclass(frozen=True)
class WindowTrial:
    """What a window cost and brought: the small copy's longest wait, and the load's speed."""

    latency: float
    gb_per_s: float


def windows_that_suffice(
    trials: Mapping[int | None, WindowTrial], target: float
) -> list[int | None]:
    """The windows (None: no bound) under which the small copy waits at most `target` seconds, the
    widest first."""
    kept = [window for window, trial in trials.items() if trial.latency <= target]
    return sorted(kept, key=lambda window: float("-inf") if window is None else -window)
