"""Real threads at one offloader, with arguments and pages that their owners overwrite: for 20
seconds, or `TRITON_OFFLOAD_STRESS_SECONDS`. `python tests/stress.py SECONDS` runs longer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import stress
from model_content import ONE_GROUP, Setting

from triton_offload import calibration, request, specs

SECONDS = float(os.environ.get("TRITON_OFFLOAD_STRESS_SECONDS", "20"))
STRESS = Path(__file__).with_name("stress.py")


def python(*arguments: str, seconds: float) -> tuple[int, str]:
    """Exit status and output of a process of its own, which a crash or a hang ends alone."""
    done = subprocess.run(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds + 200,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.timeout(SECONDS + 300)
def test_no_wrong_byte_no_hang_nothing_that_grows(capsys):
    # Of so many configurations that each path comes with a short and with a long queue.
    each = min(stress.ROUND_SECONDS, SECONDS / 12)
    status, output = python(
        "-X", "faulthandler", str(STRESS), str(SECONDS), "--round", str(each), seconds=SECONDS
    )
    assert status == 0, output
    assert output.endswith("right\n")
    with capsys.disabled():
        print("\n" + output.splitlines()[-3], end=" ")


def share_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ids of a call stay the caller's, as they once did."""

    def shared(name: str, ids: object) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(ids), dtype=np.int64)

    monkeypatch.setattr(specs, "as_ids", shared)
    monkeypatch.setattr(request, "as_ids", shared)


def test_ids_that_are_read_after_the_call_are_noticed(monkeypatch):
    share_ids(monkeypatch)
    setting = Setting(calibration.Path.STAGED, ONE_GROUP, window_chunks=1)
    for seed in range(20):
        done = stress.Round(setting, seed)
        done.run(0.5)
        if done.errors:
            return
    raise AssertionError("no byte was wrong")


def test_a_failure_names_its_seed_its_configuration_and_what_runs_it_again(monkeypatch, capsys):
    def wrong(self: object) -> None:
        raise AssertionError("made up")

    monkeypatch.setattr(stress.World, "collect", wrong)
    (what,) = stress.stress(0.2, 5)
    assert "AssertionError: made up" in what
    assert "stress.py 0.2 --seed 5" in what
    assert f"seed 5: {stress.draw_setting(5)}" in capsys.readouterr().out


HANGING = """
import sys, threading
sys.path.insert(0, {folder!r})
import stress
stress.HANG_SECONDS = 1.0
stress.Client.step = lambda self: threading.Event().wait()
stress.stress(1, 5)
"""


def test_a_hang_ends_with_its_configuration_and_the_stacks_of_all_threads():
    status, output = python("-c", HANGING.format(folder=str(STRESS.parent)), seconds=1)
    assert status == 1
    assert "seed 5: Setting(" in output
    assert output.count("Thread 0x") > stress.NUM_CALLERS
    assert "Timeout" in output


def test_growth_is_told():
    start = dict.fromkeys(stress.BOUNDS, 1)
    assert stress.grown(start, start) == []
    assert stress.grown(start, {**start, "threads": 2}) == ["threads: 1, then 2"]
    assert stress.grown(start, {**start, "memory, MiB": 66}) == ["memory, MiB: 1, then 66"]


def test_configurations_are_of_every_kind():
    settings = [stress.draw_setting(seed) for seed in range(60)]
    assert {size for setting in settings for size in setting.page_bytes} == {1, 3, 7, 4097}
    assert {setting.blocks_per_chunk for setting in settings} == set(range(1, 8))
    assert {len(setting.groups) for setting in settings} == {1, 2, 3}
    assert {setting.path for setting in settings} == set(calibration.Path)
    assert {setting.window_chunks for setting in settings} == {0.2, 1, 2, None}
    assert {setting.policy for setting in settings} == {"lru", "arc"}
