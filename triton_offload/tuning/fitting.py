"""From measured times to a calibration. Pure: no clock and no device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from triton_offload.calibration import (
    Calibration,
    Launches,
    LaunchShape,
    Path,
    PathRule,
    PathTable,
)
from triton_offload.specs import Direction

# By how much another choice must be faster to replace the default: what measurements on a quiet
# machine differ by. Near a crossover a wrong choice costs no more than that.
MARGIN = 1.05

Choice = TypeVar("Choice")


@dataclass(frozen=True, slots=True)
class Measurement:
    """A job of `pages` pages of `page_bytes` each took `seconds` by `path`."""

    direction: Direction
    page_bytes: int
    pages: int
    path: Path
    seconds: float


@dataclass(frozen=True, slots=True)
class LaunchMeasurement:
    """A job took `seconds` by `path`, its kernels launched in this shape (None: their own)."""

    direction: Direction
    path: Path
    shape: LaunchShape | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Measurements:
    """Of one machine. The same job took so many seconds by each of the `buffer_bytes`, and by each
    of the `launches` of a path and direction: cheapest first."""

    paths: tuple[Measurement, ...]
    buffer_bytes: tuple[tuple[int, float], ...] = ()
    launches: tuple[LaunchMeasurement, ...] = ()


def fit(measured: Measurements, default: Calibration) -> Calibration:
    """`default`, except for what was measured to be faster by more than the margin."""
    return replace(
        fit_launches(measured.launches, default),
        paths=fit_paths(measured.paths, default.paths),
        buffer_bytes=pick(default.buffer_bytes, measured.buffer_bytes),
    )


def fit_launches(measured: Sequence[LaunchMeasurement], default: Calibration) -> Calibration:
    """`default`, except for the launches that were measured: of each path and direction what `pick`
    chooses."""
    fitted: dict[str, Any] = {}
    for path in {one.path for one in measured}:
        launches: Launches = getattr(default, path.value)
        store, load = (
            pick(
                launches.of(way),
                [
                    (one.shape, one.seconds)
                    for one in measured
                    if (one.path, one.direction) == (path, way)
                ],
            )
            for way in (Direction.STORE, Direction.LOAD)
        )
        fitted[path.value] = Launches(store, load)
    return replace(default, **fitted)


def pick(default: Choice, measured: Sequence[tuple[Choice, float]]) -> Choice:
    """`default` unless another is faster by more than the margin, or `default` failed; then the
    first (the cheapest) that is no slower than the fastest by more than that."""
    fastest = min((took for _, took in measured), default=0.0)
    good = [choice for choice, took in measured if took <= fastest * MARGIN]
    return default if default in good or not good else good[0]


def fit_paths(measured: Iterable[Measurement], default: PathTable) -> PathTable:
    """The table that chooses at every measured point the path that `pick` does there.

    Between points it follows the nearer one, on a scale of ratios; outside of them, the last. A
    direction that was not measured keeps its rules.
    """
    points: dict[tuple[Direction, int, int], list[tuple[Path, float]]] = {}
    for one in measured:
        points.setdefault((one.direction, one.page_bytes, one.pages), []).append(
            (one.path, one.seconds)
        )
    chosen = {point: pick(default.choose(*point), took) for point, took in points.items()}
    directions = {way for way, _, _ in chosen}
    rules = [rule for rule in default.rules if rule.direction not in directions]
    for direction in Direction:
        sizes = sorted({size for way, size, _ in chosen if way is direction})
        for size, min_page_bytes in zip(sizes, _thresholds(sizes), strict=True):
            counts = sorted(n for way, s, n in chosen if way is direction and s == size)
            # In this order the last rule that applies is that of the nearest size, and among
            # those, of the nearest count.
            rules += [
                PathRule(direction, min_page_bytes, min_pages, chosen[direction, size, count])
                for count, min_pages in zip(counts, _thresholds(counts), strict=True)
            ]
    return _shortest(PathTable(default.default, tuple(rules)))


def _thresholds(values: Sequence[int]) -> list[int]:
    """From where on each value is the nearest."""
    between = [math.isqrt(a * b) for a, b in itertools.pairwise(values)]
    return [0, *between] if values else []


def _shortest(table: PathTable) -> PathTable:
    """The table without the rules that change nothing, at any size and count."""
    rules = list(table.rules)
    sizes = sorted({rule.min_page_bytes for rule in rules})
    counts = sorted({rule.min_pages for rule in rules})
    everywhere = [(way, size, count) for way in Direction for size in sizes for count in counts]
    wanted = [table.choose(*point) for point in everywhere]
    for rule in table.rules:
        fewer = [other for other in rules if other is not rule]
        shorter = PathTable(table.default, tuple(fewer))
        if [shorter.choose(*point) for point in everywhere] == wanted:
            rules = fewer
    return PathTable(table.default, tuple(rules))
