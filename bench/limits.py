"""A plugin of pytest: a time limit after which nothing new is started, and notes of what ran.

python -m pytest -p limits --time-limit=60 --notes=notes.json tests/test_cuda.py
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import machine
import pytest

_started = time.monotonic()
_passed: list[str] = []
_failed: list[str] = []
_skipped: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--time-limit",
        type=float,
        default=None,
        help="seconds after which no further test is started (those left are skipped)",
    )
    parser.addoption(
        "--notes",
        type=Path,
        default=None,
        help="a JSON file for what ran, was skipped and failed, and for facts of the machine",
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
    elif report.passed and report.when == "call":
        _passed.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    notes = session.config.getoption("--notes")
    if notes is not None:
        content = {
            "facts": machine.facts(),
            "seconds": time.monotonic() - _started,
            "passed": len(_passed),
            "skipped": dict(_skipped),
            "failed": _failed,
        }
        notes.write_text(json.dumps(content, indent=2) + "\n")
