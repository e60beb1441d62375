"""Options of the benchmarks, and what they share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from limits import (
    pytest_addoption as _add_limits,
)
from limits import (  # noqa: F401
    pytest_runtest_logreport,
    pytest_runtest_setup,
    pytest_sessionfinish,
)
from parts import PARTS, belongs
from results import line_of
from stage import Stage


def pytest_addoption(parser: pytest.Parser) -> None:
    _add_limits(parser)
    parser.addoption(
        "--records",
        type=Path,
        default=None,
        help="a file for a line of JSON per benchmark, written as soon as it has ended",
    )
    parser.addoption(
        "--part",
        choices=PARTS,
        default=None,
        help="only the benchmarks that show what is promised of a GPU, or only the others",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--part")
    if part is not None:
        chosen = [item for item in items if belongs(item, part)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture(autouse=True)
def record(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[None]:
    """What a benchmark found is kept at once, for its process may be ended during the next."""
    yield
    file = request.config.getoption("--records")
    if file is not None and "kind" in benchmark.extra_info:  # not skipped, nor failed, on the way
        with file.open("a") as stream:
            stream.write(line_of(benchmark))


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.clear()
