"""Every file in examples/ is a program that ends well, and is typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: what makes a long one short
ARGUMENTS = {"tiny_engine.py": ["--tiny"]}


def python(*arguments: object, cwd: Path) -> str:
    """What Python prints, from this checkout; warnings are errors, as in the tests."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cwd / "cache")}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_runs_and_ends_well(example, tmp_path):
    python("-W", "error", example, *ARGUMENTS.get(example.name, []), cwd=tmp_path)


def test_the_examples_are_typed():
    # With the settings, and what is kept, of `make check`: torch alone takes half a minute anew.
    assert "Success" in python("-m", "mypy", "--strict", *EXAMPLES, cwd=ROOT)


def test_the_tiny_engine_loads_what_it_says(tmp_path):
    """An engine whose loads bring nothing ends with an error: its pages are poisoned."""
    source = (ROOT / "examples" / "tiny_engine.py").read_text()
    line = "            self.offloader.load(keys[here : here + hits], into).wait()\n"
    assert source.count(line) == 1
    broken = tmp_path / "broken.py"
    broken.write_text(source.replace(line, ""))
    with pytest.raises(AssertionError, match="WRONG ANSWERS"):
        python(broken, "--tiny", cwd=tmp_path)
