"""Runs benchmarks, or tests, in a process of its own that can be stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
#: how long a process that was asked to end may take to write down what it has
ENDING_SECONDS = 10
_NOTHING_RAN = 5  # pytest's status


class Outcome(Enum):
    PASSED = "passed"
    FAILED = "failed"
    STOPPED = "stopped: it did not end"
    LEFT_OUT = "left out: no time was left"


def command_of(
    files: Sequence[Path], name: str, out: Path, limit: float, options: Sequence[str] = ()
) -> list[str]:
    """pytest on `files`, with no other plugin than it needs, for a machine may have any; what it
    finds goes to files of this name in `out`."""
    return [
        *(sys.executable, "-m", "pytest", *map(str, files)),
        *("-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={ROOT}"),
        # A warning of some library is no reason not to measure.
        *("-W", "default", "-W", "ignore:Not saving anything"),
        f"--time-limit={limit:.0f}",
        f"--notes={out / name}.notes.json",
        *options,
    ]


def benchmark_options(name: str, out: Path) -> list[str]:
    options = ["-p", "pytest_benchmark.plugin", "--benchmark-only", "--benchmark-quiet"]
    return [*options, f"--records={out / name}.records.jsonl"]


def environment_of(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """That of a child: the project is found where it lies, installed or not."""
    environment = {**os.environ, **(extra or {}), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    paths = (str(ROOT), str(BENCH), environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # What tests a child may be a worker of pytest-xdist; the child is none, and may measure.
    environment.pop("PYTEST_XDIST_WORKER", None)
    return environment


def run(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> Outcome:
    """Wait for it for so long. After that it is asked to end, as by a user, so that it writes down
    what it has; then it is ended, with all it has started."""
    child = subprocess.Popen(command, cwd=ROOT, env=dict(environment), start_new_session=True)
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            child.wait(ENDING_SECONDS)
        return Outcome.STOPPED
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return Outcome.PASSED if code in (0, _NOTHING_RAN) else Outcome.FAILED
