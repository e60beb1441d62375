"""What the benchmarks left behind: records of measurements, and notes of what was not measured."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cards import Card, card_of

from triton_offload.sizes import format_bytes

#: the order in which contenders are shown
CONTENDERS = (
    "staged",
    "zero_copy",
    "copy_engine",
    "auto",
    "vLLM",
    "batched copy",
    "batched copy, overlap",
    "copy per page",
    "index_select",
    "whole slots",
    "one copy",
)
PATHS = CONTENDERS[:3]
OURS = CONTENDERS[:4]
ONE_COPY = CONTENDERS[-1]  # one plain copy of the same bytes: the limit
CORRECTNESS = "correctness"  # the step that comes before all figures


@dataclass(frozen=True)
class Record:
    """One measurement: its median and least seconds, and the facts that were noted with it."""

    suite: str
    seconds: float
    least: float
    facts: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]

    def get(self, name: str) -> Any:
        return self.facts.get(name)


@dataclass(frozen=True)
class Results:
    """Everything of one run."""

    records: tuple[Record, ...]
    facts: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, Counter[str]] = field(default_factory=dict)  # by suite: reason, how often
    failed: tuple[str, ...] = ()
    seconds: float = 0.0
    steps: tuple[tuple[str, str, float], ...] = ()
    """Of a run in steps: name, outcome, seconds."""
    passed: int = 0
    """Tests of correctness."""

    @classmethod
    def load(cls, folder: Path) -> Results:
        """From `SUITE.records.jsonl` and `SUITE.notes.json` in `folder`; of a process that was
        ended there are no notes."""
        records: list[Record] = []
        facts: dict[str, str] = {}
        skipped: dict[str, Counter[str]] = {}
        failed: list[str] = []
        seconds, passed = 0.0, 0
        for file in sorted(folder.glob("*.notes.json")):
            suite = file.name.removesuffix(".notes.json")
            notes = json.loads(file.read_text())
            facts |= notes["facts"]
            skipped[suite] = Counter(notes["skipped"])
            failed += notes["failed"]
            seconds += notes["seconds"]
            if suite == CORRECTNESS:
                passed = notes["passed"]
        for file in sorted(folder.glob("*.records.jsonl")):
            records += _read(file.name.removesuffix(".records.jsonl"), file)
        file = folder / "steps.json"
        steps = tuple(map(tuple, json.loads(file.read_text()))) if file.is_file() else ()
        return cls(tuple(records), facts, skipped, tuple(failed), seconds, steps, passed)

    @property
    def on_gpu(self) -> bool:
        """Of records that a run without any has not made yet, what the machine says."""
        if not self.records:
            return self.facts.get("GPU", "none") != "none"
        return any(record.get("device") == "gpu" for record in self.records)

    @property
    def card(self) -> Card | None:
        """The card that the model predicts for; None without a GPU that it knows enough of."""
        return card_of(self.facts) if self.on_gpu else None

    @property
    def default_contender(self) -> str:
        """Ours as a user gets it who names no path: on the host device that is zero copy."""
        return "auto" if self.on_gpu else "zero_copy"

    def of(self, kind: str, **facts: object) -> list[Record]:
        """The records of a kind with these facts, in the order of their measuring."""
        return [
            record
            for record in self.records
            if record.get("kind") == kind
            and all(record.get(name) == value for name, value in facts.items())
        ]


def clear(out: Path) -> None:
    """Forget an earlier run's figures; nothing else in the folder is touched."""
    for pattern in ("*.records.jsonl", "*.notes.json", "steps.json", "report.md"):
        for stale in out.glob(pattern):
            stale.unlink()


def line_of(benchmark: Any) -> str:
    """A measurement as a line of `SUITE.records.jsonl`. `benchmark`: pytest-benchmark's fixture."""
    stats, facts = benchmark.stats.stats, {"group": benchmark.group, "test": benchmark.name}
    found = {"median": stats.median, "min": stats.min, "facts": facts | benchmark.extra_info}
    return json.dumps(found) + "\n"


def _read(suite: str, file: Path) -> list[Record]:
    found = map(json.loads, file.read_text().splitlines())
    return [Record(suite, each["median"], each["min"], each["facts"]) for each in found]


@dataclass(frozen=True)
class Winner:
    """The fastest of our paths at one point, and how much faster than the next."""

    path: str
    gb_per_s: float
    gain: float | None  # None: no other path was measured


def crossover(records: Sequence[Record]) -> dict[tuple[int, int], Winner]:
    """By (page bytes, pages): which of our paths is fastest, of one direction's transfers."""
    points: dict[tuple[int, int], dict[str, float]] = {}
    for record in records:
        if record["contender"] in PATHS:
            point = points.setdefault((record["page_bytes"], record["pages"]), {})
            point[record["contender"]] = record["gb_per_s"]
    winners = {}
    for key, speeds in sorted(points.items()):
        ranked = sorted(speeds, key=speeds.__getitem__, reverse=True)
        first = speeds[ranked[0]]
        gain = first / speeds[ranked[1]] if len(ranked) > 1 else None
        winners[key] = Winner(ranked[0], first, gain)
    return winners


def largest_jobs(records: Sequence[Record]) -> list[Record]:
    """Those of the most pages for their page size."""
    most: dict[int, int] = {}
    for record in records:
        size = record["page_bytes"]
        most[size] = max(most.get(size, 0), record["pages"])
    return [record for record in records if record["pages"] == most[record["page_bytes"]]]


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Seconds for each further unit, by least squares through (units, seconds); None of fewer
    than two different units."""
    if len({x for x, _ in points}) < 2:
        return None
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def contenders_in(records: Iterable[Record]) -> list[str]:
    found = {record["contender"] for record in records}
    return [name for name in CONTENDERS if name in found]


def size_name(num_bytes: float) -> str:
    """4 KiB, not 4.0 KiB."""
    return format_bytes(num_bytes).replace(".0 ", " ")


def time_name(seconds: float) -> str:
    """In the unit that leaves one to three digits before the point."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor or unit == "us":
            value = seconds / factor
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    raise AssertionError("unreachable")
