"""Operations a second of our manager beside vLLM's, on the same requests in one run.

    pytest bench/test_manager.py --benchmark-group-by=group

Needs the trace that tests/test_trace_hit_rates.py describes, and vLLM for the peer; what is
missing is skipped. A pool is filled with other keys first, so that each store evicts, whatever
its size. One operation is one key in one call.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triton_offload.manager import CPUOffloadingManager

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "traces"
TRACE = (
    Path(os.environ.get("TRITON_OFFLOAD_TRACES") or DEFAULT_FOLDER) / "mooncake_conversation.jsonl"
)
NUM_REQUESTS = 12_031
FILL = 1000  # keys of one filling store

Requests = list[list[bytes]]
Drive = Callable[[Requests], int]


def as_key(number: int) -> bytes:
    """A 32-byte hash and a 4-byte group, as vLLM's OffloadKey has them."""
    return number.to_bytes(32, "little") + bytes(4)


@pytest.fixture(scope="module")
def requests() -> Requests:
    if not TRACE.is_file():
        pytest.skip(f"no trace at {TRACE}")
    with TRACE.open() as lines:
        ids = [json.loads(line)["hash_ids"] for line in lines]
    return [[as_key(i) for i in request] for request in ids[:NUM_REQUESTS]]


def filler(num_chunks: int) -> Requests:
    keys = [as_key((1 << 40) + i) for i in range(num_chunks)]
    return [keys[i : i + FILL] for i in range(0, num_chunks, FILL)]


def ours(num_chunks: int, policy: str) -> Drive:
    manager = CPUOffloadingManager(num_chunks, policy)

    def drive(requests: Requests) -> int:
        operations = 0
        for keys in requests:
            found = manager.lookup(keys)
            manager.touch(keys)
            hits, rest = keys[:found], keys[found:]
            manager.prepare_load(hits)
            manager.complete_load(hits)
            output = manager.prepare_store(rest)
            assert output is not None
            manager.complete_store(output.keys_to_store)
            operations += 4 * len(keys)
        return operations

    return drive


def peer(num_chunks: int, policy: str) -> Drive:
    """vLLM's manager. It counts uses when a request finishes, which stands for our touch."""
    base = pytest.importorskip("vllm.v1.kv_offload.base")
    manager_module = pytest.importorskip("vllm.v1.kv_offload.cpu.manager")
    manager = manager_module.CPUOffloadingManager(num_chunks, policy)
    hit = base.LookupResult.HIT

    def drive(requests: Requests) -> int:
        operations = 0
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
            operations += 4 * len(keys)
        return operations

    return drive


@pytest.mark.parametrize("build", [ours, peer])
@pytest.mark.parametrize("policy", ["lru", "arc"])
@pytest.mark.parametrize("num_chunks", [10_000, 1_000_000])
def test_operations_a_second(
    benchmark: Any,
    requests: Requests,
    num_chunks: int,
    policy: str,
    build: Callable[[int, str], Drive],
) -> None:
    benchmark.group = f"{policy}, {num_chunks} chunks"

    def filled() -> tuple[tuple[Drive], dict[str, Any]]:
        drive = build(num_chunks, policy)
        drive(filler(num_chunks))
        return (drive,), {}

    operations = benchmark.pedantic(lambda drive: drive(requests), setup=filled, rounds=3)
    seconds = benchmark.stats.stats.min
    benchmark.extra_info["operations_per_second"] = round(operations / seconds)
    print(f"\n{benchmark.group}: {build.__name__} {operations / seconds / 1e6:.2f} M operations/s")
