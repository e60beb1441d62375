"""Random schedules of every configuration: no wrong byte, no race, no submission that blocks.

`TRITON_OFFLOAD_SCHEDULES` is how many there are in all (20,000); each has a seed of its own. The
seeds are new ones in every run, and printed: `TRITON_OFFLOAD_FIRST_SEED` runs those from there on.
"""

from __future__ import annotations

import gc
import os
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from schedules import CONFIGURATIONS, MIN_OPERATIONS, Facts, run_schedule, run_schedules

from triton_offload.testing.engine import EngineMemory

SCHEDULES = int(os.environ.get("TRITON_OFFLOAD_SCHEDULES", "20000"))
FIRST_SEED = int(
    os.environ.get("TRITON_OFFLOAD_FIRST_SEED") or int.from_bytes(os.urandom(4), "big")
)
BATCH = 250  # to a process at a time
WORLD = 25  # schedules in one world


def run_batch(name: str, first: int, count: int) -> tuple[list[Facts], list[str]]:
    """Facts of the schedules that were right, and what was wrong with the others."""
    torch.set_num_threads(1)
    # A tenth of the time went into looking again and again at what a world keeps till its end.
    gc.freeze()
    gc.set_threshold(100_000)
    facts, failures = [], []
    for start in range(first, first + count, WORLD):
        seeds = range(start, min(start + WORLD, first + count))
        try:
            facts += run_schedules(CONFIGURATIONS[name], seeds)
        except BaseException:
            again = f"python tests/schedules.py {name!r} {seeds[0]} {seeds[-1] + 1}"
            failures.append(f"{again}\n{traceback.format_exc(limit=-8)}")
    return facts, failures


@pytest.fixture(scope="module")
def workers():
    # Forked from a process with threads (torch's own), they might hang.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_schedule_is_wrong(name, workers, capsys):
    count = -(-SCHEDULES // len(CONFIGURATIONS))
    end = FIRST_SEED + count
    start = time.perf_counter()
    batches = [
        workers.submit(run_batch, name, first, min(BATCH, end - first))
        for first in range(FIRST_SEED, end, BATCH)
    ]
    facts, failures = [], []
    for batch in batches:
        right, wrong = batch.result()
        facts += right
        failures += wrong
        assert len(failures) < 5, "\n".join(failures)
    assert not failures, "\n".join(failures)
    assert len(facts) == count
    assert min(fact.operations for fact in facts) >= MIN_OPERATIONS
    assert min(fact.crossings for fact in facts) >= 1
    assert min(fact.wraps for fact in facts) >= 2
    with capsys.disabled():
        operations = sum(fact.operations for fact in facts)
        print(
            f"\n{name}: seeds {FIRST_SEED} to {end - 1}, {operations:,} operations, "
            f"{sum(fact.jobs for fact in facts):,} jobs, {time.perf_counter() - start:.0f} s",
            end=" ",
        )


def test_what_a_batch_says_of_a_failure_runs_it_again(monkeypatch):
    def wrong(self: EngineMemory) -> None:
        raise AssertionError("made up")

    monkeypatch.setattr(EngineMemory, "check_reads", wrong)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(gc, "set_threshold", lambda count: None)
    threads = torch.get_num_threads()
    facts, (failure,) = run_batch("staged", 7, 2)
    torch.set_num_threads(threads)
    assert facts == []
    assert failure.startswith("python tests/schedules.py 'staged' 7 9\n")
    assert "made up" in failure


def test_a_failing_schedule_prints_what_replays_it(monkeypatch):
    def wrong(self: EngineMemory) -> None:
        raise AssertionError("made up")

    monkeypatch.setattr(EngineMemory, "check_reads", wrong)
    with pytest.raises(AssertionError, match="made up") as caught:
        run_schedule(CONFIGURATIONS["staged"], 3)
    notes = "".join(caught.value.__notes__)
    assert "SimulatedDevice(seed=3)" in notes
    assert "run #" in notes
