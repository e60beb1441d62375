"""Runs the benchmarks that this machine can, and writes the report.

    python bench/run.py                        # everything, about three minutes without a GPU
    python bench/run.py transfers kernels      # some suites; the report shows them alone
    python bench/run.py --report-only          # from the JSON of an earlier run

Each suite is a process of its own, so that one that breaks takes no other along, and has a time
limit: benchmarks that it leaves out are listed in the report. On a machine with a GPU `gpu.py` runs
the same in another order.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from measuring import (
    BENCH,
    ROOT,
    Outcome,
    benchmark_options,
    command_of,
    environment_of,
    run,
)


@dataclass(frozen=True)
class Suite:
    """A file of benchmarks. `seconds`: after which it starts no further one."""

    name: str
    seconds: float


SUITES = (
    Suite("transfers", 180),
    Suite("kernels", 10),
    Suite("interference", 60),
    Suite("submission", 60),
    Suite("small_jobs", 60),
    Suite("checksums", 60),
    Suite("layers", 60),
    Suite("static", 60),
    Suite("executed", 90),
    Suite("manager", 90),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [suite.name for suite in SUITES]
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=BENCH / "out", help="default: bench/out")
    parser.add_argument("--peer", type=Path, help="folder of a packed vLLM (see bench/peers.py)")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.suites) - set(names))
    if unknown:
        parser.error(f"expected suites of {', '.join(names)}, got {', '.join(unknown)}")
    # Imported late: `--help` and a wrong argument need no torch.
    sys.path[:0] = [path for path in (str(ROOT), str(BENCH)) if path not in sys.path]
    from report import write_report
    from results import clear

    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = False
    if not arguments.report_only:
        chosen = [suite for suite in SUITES if suite.name in (arguments.suites or names)]
        clear(out)
        failed = run_suites(chosen, out, environment_of(_peer(arguments.peer)))
    report = write_report(out)
    print(f"report: {report}")
    return 1 if failed else 0


def _peer(folder: Path | None) -> dict[str, str]:
    """Where a packed vLLM is found, which needs a GPU."""
    import torch
    from peers import pack_environment

    return pack_environment(folder) if torch.cuda.is_available() else {}


def run_suites(suites: list[Suite], out: Path, environment: dict[str, str]) -> bool:
    """Run the suites one after the other; whether any failed."""
    failed = False
    for number, suite in enumerate(suites, 1):
        print(f"[{number}/{len(suites)}] {suite.name}: at most {suite.seconds:.0f} s", flush=True)
        start = time.monotonic()
        options = benchmark_options(suite.name, out)
        files = [BENCH / f"test_{suite.name}.py"]
        command = command_of(files, suite.name, out, suite.seconds, options)
        # A single benchmark may be under way when the limit is reached, or hang.
        outcome = run(command, environment, suite.seconds + 45)
        if outcome is not Outcome.PASSED:
            print(f"{suite.name}: {outcome.value}", flush=True)
            failed = True
        print(f"    {time.monotonic() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
