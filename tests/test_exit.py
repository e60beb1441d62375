"""A program that ends without `close` while transfers are under way ends as it would have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TURNS = 2


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    script = Path(__file__).parent / "exit_script.py"
    folder = tmp_path_factory.mktemp("exit")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(TURNS)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("way", "status"),
    [("ends", 0), ("exits", 3), ("closes_late", 0), ("forks", 0)],
)
def test_a_program_keeps_its_own_exit_status(ends, way, status):
    assert ends[way] == [[status, ""]] * TURNS


def test_a_program_that_fails_shows_its_own_error_and_no_other(ends):
    for status, stderr in ends["fails"]:
        assert status == 1
        assert stderr.startswith("Traceback (most recent call last):")
        assert stderr.endswith("KeyError: 'mine'\n")
        assert stderr.count("Traceback") == 1
        assert "terminate" not in stderr
