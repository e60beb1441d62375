"""Options of the benchmarks, and what their JSON says beside the figures."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import pytest
from stage import Stage

_started = time.monotonic()
_skipped: Counter[str] = Counter()
_failed: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--time-limit",
        type=float,
        default=None,
        help="seconds after which no further benchmark is started (those left are skipped)",
    )
    parser.addoption(
        "--notes",
        type=Path,
        default=None,
        help="a JSON file for what was skipped and what failed, and for facts of the machine",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--time-limit")
    if limit is not None and time.monotonic() - _started > limit:
        pytest.skip(f"the time limit of {limit:.0f} s was reached")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        _skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1
    if report.failed:
        _failed.append(report.nodeid)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # results are shared; whose machine it was is not
    machine_info["facts"] = machine.facts()


def pytest_sessionfinish(session: pytest.Session) -> None:
    notes = session.config.getoption("--notes")
    if notes is not None:
        content = {
            "facts": machine.facts(),
            "seconds": time.monotonic() - _started,
            "skipped": dict(_skipped),
            "failed": _failed,
        }
        notes.write_text(json.dumps(content, indent=2) + "\n")


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.clear()
