"""A real vLLM engine with a tier of files: what it answers after a restart, and what the files are.

As in `test_vllm_engine.py`: a tiny random Llama in float32, whose pages are overwritten before
every load.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine import FEW

pytestmark = pytest.mark.engine

_SCRIPT = Path(__file__).with_name("tier_engine.py")


def _run(folder: Path, *parts: str) -> dict[str, Any]:
    """What each part has seen, every one with an engine and a process of its own."""
    output = folder / "output.json"
    places = [str(folder / name) for name in ("model", "files")]
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), *places, str(output), *parts],
        cwd=_SCRIPT.parent.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    seen: dict[str, Any] = json.loads(output.read_text())
    return seen


def test_after_a_restart_outputs_are_equal_and_come_from_the_files(tmp_path: Path) -> None:
    seen = _run(tmp_path, "fill", "restart")
    filled, again = seen["fill"], seen["restart"]
    assert filled["files"] == filled["chunks"] > 0
    assert not filled["wrong"], "files that are not what the slots held, or nothing but zeros"
    assert not filled["named"], "the region has a name still"
    assert all(len(set(answer)) > 2 for answer in filled["answers"])
    assert again["intact"]["answers"] == filled["answers"]
    assert again["intact"]["loads"] == [len(FEW)]  # each prompt had something to load
    # And it was of the files: of others, no answer is right.
    assert again["flipped"]["loads"] == [len(FEW)]
    flipped = zip(again["flipped"]["answers"], filled["answers"], strict=True)
    assert not any(a == b for a, b in flipped)


@pytest.mark.deep
def test_whatever_fails_outputs_are_equal_and_what_a_tier_has_comes_back(tmp_path: Path) -> None:
    seen = _run(tmp_path, "failures")["failures"]
    wanted = seen["no store"]["answers"]
    assert all(len(set(answer)) > 2 for answer in wanted)
    assert seen["no store"]["files"] == 0
    assert seen["stored"]["files"] > 0
    for name in ("stored", "no load", "loaded"):
        assert seen[name]["answers"] == wanted, name
    assert (seen["no load"]["loads"], seen["no load"]["failed"]) == ([0], [len(FEW)])
    assert (seen["loaded"]["loads"], seen["loaded"]["failed"]) == ([len(FEW)], [0])


@pytest.mark.deep
@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 2)])
def test_engines_of_any_number_of_ranks_read_canonical_files(
    tmp_path: Path, writers: int, readers: int
) -> None:
    store, load = f"store canonical by {writers}", f"load canonical by {readers}"
    seen = _run(tmp_path, store, load)
    assert seen[load]["answers"] == seen[store]["answers"]
    assert seen[load]["loads"] == [len(FEW)] * readers
    assert all(seen[load]["bytes"])


@pytest.mark.deep
def test_ranks_of_another_number_do_not_take_files_of_theirs_for_their_own(tmp_path: Path) -> None:
    store, load = "store direct by 1", "load direct by 2"
    seen = _run(tmp_path, store, load)
    assert seen[load]["answers"] == seen[store]["answers"]
    # Of the two of each prefix the first has nothing to load, the second what this engine stored.
    assert seen[load]["loads"] == [2, 2]
