"""How time is taken: events on a GPU with cold caches, the host's clock elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import pytest
import torch
from sizes import HAS_GPU, SIZES

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
#: what the figures are labelled with
DEVICE_KIND = "gpu" if HAS_GPU else "host device"

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")

# The GPU is kept busy while the host queues what is timed; else the host's time is timed.
_AHEAD_CYCLES = 300_000
_MIN_ROUNDS, _MAX_ROUNDS = 3, 25


class Event(Protocol):
    """As much of `torch.cuda.Event` as the clock needs."""

    def record(self) -> Any: ...
    def synchronize(self) -> Any: ...
    def elapsed_time(self, end: Any) -> float: ...


class EventClock:
    """A timer for pytest-benchmark that reads events of the current stream.

    A round calls it twice. The first call runs `before` (which flushes the caches and keeps the
    device busy), then records an event; the second records another and waits for it. The
    difference of the two readings is the time between the events, in seconds.
    """

    def __init__(self, new_event: Callable[[], Event], before: Callable[[], None]) -> None:
        self._new_event = new_event
        self._before = before
        self._start: Event | None = None
        self._now = 0.0

    def __call__(self) -> float:
        if self._start is None:
            self._before()
            self._start = self._new_event()
            self._start.record()
        else:
            end = self._new_event()
            end.record()
            end.synchronize()
            self._now += self._start.elapsed_time(end) * 1e-3
            self._start = None
        return self._now

    def __repr__(self) -> str:
        return "EventClock()"


def gpu_clock() -> EventClock:
    """Events of the current stream, the L2 cache cold."""
    return EventClock(lambda: torch.cuda.Event(enable_timing=True), flush_and_run_ahead)


def flush_and_run_ahead() -> None:
    """Overwrite the L2 cache, then keep the GPU busy while the host queues what is to be timed."""
    global _flushed
    if _flushed is None:
        _flushed = torch.empty(SIZES.flush_bytes, dtype=torch.uint8, device=DEVICE)
    _flushed.zero_()
    torch.cuda._sleep(_AHEAD_CYCLES)


_flushed: torch.Tensor | None = None


def synchronize() -> None:
    """Wait for all that the device was given. Compute on the CPU is done when it returns."""
    if HAS_GPU:
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    """Of one call, by the host's clock, up to the end of what it gave the device."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def device_seconds(call: Callable[[], object]) -> float:
    """Of one call, by events of the current stream on a GPU, else by the host's clock."""
    if not HAS_GPU:
        return seconds(call)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def rounds_for(one_round: float, budget: float) -> int:
    """As many rounds as fit `budget` seconds, within reason."""
    return min(_MAX_ROUNDS, max(_MIN_ROUNDS, math.ceil(budget / max(one_round, 1e-9))))


def note(benchmark: Any, kind: str, **facts: object) -> None:
    """Put what a measurement is of where the report finds it."""
    benchmark.group = kind
    benchmark.extra_info.update(kind=kind, device=DEVICE_KIND, **facts)
