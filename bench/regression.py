"""Fails when a chosen benchmark has become slower than the committed baseline, beyond the noise.

    python bench/regression.py [--update] [--json]

A benchmark is a ratio: the time of a reference over ours, higher is better. Both do the same work
in turn in one process, so that a slower machine, or one that does other things too, slows both.
The baseline holds the median ratio and its spread; see `judge` for what counts as slower. One that
looks slower is measured again, twice and with more rounds, before it fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from chosen import CHOSEN, Pair
from rich.console import Console
from rich.table import Table

BASELINE = Path(__file__).with_name("baseline.json")
ROUNDS = 9
RETRIES = 2
RETRY_ROUNDS = 45  # of which a slow minute of the machine is a smaller part

# Ratios differ between machines by what they have of caches and cores, whatever the code does.
FLOOR = 0.35
# Half the speed fails, whatever the noise: what hides it calls for more rounds.
CEILING = 0.49
# More than three standard errors are seldom; four, for so few rounds tell their spread badly.
SIGMAS = 4.0
# Of normal noise: the deviation is 1.48 MADs, a median's standard error 1.25 deviations / sqrt(n).
MAD_TO_ERROR = 1.48 * 1.25


@dataclass(frozen=True)
class Sample:
    """The median of the ratios of some rounds, and their median absolute deviation from it."""

    ratio: float
    spread: float
    rounds: int

    @classmethod
    def of(cls, ratios: list[float]) -> Sample:
        median = statistics.median(ratios)
        spread = statistics.median(abs(ratio - median) for ratio in ratios)
        return cls(median, spread, len(ratios))

    @property
    def noise(self) -> float:
        """The standard error of the median, relative to it."""
        return MAD_TO_ERROR * self.spread / self.ratio / self.rounds**0.5


@dataclass(frozen=True)
class Verdict:
    """`change`: relative to the baseline, negative where it is slower. `allowed`: how negative."""

    change: float
    allowed: float

    @property
    def slower(self) -> bool:
        return self.change < -self.allowed


def judge(measured: Sample, baseline: Sample) -> Verdict:
    """Compares a median with the baseline's: FLOOR to CEILING is allowed, as their noise is."""
    noise = (measured.noise**2 + baseline.noise**2) ** 0.5
    allowed = min(max(FLOOR, SIGMAS * noise), CEILING)
    return Verdict(measured.ratio / baseline.ratio - 1, allowed)


def ratios(pair: Pair, rounds: int) -> list[float]:
    """The reference's time over ours, in rounds whose order alternates; the first is dropped."""
    reference, ours = pair
    found = []
    for number in range(rounds + 1):
        seconds = {}
        for call in (reference, ours) if number % 2 else (ours, reference):
            start = perf_counter()
            call()
            seconds[call] = perf_counter() - start
        found.append(seconds[reference] / seconds[ours])
    return found[1:]


def measure(name: str, rounds: int) -> Sample:
    with CHOSEN[name]() as pair:
        return Sample.of(ratios(pair, rounds))


def check(baseline: dict[str, Sample]) -> dict[str, tuple[Sample, Verdict]]:
    """Measures every chosen benchmark. Raises KeyError for one without a baseline."""
    found = {}
    for name in CHOSEN:
        measured = measure(name, ROUNDS)
        verdict = judge(measured, baseline[name])
        for _ in range(RETRIES):
            if verdict.slower:
                measured = measure(name, RETRY_ROUNDS)
                verdict = judge(measured, baseline[name])
        found[name] = measured, verdict
    return found


def show(found: dict[str, tuple[Sample, Verdict]], baseline: dict[str, Sample]) -> None:
    table = Table(title="Speed, as the reference's time over ours")
    table.add_column("benchmark")
    for column in ("baseline", "now", "change", "allowed"):
        table.add_column(column, justify="right")
    for name, (measured, verdict) in found.items():
        table.add_row(
            name,
            f"{baseline[name].ratio:.2f}",
            f"{measured.ratio:.2f}",
            f"{verdict.change:+.0%}",
            f"-{verdict.allowed:.0%}",
            style="bold red" if verdict.slower else "",
        )
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="measure and write the baseline")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if options.update:
        samples = {name: asdict(measure(name, RETRY_ROUNDS)) for name in CHOSEN}
        BASELINE.write_text(json.dumps(samples, indent=2) + "\n")
        return 0
    stored = json.loads(BASELINE.read_text())
    baseline = {name: Sample(**sample) for name, sample in stored.items()}
    found = check(baseline)
    if options.json:
        rows = {n: asdict(m) | asdict(v) | {"slower": v.slower} for n, (m, v) in found.items()}
        print(json.dumps(rows, indent=2))
    else:
        show(found, baseline)
    return int(any(verdict.slower for _, verdict in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
