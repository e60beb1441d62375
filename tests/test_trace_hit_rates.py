"""The hit rates of the eviction policies on an hour of real requests.

The trace (Mooncake's conversation trace) isn't part of this repository: `TRITON_OFFLOAD_TRACES`
names the folder it lies in, `../shared/traces` beside the repository is the default.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from triton_offload.scheduler.manager import CPUOffloadingManager

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "traces"
TRACE = (
    Path(os.environ.get("TRITON_OFFLOAD_TRACES") or DEFAULT_FOLDER) / "mooncake_conversation.jsonl"
)


@pytest.fixture(scope="module")
def requests() -> list[list[bytes]]:
    if not TRACE.is_file():
        pytest.skip(f"no trace at {TRACE}")
    with TRACE.open() as lines:
        return [[i.to_bytes(8, "little") for i in json.loads(line)["hash_ids"]] for line in lines]


def prefix_hit_rate(manager: CPUOffloadingManager, requests: list[list[bytes]]) -> float:
    """Leading hits over all references, each request loaded and stored before the next one."""
    hits = 0
    for keys in requests:
        found = manager.lookup(keys)
        manager.touch(keys)
        manager.prepare_load(keys[:found])
        manager.complete_load(keys[:found])
        output = manager.prepare_store(keys[found:])
        assert output is not None
        manager.complete_store(output.keys_to_store)
        hits += found
    return hits / sum(map(len, requests))


@pytest.mark.parametrize(
    ("policy", "num_chunks", "at_least"),
    [
        ("lru", 10_000, 0.2115),
        ("lru", 30_000, 0.3257),
        ("arc", 10_000, 0.2225),
        ("arc", 30_000, 0.3109),
    ],
)
def test_the_hit_rate_is_that_of_a_sound_policy(
    requests: list[list[bytes]], policy: str, num_chunks: int, at_least: float
) -> None:
    manager = CPUOffloadingManager(num_chunks, policy)
    rate = prefix_hit_rate(manager, requests)
    manager._check()
    print(f"{policy} {num_chunks}: {rate:.4f}")
    assert at_least <= rate <= 0.366  # an unlimited pool reaches 0.366


def test_a_pool_that_holds_everything_hits_all_that_was_seen_before(
    requests: list[list[bytes]],
) -> None:
    assert prefix_hit_rate(CPUOffloadingManager(1_000_000), requests) == pytest.approx(
        0.366, abs=0.001
    )
