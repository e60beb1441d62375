"""Operations a second of our manager beside vLLM's, in turn on the same requests.

    python bench/run.py manager

Needs the trace that tests/test_trace_hit_rates.py describes, and vLLM for the peer. A pool is
filled with other keys first, so that each store evicts, whatever its size. One operation is one
key in one call; four calls are counted for every key of a request.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from timing import note

from triton_offload.scheduler.manager import CPUOffloadingManager

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "traces"
TRACE = (
    Path(os.environ.get("TRITON_OFFLOAD_TRACES") or DEFAULT_FOLDER) / "mooncake_conversation.jsonl"
)
NUM_REQUESTS = 12_031
FILL = 1000  # keys of one filling store

BLOCK = 500  # requests of one manager before the other has its turn

Request = list[int]
Requests = list[list[bytes]]
Drive = Callable[[Requests], None]


def as_key(number: int) -> bytes:
    """A 32-byte hash and a 4-byte group, as vLLM's OffloadKey has them."""
    return number.to_bytes(32, "little") + bytes(4)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    if not TRACE.is_file():
        pytest.skip(f"no trace at {TRACE}")
    with TRACE.open() as lines:
        return [json.loads(line)["hash_ids"] for line in lines][:NUM_REQUESTS]


def as_keys(requests: list[Request]) -> Requests:
    return [[as_key(i) for i in request] for request in requests]


def filler(num_chunks: int) -> Requests:
    keys = [as_key((1 << 40) + i) for i in range(num_chunks)]
    return [keys[i : i + FILL] for i in range(0, num_chunks, FILL)]


def ours(num_chunks: int, policy: str) -> Drive:
    manager = CPUOffloadingManager(num_chunks, policy)

    def drive(requests: Requests) -> None:
        for keys in requests:
            found = manager.lookup(keys)
            manager.touch(keys)
            hits, rest = keys[:found], keys[found:]
            manager.prepare_load(hits)
            manager.complete_load(hits)
            output = manager.prepare_store(rest)
            assert output is not None
            manager.complete_store(output.keys_to_store)

    return drive


def peer(num_chunks: int, policy: str) -> Drive:
    """vLLM's manager. It counts uses when a request finishes, which stands for our touch."""
    base = pytest.importorskip("vllm.v1.kv_offload.base")
    manager_module = pytest.importorskip("vllm.v1.kv_offload.cpu.manager")
    manager = manager_module.CPUOffloadingManager(num_chunks, policy)
    hit = base.LookupResult.HIT

    def drive(requests: Requests) -> None:
        for number, keys in enumerate(requests):
            context: Any = base.ReqContext(req_id=str(number))
            manager.on_new_request(context)
            found = 0
            for key in keys:
                if manager.lookup(key, context) is not hit:
                    break
                found += 1
            hits, rest = keys[:found], keys[found:]
            manager.prepare_load(hits, context)
            manager.complete_load(hits, context)
            output = manager.prepare_store(rest, context)
            assert output is not None
            manager.complete_store(output.keys_to_store, context)
            manager.on_request_finished(context)

    return drive


@pytest.mark.parametrize("policy", ["lru", "arc"])
@pytest.mark.parametrize("num_chunks", [10_000, 1_000_000])
def test_operations_a_second(
    benchmark: Any, requests: list[Request], num_chunks: int, policy: str
) -> None:
    managers = {"ours": ours(num_chunks, policy)}
    with suppress(pytest.skip.Exception):  # ours is measured without it
        managers["peer"] = peer(num_chunks, policy)
    for drive in managers.values():
        drive(filler(num_chunks))
    blocks = iter([requests[i : i + BLOCK] for i in range(0, len(requests), BLOCK)])
    peer_seconds: list[float] = []

    def in_turn() -> tuple[tuple[Requests], dict[str, Any]]:
        block = next(blocks)
        if "peer" in managers:
            copies = as_keys(block)  # a bytes object keeps its hash, and whoever comes first pays
            start = time.perf_counter()
            managers["peer"](copies)
            peer_seconds.append(time.perf_counter() - start)
        return (as_keys(block),), {}

    rounds = -(-len(requests) // BLOCK)
    benchmark.pedantic(managers["ours"], setup=in_turn, rounds=rounds)
    operations = 4 * sum(map(len, requests))
    speed = operations / benchmark.stats.stats.total
    note(benchmark, "manager", policy=policy, chunks=num_chunks, operations_per_second=speed)
    if peer_seconds:
        peer_speed = operations / sum(peer_seconds)
        benchmark.extra_info |= {"peer_speed": peer_speed, "ratio": speed / peer_speed}
        print(f"\n{policy}, {num_chunks:,} chunks: {speed / 1e6:.2f} M operations a second, ")
        print(f"vLLM's {peer_speed / 1e6:.2f} M")
