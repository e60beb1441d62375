"""Tensor and pipeline parallelism: ranks that are real processes, joined by gloo.

Without an engine: the pool of each rank, the region that all share on CUDA, and stages that differ.
With engines of two ranks: as `test_vllm_engine.py`, and what fails on one rank only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import of_session, wait_until

_SCRIPT = Path(__file__).with_name("ranks.py")
_OTHER_VLLM = Path(sys.prefix) / "vllm-0.33"


# -- two ranks without an engine --


@pytest.fixture(scope="module", params=["0.32", pytest.param("0.33", marks=pytest.mark.deep)])
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two joined ranks saw, by rank, on either version of vLLM."""
    path = [str(_SCRIPT.parent.parent)]
    if request.param == "0.33":
        if not _OTHER_VLLM.exists():
            pytest.skip(f"no Python files of vLLM 0.33 in {_OTHER_VLLM}")
        path.insert(0, str(_OTHER_VLLM))
    folder = tmp_path_factory.mktemp("group")
    engine_id = f"test-ranks-{os.getpid()}-{time.monotonic_ns()}"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, _SCRIPT.with_name("rank_group.py"), str(rank), folder, engine_id],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, told = rank.communicate(timeout=400)
            assert rank.returncode == 0, told[-4000:]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    seen = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    assert all(each["version"].startswith(request.param) for each in seen)
    return seen


def test_each_rank_has_a_pool_of_exactly_its_share(group: Any) -> None:
    for each in group:
        pool = each["private"]
        assert pool["slots"] == pool["chunks"] == 10
        assert pool["slot_bytes"] == 3 * 512
        assert pool["memory"] == pool["slots"] * pool["slot_bytes"]


def test_uneven_stages_are_refused_on_both_ranks(group: Any) -> None:
    for each in group:
        told = dict(each["stages"])
        assert told.pop("[512, 512]") == ""
        assert len(told) == 3
        for sizes, message in told.items():
            assert message.startswith("pipeline_parallel_size: "), sizes
            assert f"got {sizes}, by rank" in message


def test_in_one_region_each_rank_writes_its_own_slots_and_no_byte_of_the_others(
    group: Any,
) -> None:
    import rank_group as ranks
    from vllm_parts import GROUPS, SLOT, STORED, random_caches, store_by_hand

    first, second = (each["region"] for each in group)
    rows = torch.zeros_like(first["filled"])
    assert rows.shape == (10, 4096)  # two slots, and padding
    rows[:, 2 * SLOT :] = ranks.PADDING
    for step, writers, moved in (
        ("filled", (0, 1), ranks.FILLED),
        ("stored by one", (0,), ranks.PARTIAL),
        ("stored by both", (1,), ranks.PARTIAL),
    ):
        for rank in writers:
            column = rows[:, rank * SLOT : (rank + 1) * SLOT]
            store_by_hand(column, random_caches(rank), *moved)
        # Each has the same region, and its rows are what the format says.
        assert torch.equal(first[step], rows), step
        assert torch.equal(second[step], rows), step
    for rank, each in enumerate((first, second)):
        assert torch.equal(each["loaded"], rows), "a load changed the region"
        wanted = [
            torch.full_like(cache.tensor, ranks.CACHE_POISON)
            for cache in random_caches(rank).tensors
        ]
        for pages, blocks in zip(GROUPS, STORED, strict=True):
            for tensor, size in pages:
                original = random_caches(rank).tensors[tensor].tensor
                wanted[tensor][blocks, :size] = original[blocks, :size]
        for got, page in zip(each["caches"], wanted, strict=True):
            assert torch.equal(got, page)


def test_the_regions_name_is_gone_once_both_have_it_and_its_memory_after_shutdown(
    group: Any,
) -> None:
    for each in group:
        assert not each["region"]["named"]
        assert each["region"]["unmapped"]


# -- engines --


class Scenarios:
    """Engines of two ranks; `parallel` is "tensor" or "pipeline"."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def start(self, scenario: str, parallel: str) -> Iterator[tuple[Any, Path]]:
        """The scenario's client, and the file that it writes. Ends all of its session."""
        output = self._folder / f"{scenario}-{parallel}.json"
        output.unlink(missing_ok=True)
        command = [sys.executable, _SCRIPT, scenario, self._folder / "model", output, parallel]
        with (self._folder / "log").open("wb") as log:
            client = subprocess.Popen(
                command, cwd=_SCRIPT.parent.parent, stderr=log, start_new_session=True
            )
        try:
            yield client, output
        finally:
            for process in of_session(client.pid):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            client.wait()

    def run(self, scenario: str, parallel: str) -> dict[str, Any]:
        with self.start(scenario, parallel) as (client, output):
            assert client.wait(900) == 0, self.log()
            wait_until(lambda: not of_session(client.pid), lambda: of_session(client.pid))
        seen: dict[str, Any] = json.loads(output.read_text())
        return seen

    def log(self) -> str:
        return (self._folder / "log").read_text()[-8000:]


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> Scenarios:
    return Scenarios(tmp_path_factory.mktemp("ranks"))


def _check_nothing_remains(files: list[str]) -> None:
    """Of the shared memory that the ranks had under a name.

    What vLLM's own communicator of the CPU platform leaves, with no connector too, goes here.
    """
    assert files, "ranks that share nothing"
    for file in files:
        if Path(file).name.startswith("vllm_dist_"):
            Path(file).unlink(missing_ok=True)
    assert not [file for file in files if Path(file).exists()]


def _jobs(loads: int, stores: int, failed_loads: int = 0, failed_stores: int = 0) -> dict[str, int]:
    return {
        "loads": loads,
        "failed_loads": failed_loads,
        "stores": stores,
        "failed_stores": failed_stores,
    }


@pytest.mark.deep
@pytest.mark.engine
@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_answers_equal_those_without_a_connector_whatever_fails_on_one_rank(
    scenarios: Scenarios, parallel: str
) -> None:
    wanted = scenarios.run("plain", parallel)["answers"]
    seen = scenarios.run("connected", parallel)
    for pool in seen["pools"]:
        assert pool["slots"] == pool["chunks"] == (64 << 20) // pool["world_chunk_bytes"]
        assert pool["slot_bytes"] == 2 * pool["block_bytes"]
        assert 2 * pool["slot_bytes"] == pool["world_chunk_bytes"]
        assert pool["memory"] == pool["slots"] * pool["slot_bytes"]
    assert [pool["rank"] for pool in seen["pools"]] == [0, 1]
    assert seen["poisoned_bytes"] > 0
    flipped = seen["flipped"]
    assert not any(a == b for a, b in zip(flipped["answers"], wanted, strict=True))
    for name in ("stored", "loaded", "one load fails", "one store fails", "loaded after it"):
        assert seen[name]["answers"] == wanted, name
    for name in ("loaded", "loaded after it", "flipped"):  # each of the four had something to load
        assert [jobs["loads"] for jobs in seen[name]["jobs"]] == [4, 4], name
        assert [jobs["failed_loads"] for jobs in seen[name]["jobs"]] == [0, 0], name
    first, second = seen["one load fails"]["jobs"]
    assert first == _jobs(loads=4, stores=first["stores"])
    assert second == _jobs(loads=3, stores=first["stores"], failed_loads=1)
    first, second = seen["one store fails"]["jobs"]
    assert first == _jobs(loads=first["loads"], stores=first["stores"])
    assert second == _jobs(first["loads"], first["stores"] - 1, failed_stores=1)
    _check_nothing_remains(seen["shared_files"])


@pytest.mark.deep
@pytest.mark.engine
def test_a_killed_rank_ends_the_whole_engine_and_nothing_remains(scenarios: Scenarios) -> None:
    with scenarios.start("until_killed", "tensor") as (client, started):
        wait_until(started.exists, scenarios.log, seconds=500)
        ranks = [i for i, name in of_session(client.pid).items() if name.startswith("VLLM::Worker")]
        assert len(ranks) == 2
        os.kill(max(ranks), signal.SIGKILL)
        assert client.wait(300) != 0
        assert "EngineDeadError" in scenarios.log()
        wait_until(lambda: not of_session(client.pid), lambda: of_session(client.pid))
        _check_nothing_remains(json.loads(started.read_text())["shared_files"])
