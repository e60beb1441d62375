"""Runs the benchmarks that this machine can, and writes the report.

    python bench/run.py                        # everything, about three minutes without a GPU
    python bench/run.py transfers kernels      # some suites; the report shows them alone
    python bench/run.py --report-only          # from the JSON of an earlier run
    python bench/run.py --require-gpu          # on a GPU machine, nothing installed
    python bench/run.py --out bench/results/h100     # figures of a card, to be kept

Each suite is a process of its own, so that one that breaks takes no other along, and has a time
limit: benchmarks that it leaves out are listed in the report.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent


@dataclass(frozen=True)
class Suite:
    """A file of benchmarks. `seconds`: after which it starts no further one, without and with a
    GPU; the sums leave room for the report in ten minutes."""

    name: str
    seconds: tuple[float, float]


SUITES = (
    Suite("transfers", (180, 190)),
    Suite("kernels", (10, 70)),
    Suite("interference", (60, 75)),
    Suite("submission", (60, 50)),
    Suite("small_jobs", (60, 5)),
    Suite("static", (60, 45)),
    Suite("executed", (90, 20)),
    Suite("manager", (90, 15)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [suite.name for suite in SUITES]
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=BENCH / "out", help="default: bench/out")
    parser.add_argument("--peer", type=Path, help="folder of a packed vLLM (see bench/peers.py)")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    parser.add_argument(
        "--require-gpu", action="store_true", help="exit with 2 where there is none"
    )
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.suites) - set(names))
    if unknown:
        parser.error(f"expected suites of {', '.join(names)}, got {', '.join(unknown)}")
    # Imported late: `--help` and a wrong argument need no torch.
    sys.path[:0] = [path for path in (str(ROOT), str(BENCH)) if path not in sys.path]
    import torch

    has_gpu = torch.cuda.is_available()
    if arguments.require_gpu and not has_gpu:
        print("no GPU that torch can use is here; `make bench` runs what needs none")
        return 2
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    failed = False
    if not arguments.report_only:
        chosen = [suite for suite in SUITES if suite.name in (arguments.suites or names)]
        for name in names:  # of an earlier run; nothing else in the folder is touched
            for stale in (out / f"{name}.json", out / f"{name}.notes.json"):
                stale.unlink(missing_ok=True)
        failed = run(chosen, out, arguments.peer, has_gpu)
    report = write_report(out)
    print(f"report: {report}")
    return 1 if failed else 0


def run(suites: list[Suite], out: Path, peer: Path | None, has_gpu: bool) -> bool:
    """Run the suites one after the other; whether any failed."""
    from peers import pack_environment

    environment = os.environ | (pack_environment(peer) if has_gpu else {})
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    failed = False
    for number, suite in enumerate(suites, 1):
        limit = suite.seconds[has_gpu]
        print(f"[{number}/{len(suites)}] {suite.name}: at most {limit:.0f} s", flush=True)
        start = time.monotonic()
        command = [
            *(sys.executable, "-m", "pytest", str(BENCH / f"test_{suite.name}.py")),
            *("--benchmark-only", "--benchmark-quiet", "-q", "--no-header", "--tb=short"),
            *("-p", "no:cacheprovider", f"--rootdir={ROOT}"),
            # A warning of some library is no reason not to measure.
            *("-W", "default", "-W", "ignore:Not saving anything"),
            f"--time-limit={limit}",
            f"--notes={out / suite.name}.notes.json",
            f"--benchmark-json={out / suite.name}.json",
        ]
        try:
            # A single benchmark may be under way when the limit is reached, or hang.
            done = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=limit + 45, check=False
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = -1
            print(f"{suite.name} was stopped: a benchmark did not end", flush=True)
        # 5: none was left to run
        failed |= code not in (0, 5)
        print(f"    {time.monotonic() - start:.0f} s", flush=True)
    return failed


def write_report(out: Path) -> Path:
    """`report.md` and its plots, from the JSON files in `out`."""
    from report import build
    from results import Results

    results = Results.load(out)
    try:
        from plots import draw_all

        plots = draw_all(results, out)
    except ImportError as error:
        print(f"no plots: {error}")
        plots = []
    report = out / "report.md"
    report.write_text(build(results, plots))
    return report


if __name__ == "__main__":
    sys.exit(main())
