"""`make gpu`: all that a card can show in ten minutes, what matters most first.

    python bench/gpu.py                          # bench/out/report.md
    python bench/gpu.py --out bench/results/h100     # figures to be kept

Nothing is installed, and nothing is needed but torch, triton, cuda-bindings, pytest and
pytest-benchmark; without matplotlib there are no plots. First the kernels and every path must move
the right bytes, else nothing is measured. Then comes what is promised, then the rest. The report is
written after each step, so that a run that is cut off has its most important figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from measuring import (
    BENCH,
    ENDING_SECONDS,
    ROOT,
    Outcome,
    benchmark_options,
    command_of,
    environment_of,
    run,
)

TOTAL_SECONDS = 600.0
#: for the last report and its plots
REPORT_SECONDS = 15.0
#: what a benchmark that is under way at the limit may still take, and then the end of its process
GRACE_SECONDS = 10.0 + ENDING_SECONDS
#: less is not worth starting a process for
LEAST_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Step:
    """Some files of benchmarks, or of tests. `seconds`: after which it starts nothing new.
    `part`: of the benchmarks, see `parts.py`. `required`: where it fails, nothing else is run."""

    name: str
    seconds: float
    files: tuple[Path, ...]
    part: str | None = None
    required: bool = False


def _benchmarks(name: str, seconds: float, part: str | None = None) -> Step:
    label = f"{name}_{part}" if part else name
    return Step(label, seconds, (BENCH / f"test_{name}.py",), part)


TESTS = (ROOT / "tests" / "test_cuda.py", ROOT / "tests" / "test_cuda_kernels.py")
STEPS = (
    Step("correctness", 95, TESTS, required=True),
    _benchmarks("transfers", 80, "promised"),
    _benchmarks("interference", 70, "promised"),
    _benchmarks("kernels", 55),
    _benchmarks("transfers", 110, "rest"),
    _benchmarks("submission", 35),
    _benchmarks("interference", 45, "rest"),
    _benchmarks("static", 30),
)


@dataclass(frozen=True, slots=True)
class Allowed:
    """Seconds of a step: after which it starts nothing new, and after which it is ended."""

    limit: float
    most: float


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was run, or left out."""

    name: str
    outcome: Outcome
    seconds: float


def allow(step: Step, left: float) -> Allowed | None:
    """What a step may take of the seconds that are left; None: too little is left."""
    limit = min(step.seconds, left - REPORT_SECONDS - GRACE_SECONDS)
    return None if limit < LEAST_SECONDS else Allowed(limit, limit + GRACE_SECONDS - ENDING_SECONDS)


def run_steps(
    steps: tuple[Step, ...],
    run_step: Callable[[Step, Allowed], Outcome],
    report: Callable[[list[Done]], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[Done]:
    """One after the other, `report` after each, until a required one fails."""
    begin = clock()
    done: list[Done] = []
    for step in steps:
        start = clock()
        allowed = allow(step, TOTAL_SECONDS - (start - begin))
        outcome = Outcome.LEFT_OUT if allowed is None else run_step(step, allowed)
        done.append(Done(step.name, outcome, clock() - start))
        report(done)
        if step.required and outcome is not Outcome.PASSED:
            break
    return done


def options_of(step: Step, out: Path) -> list[str]:
    if step.files[0].parent != BENCH:
        # What other tests share may need what a bare machine has not.
        return ["-p", "limits", "--noconftest"]
    return benchmark_options(step.name, out) + ([f"--part={step.part}"] if step.part else [])


def measure(step: Step, allowed: Allowed, out: Path, environment: dict[str, str]) -> Outcome:
    print(f"{step.name}: at most {allowed.limit:.0f} s", flush=True)
    command = command_of(step.files, step.name, out, allowed.limit, options_of(step, out))
    # What was calibrated here before is neither used nor replaced.
    with tempfile.TemporaryDirectory() as cache:
        return run(command, {**environment, "XDG_CACHE_HOME": cache}, allowed.most)


def write(done: list[Done], out: Path, *, plots: bool) -> Path:
    """`steps.json` and the report of what there is."""
    from report import write_report

    lines = [[each.name, each.outcome.value, each.seconds] for each in done]
    (out / "steps.json").write_text(json.dumps(lines, indent=2) + "\n")
    return write_report(out, plots=plots)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=BENCH / "out", help="default: bench/out")
    parser.add_argument("--peer", type=Path, help="folder of a packed vLLM (see bench/peers.py)")
    arguments = parser.parse_args()
    sys.path[:0] = [path for path in (str(ROOT), str(BENCH)) if path not in sys.path]
    import torch

    if not torch.cuda.is_available():
        print("no GPU that torch can use is here; `make bench` runs what needs none")
        return 2
    from peers import pack_environment
    from results import clear

    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    clear(out)
    environment = environment_of(pack_environment(arguments.peer))
    done = run_steps(
        STEPS,
        lambda step, allowed: measure(step, allowed, out, environment),
        lambda done: print(f"    report: {write(done, out, plots=False)}", flush=True),
    )
    if done[0].outcome is not Outcome.PASSED:
        print("Correctness failed: nothing was measured. No figure of speed means anything here.")
        return 1
    print(f"report, with plots: {write(done, out, plots=True)}")
    return 1 if any(each.outcome in (Outcome.FAILED, Outcome.STOPPED) for each in done) else 0


if __name__ == "__main__":
    sys.exit(main())
