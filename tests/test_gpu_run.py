"""`make gpu` without a GPU: the order of its steps, its ten minutes, and what a cut leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu
import measuring
import pytest
import torch
from gpu import GRACE_SECONDS, LEAST_SECONDS, REPORT_SECONDS, STEPS, TOTAL_SECONDS, Step, allow
from measuring import ENDING_SECONDS, Outcome, command_of, environment_of
from parts import is_promised
from units import KIB, MIB
from world import jobs

ROOT = Path(__file__).parent.parent
#: what a bare machine has not
REFUSED = (
    *("hypothesis", "rich", "typer", "xdist", "pytest_timeout", "vllm", "prometheus_client"),
    *("coverage", "ruff", "mypy", "setuptools"),
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_correctness_comes_first_then_what_is_promised_then_the_rest() -> None:
    first, *others = STEPS
    assert first.required
    assert {file.name for file in first.files} == {"test_cuda.py", "test_cuda_kernels.py"}
    assert not any(step.required for step in others)
    parts = [step.part for step in others]
    assert parts.index("rest") > max(i for i, part in enumerate(parts) if part == "promised")
    assert parts[:2] == ["promised", "promised"]
    assert all(file.is_file() for step in STEPS for file in step.files)
    assert len({step.name for step in STEPS}) == len(STEPS)


def test_correctness_ends_within_two_minutes_and_all_within_ten() -> None:
    allowed = allow(STEPS[0], TOTAL_SECONDS)
    assert allowed is not None
    assert allowed.most + ENDING_SECONDS <= 120
    assert sum(step.seconds for step in STEPS) + REPORT_SECONDS <= TOTAL_SECONDS


def test_a_step_gets_no_more_than_is_left_and_none_that_is_too_little() -> None:
    step = Step("any", 100.0, ())
    assert allow(step, 600) == gpu.Allowed(100, 110)
    few = REPORT_SECONDS + GRACE_SECONDS + LEAST_SECONDS
    assert allow(step, few) == gpu.Allowed(LEAST_SECONDS, LEAST_SECONDS + 10)
    assert allow(step, few - 0.1) is None


@pytest.mark.parametrize("lasting", [1.0, 60.0, 1e9])
def test_the_whole_run_ends_in_time_however_long_the_steps_want(lasting: float) -> None:
    clock = Clock()

    def run_step(step: Step, allowed: gpu.Allowed) -> Outcome:
        took = min(lasting, allowed.most + ENDING_SECONDS)
        clock.now += took
        return Outcome.PASSED

    reports: list[int] = []
    done = gpu.run_steps(STEPS, run_step, lambda done: reports.append(len(done)), clock)
    assert clock.now - 1000 <= TOTAL_SECONDS - REPORT_SECONDS
    assert reports == [*range(1, len(STEPS) + 1)]  # one after each
    assert [each.name for each in done] == [step.name for step in STEPS]
    assert done[-1].outcome is (Outcome.LEFT_OUT if lasting > 100 else Outcome.PASSED)
    assert done[0].seconds == pytest.approx(min(lasting, 115))


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.STOPPED])
def test_nothing_is_measured_where_the_bytes_are_wrong(outcome: Outcome) -> None:
    reports: list[int] = []
    done = gpu.run_steps(STEPS, lambda *_: outcome, lambda done: reports.append(len(done)))
    assert [(each.name, each.outcome) for each in done] == [("correctness", outcome)]
    assert reports == [1]


def test_a_benchmark_that_fails_stops_no_other() -> None:
    outcomes = iter([Outcome.PASSED, Outcome.FAILED, *[Outcome.STOPPED] * 10])
    done = gpu.run_steps(STEPS, lambda *_: next(outcomes), lambda done: None)
    assert len(done) == len(STEPS)


def notes(seconds: float = 1.0, failed: tuple[str, ...] = (), passed: int = 3) -> dict[str, Any]:
    facts = {"GPU": "NVIDIA H200"}
    return {
        "facts": facts, "seconds": seconds, "skipped": {}, "failed": failed, "passed": passed
    }  # fmt: skip


def as_if_on_a_card(
    monkeypatch: pytest.MonkeyPatch, out: Path, outcomes: dict[str, Outcome], cut: str = ""
) -> list[str]:
    """`gpu.main` with made-up steps that leave made-up JSON; at the step `cut` the run is ended."""
    ran: list[str] = []

    def measure(step: Step, allowed: gpu.Allowed, out: Path, environment: object) -> Outcome:
        ran.append(step.name)
        if step.name == cut:
            raise KeyboardInterrupt
        (out / f"{step.name}.notes.json").write_text(json.dumps(notes()))
        facts = {"kind": "polling", "device": "gpu", "jobs": len(ran)}
        made_up = {"median": 5e-6, "min": 4e-6, "facts": facts}
        if not step.required:
            (out / f"{step.name}.records.jsonl").write_text(json.dumps(made_up) + "\n")
        return outcomes.get(step.name, Outcome.PASSED)

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out)])
    return ran


def test_a_run_that_is_cut_off_leaves_the_report_of_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, step in enumerate(STEPS[1:], 1):
        as_if_on_a_card(monkeypatch, tmp_path, {}, cut=step.name)
        with pytest.raises(KeyboardInterrupt):
            gpu.main()
        text = (tmp_path / "report.md").read_text()
        assert text.count("| passed |") == number
        assert "3 tests of kernels and paths passed on this card" in text
        assert "No GPU was here" not in text
        assert text.count("jobs in flight") == number - 1
        assert f"| {step.name} |" not in text


def test_a_whole_run_says_how_each_step_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.records.jsonl").write_text("of an earlier run")
    (tmp_path / "old.notes.json").write_text(json.dumps(notes(failed=("of an earlier run",))))
    (tmp_path / "mine.txt").write_text("kept")
    ran = as_if_on_a_card(monkeypatch, tmp_path, {"kernels": Outcome.STOPPED})
    assert gpu.main() == 1  # one step did not end
    assert ran == [step.name for step in STEPS]
    text = (tmp_path / "report.md").read_text()
    assert "| kernels | stopped: it did not end |" in text
    assert "of an earlier run" not in text
    assert (tmp_path / "mine.txt").read_text() == "kept"
    as_if_on_a_card(monkeypatch, tmp_path, {})
    assert gpu.main() == 0
    assert "Measured on NVIDIA H200" in (tmp_path / "report.md").read_text()


def test_wrong_bytes_stop_it_with_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = as_if_on_a_card(monkeypatch, tmp_path, {"correctness": Outcome.FAILED})
    assert gpu.main() == 1
    assert ran == ["correctness"]
    assert "Correctness failed: nothing was measured" in capsys.readouterr().out
    assert "**Correctness failed, and nothing was measured" in (tmp_path / "report.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out")])
    assert gpu.main() == 2
    assert "no GPU" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_is_promised_is_measured_apart_from_the_rest() -> None:
    largest = dict(reversed(jobs()))
    big = max(size for size in largest if size >= 4 * KIB)
    assert is_promised("test_alone", {"name": "auto", "job": (big, largest[big])})
    assert is_promised("test_alone", {"name": "staged", "job": (big, largest[big])})
    assert not is_promised("test_alone", {"name": "auto", "job": (big, 16)})
    assert not is_promised("test_alone", {"name": "vLLM", "job": (big, largest[big])})
    assert not is_promised("test_alone", {"name": "auto", "job": (512, largest[512])})
    assert is_promised("test_both_at_once", {"name": "auto", "page_bytes": 4 * KIB})
    assert is_promised("test_slowdown", {"name": "one copy"})
    assert not is_promised("test_slowdown", {"name": "zero_copy"})
    assert is_promised("test_small_copy_during_a_load", {"window": None})
    assert not is_promised("test_small_copy_during_a_load", {"window": 16 * MIB})
    assert not is_promised("test_slots", {"name": "auto", "page_bytes": 4 * KIB})


# -- a process of its own --


def child(text: str, seconds: float) -> Outcome:
    return measuring.run([sys.executable, "-c", text], dict(os.environ), seconds)


def test_a_process_that_does_not_end_is_asked_to_and_what_it_started_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert child("raise SystemExit(0)", 60) is Outcome.PASSED
    assert child("raise SystemExit(5)", 60) is Outcome.PASSED  # pytest: nothing was chosen
    assert child("raise SystemExit(1)", 60) is Outcome.FAILED
    written, grandchild = tmp_path / "written", tmp_path / "pid"
    obedient = (
        "import pathlib, subprocess, sys, time\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(grandchild)!r}).write_text(str(other.pid))\n"
        "try:\n    time.sleep(600)\n"
        f"except KeyboardInterrupt:\n    pathlib.Path({str(written)!r}).write_text('all it had')\n"
    )
    assert child(obedient, 5) is Outcome.STOPPED
    assert written.read_text() == "all it had"
    pid = int(grandchild.read_text())
    deadline = time.monotonic() + 30
    status = Path(f"/proc/{pid}/status")  # it is a zombie until somebody reaps it
    while status.exists() and "(zombie)" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    monkeypatch.setattr(measuring, "ENDING_SECONDS", 0.5)
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(600)"
    assert child(deaf, 3) is Outcome.STOPPED


# -- a bare machine --


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing of REFUSED can be imported."""
    place = tmp_path / "site"
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {REFUSED!r}:\n"
        "            raise ImportError(f'{name} is not on a bare machine')\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    environment = environment_of()
    environment["PYTHONPATH"] = os.pathsep.join((str(place), environment["PYTHONPATH"]))
    return environment


def test_the_refusal_refuses(bare: dict[str, str]) -> None:
    command = [sys.executable, "-c", "import hypothesis"]
    done = subprocess.run(command, env=bare, capture_output=True, text=True, check=False)
    assert "hypothesis is not on a bare machine" in done.stderr


def test_correctness_and_every_benchmark_is_collected_on_a_bare_machine(
    bare: dict[str, str], tmp_path: Path
) -> None:
    benchmarks = dict.fromkeys(file for step in STEPS[1:] for file in step.files)
    for step in (STEPS[0], Step("all", 1, tuple(benchmarks))):
        options = [*gpu.options_of(step, tmp_path), "--collect-only"]
        command = command_of(step.files, step.name, tmp_path, 60, options)
        done = subprocess.run(
            command, cwd=ROOT, env=bare, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "error" not in done.stdout.lower()


def test_a_step_runs_and_its_report_is_written_on_a_bare_machine(
    bare: dict[str, str], tmp_path: Path
) -> None:
    """Of the tests of a card all are skipped here, which needs all of their imports."""
    first = STEPS[0]
    assert "--noconftest" in gpu.options_of(first, tmp_path)
    assert gpu.measure(first, gpu.Allowed(60, 280), tmp_path, bare) is Outcome.PASSED
    noted = json.loads((tmp_path / "correctness.notes.json").read_text())
    assert noted["failed"] == []
    assert sum(noted["skipped"].values()) > 100 or noted["passed"] > 100
    script = (
        "import sys; from pathlib import Path; import gpu\n"
        "done = [gpu.Done('correctness', gpu.Outcome.PASSED, 1.0)]\n"
        "print(gpu.write(done, Path(sys.argv[1]), plots=True))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "## Steps" in (tmp_path / "report.md").read_text()
