"""A real vLLM engine: what it answers when its KV cache comes from our host pool.

The model is a tiny random Llama in float32, or a Gemma 3 of three KV cache groups, whose slots
differ in size. Before every load all bytes of the device's KV cache are overwritten, so that an
answer can only be right if the load was.
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
from processes import of_session, wait_until

pytestmark = pytest.mark.engine

_SCRIPT = Path(__file__).with_name("engine.py")

# Beside another process on the other core: of two threads one would spin for the other's end, which
# took three times the processor's time.
_ONE_CORE = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class Scenarios:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def running(self) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
        """An engine in processes of its own that has answered: its client, and the others' ids."""
        started = self._folder / "started.json"
        started.unlink(missing_ok=True)
        command = [sys.executable, _SCRIPT, "until_killed", self._folder / "model", started]
        log = self._folder / "log"
        with log.open("wb") as file:
            client = subprocess.Popen(
                command,
                cwd=_SCRIPT.parent.parent,
                env=os.environ | _ONE_CORE,
                stderr=file,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + 600
            while not started.exists():
                assert client.poll() is None, log.read_text()[-8000:]
                assert time.monotonic() < deadline, "the engine did not answer"
                time.sleep(0.1)
            yield client, json.loads(started.read_text())["children"]
        finally:
            for process in of_session(client.pid):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            client.wait()

    def run(
        self, scenario: str, blocks_per_chunk: int = 1, model_name: str = "model"
    ) -> dict[str, Any]:
        output = self._folder / "output.json"
        model = self._folder / model_name
        command = [sys.executable, _SCRIPT, scenario, model, output, str(blocks_per_chunk)]
        done = subprocess.run(
            command,
            cwd=_SCRIPT.parent.parent,
            env=os.environ | _ONE_CORE,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{scenario}:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        seen: dict[str, Any] = json.loads(output.read_text())
        return seen


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> Scenarios:
    return Scenarios(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def plain(scenarios: Scenarios) -> dict[str, Any]:
    """The answers of an engine without a connector."""
    seen = scenarios.run("plain")
    # Outputs of nearly tied logits may flip with the shape of the batch alone.
    assert seen["smallest_margin"] > 1e-3
    return seen


@pytest.fixture(scope="module")
def broken(scenarios: Scenarios) -> dict[str, Any]:
    """As `intact` with two blocks per chunk, then with loads that bring the wrong bytes."""
    return scenarios.run("broken", 2)


@pytest.mark.parametrize(
    "blocks_per_chunk",
    [pytest.param(1, marks=pytest.mark.deep), 2, pytest.param(4, marks=pytest.mark.deep)],
)
def test_loaded_outputs_equal_those_without_a_connector(
    scenarios: Scenarios, plain: dict[str, Any], broken: dict[str, Any], blocks_per_chunk: int
) -> None:
    seen = broken if blocks_per_chunk == 2 else scenarios.run("intact", blocks_per_chunk)
    assert seen["stored"] == plain["single"]
    assert seen["loaded"] == plain["single"]
    assert seen["loads"] == len(plain["single"])  # each prompt had something to load
    assert seen["stores"] > 0
    assert seen["loaded_bytes"] > 0


def test_a_load_that_does_nothing_or_loads_flipped_bytes_changes_outputs(
    plain: dict[str, Any], broken: dict[str, Any]
) -> None:
    assert broken["skipped"] == len(plain["single"])
    for wrong in ("without_load", "flipped"):
        same = [a == b for a, b in zip(broken[wrong], plain["single"], strict=True)]
        assert not any(same), f"{wrong}: outputs that should differ: {same}"
    assert broken["mended"] == plain["single"]


@pytest.mark.deep
def test_outputs_stay_equal_under_pressure(scenarios: Scenarios, plain: dict[str, Any]) -> None:
    seen = scenarios.run("pressure", 2)
    for i, answers in enumerate(seen["answers"]):
        assert answers == plain["crowd"], f"round {i}"
    # Both caches were too small: requests were preempted, chunks evicted, stored and loaded again.
    rounds = len(seen["answers"])
    assert rounds >= 2
    assert seen["preempted"] >= rounds
    assert seen["loads"] >= 5 * rounds
    assert seen["stores"] >= 5 * rounds


# Of the round's four prompts each has something to load, and something to store.
_COUNTS: dict[str, dict[str, int]] = {
    "stored": {"failed_loads": 0, "failed_stores": 0},
    "one load fails": {"loads": 3, "failed_loads": 1, "failed_stores": 0},
    "every load fails": {"loads": 0, "failed_loads": 4, "failed_stores": 0},
    "every load of many at once fails": {"loads": 0, "failed_stores": 0},
    "loads work again": {"loads": 4, "failed_loads": 0},
    "every store fails": {"stores": 0, "failed_stores": 4, "failed_loads": 0},
    "nothing was stored": {"loads": 0, "failed_loads": 0, "stores": 0},
    "stores work again": {"failed_stores": 0},
    "every job is refused": {"loads": 0, "stores": 0},
    "jobs are accepted again": {"failed_loads": 0, "failed_stores": 0},
    "loaded at the end": {"loads": 4, "failed_loads": 0},
}


@pytest.mark.deep
def test_whatever_transfer_fails_outputs_equal_those_without_a_connector(
    scenarios: Scenarios, plain: dict[str, Any]
) -> None:
    seen = scenarios.run("failures", 2)
    wanted = [plain["single"][i][:8] for i in (0, 1, 3, 4)]
    assert seen.keys() == _COUNTS.keys()
    for name, counts in _COUNTS.items():
        assert seen[name]["answers"] == wanted, name
        assert {kind: seen[name][kind] for kind in counts} == counts, name
    for name in ("every load of many at once fails", "every job is refused"):
        assert 1 <= seen[name]["failed_loads"] <= 4, name  # no request tries again
    assert seen["every job is refused"]["failed_stores"] == 4


@pytest.mark.deep
def test_one_flipped_bit_of_the_pool_costs_a_recompute_and_is_counted(scenarios: Scenarios) -> None:
    seen = scenarios.run("verified", 2)
    assert seen.pop("wrong_chunks") == 1
    wanted = seen["stored"]["answers"]
    for name, each in seen.items():
        assert each["answers"] == wanted, name
        assert each["failed_loads"] == int(name == "one bit flipped"), name
    assert seen["loaded"]["loads"] == seen["loaded at the end"]["loads"] == 4


def test_a_hybrid_model_survives_failures_too(scenarios: Scenarios) -> None:
    seen = scenarios.run("hybrid", 2, model_name="hybrid")
    wanted = seen.pop("plain")["answers"]
    small, large = sorted(seen.pop("slot_sizes"))
    assert large == 2 * small, "slots of one size: the groups have equally many layers"
    assert all(len(set(answer)) > 2 for answer in wanted), "an answer that is always the same"
    flipped = seen.pop("flipped")["answers"]
    assert not any(a == b for a, b in zip(flipped, wanted, strict=True))
    for name, each in seen.items():
        assert each["answers"] == wanted, name
    for name in ("loaded", "loaded at the end"):
        assert (seen[name]["loads"], seen[name]["failed_loads"]) == (4, 0)
    assert (seen["one load fails"]["loads"], seen["one load fails"]["failed_loads"]) == (3, 1)
    assert (seen["every load fails"]["loads"], seen["every load fails"]["failed_loads"]) == (0, 4)
    assert seen["one store fails"]["failed_stores"] == 1


@pytest.mark.deep
def test_of_a_killed_engine_nothing_remains_and_another_one_starts(scenarios: Scenarios) -> None:
    def regions() -> set[Path]:
        return set(Path("/dev/shm").glob("vllm_offload_*"))

    def of_engine(client: subprocess.Popen[bytes]) -> dict[int, str]:
        return {i: name for i, name in of_session(client.pid).items() if "VLLM" in name}

    before = regions()
    with scenarios.running() as (client, children):
        assert of_engine(client)
        for process in children:
            os.kill(process, signal.SIGKILL)
        # The ranks notice; vLLM's client does not, and waits.
        wait_until(lambda: not of_engine(client), lambda: of_engine(client))
        client.kill()
        client.wait()
        wait_until(lambda: not of_session(client.pid), lambda: of_session(client.pid))
        assert regions() <= before
    with scenarios.running() as (client, _):
        client.send_signal(signal.SIGINT)
        client.wait(120)
        wait_until(lambda: not of_session(client.pid), lambda: of_session(client.pid))
        assert regions() <= before
