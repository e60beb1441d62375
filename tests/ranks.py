"""Runs one scenario with an engine of two ranks, each a process of its own on the CPU platform.

What is asked of a rank, its pool and its transfers, is asked through vLLM's `collective_rpc`: the
answers come by rank. `python tests/ranks.py SCENARIO MODEL OUTPUT (tensor | pipeline)`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import FEW, FEW_TOKENS, transfer
from engine import until_killed as engine_until_killed
from faulty import fail
from processes import of_session, shared_files

from triton_offload.cli.demo import Engine
from triton_offload.cli.demo_model import tiny_llama

RANKS = 2
HOST_BYTES = 64 << 20
BLOCKS_PER_CHUNK = 2
FAILING_RANK = 1


class RankedEngine(Engine):
    """An engine whose scheduler is in this process, and whose ranks are not."""

    def __init__(self, model: Path, parallel: str, kv_transfer_config: Any = None) -> None:
        super().__init__(
            model,
            max_model_len=1024,
            distributed_executor_backend="mp",
            kv_transfer_config=kv_transfer_config,
            **{f"{parallel}_parallel_size": RANKS},
        )
        # Stages after the first need a buffer that vLLM makes when it warms up, which it leaves
        # out on the CPU platform unless it compiles the model.
        self.each_rank(_warm_up)

    def each_rank(self, ask: Callable[..., Any], *args: Any) -> list[Any]:
        """What each rank's process answers."""
        answers: list[Any] = self.llm.collective_rpc(ask, args=args)
        assert len(answers) == RANKS
        return answers

    def settle(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            self.generate([[1, 2, 3]], 2)  # no whole block, so nothing new to store
            if not any(self.each_rank(_in_flight)):
                return
            assert time.monotonic() < deadline, "the transfers did not end"


def _warm_up(worker: Any) -> None:
    worker.model_runner._dummy_run(1)


def _connector_worker() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().connector_worker


def _in_flight(worker: Any) -> int:
    half = _connector_worker()
    return len(half._unsubmitted_store_jobs) + int(half.worker.transfers.num_in_flight)


def _pool(worker: Any) -> dict[str, int]:
    """This rank's pool, and what the spec says that it is to be."""
    half = _connector_worker()
    pool = half.worker.transfers.pool
    caches = {c.untyped_storage().data_ptr(): c for c in worker.model_runner.kv_caches}
    return {
        "rank": worker.rank,
        "process": os.getpid(),
        "slots": pool.num_slots,
        "slot_bytes": pool.slot_bytes,
        "memory": pool.slots.untyped_storage().nbytes(),
        "chunks": half.spec.num_chunks,
        "world_chunk_bytes": half.spec.kv_bytes_per_chunk,
        "block_bytes": sum(c.untyped_storage().nbytes() for c in caches.values())
        // worker.model_runner.kv_cache_config.num_blocks,
    }


def _jobs(worker: Any) -> dict[str, int]:
    transfers = _connector_worker().worker.transfers
    return {
        "loads": transfers.loads.succeeded,
        "failed_loads": transfers.loads.failed,
        "stores": transfers.stores.succeeded,
        "failed_stores": transfers.stores.failed,
    }


def _let_fail(worker: Any, kind: str, times: int) -> None:
    """Of the host device's next operations of this kind so many fail, on one of the ranks."""
    if worker.rank != FAILING_RANK:
        return
    device = _connector_worker().worker.transfers.pool.device
    operate = getattr(type(device), kind)

    def maybe_fail(*args: Any, **kwargs: Any) -> None:
        nonlocal times
        if times > 0:
            times -= 1
            args[5].put(fail)  # the stream
        operate(device, *args, **kwargs)

    setattr(device, kind, maybe_fail)


def _flip(worker: Any) -> None:
    """Change the sign of every float in the pool of one rank."""
    if worker.rank == FAILING_RANK:
        _connector_worker().worker.transfers.pool.slots.bitwise_xor_(0x80)


def plain(model: Path, parallel: str) -> dict[str, Any]:
    """Without a connector, each prompt recomputed."""
    engine = RankedEngine(model, parallel)
    answers = []
    for prompt in FEW:
        engine.forget()
        answers.append(engine.generate([prompt], FEW_TOKENS)[0].token_ids)
    return {"answers": answers}


def connected(model: Path, parallel: str) -> dict[str, Any]:
    """Stored and loaded; then loads and stores fail on one of the ranks; then an orderly end."""
    config = transfer(BLOCKS_PER_CHUNK, path="staged", cpu_bytes_to_use=HOST_BYTES)
    engine = RankedEngine(model, parallel, config)
    seen: dict[str, Any] = {"pools": engine.each_rank(_pool)}

    def run(name: str, loaded: bool) -> None:
        before = engine.each_rank(_jobs)
        answers = []
        engine.forget(host_pool_too=not loaded)
        for prompt in FEW:
            if loaded:
                engine.settle()
                engine.forget()
                seen["poisoned_bytes"] = engine.poison()
            answers.append(engine.generate([prompt], FEW_TOKENS)[0].token_ids)
        engine.settle()
        after = engine.each_rank(_jobs)
        counts = [
            {kind: now[kind] - was[kind] for kind in now}
            for was, now in zip(before, after, strict=True)
        ]
        seen[name] = {"answers": answers, "jobs": counts}

    run("stored", loaded=False)
    run("loaded", loaded=True)
    engine.each_rank(_let_fail, "scatter", 1)
    run("one load fails", loaded=True)
    engine.each_rank(_let_fail, "gather", 1)
    run("one store fails", loaded=False)
    run("loaded after it", loaded=True)
    engine.each_rank(_flip)
    run("flipped", loaded=True)
    processes = [each["process"] for each in seen["pools"]]
    seen["shared_files"] = sorted(map(str, shared_files(processes)))
    engine.close()
    return seen


def until_killed(model: Path, started: Path, parallel: str) -> None:
    """An engine core and two ranks, all processes of their own, that answer until they end.

    `started` is written when they have answered once.
    """

    def seen() -> dict[str, Any]:
        return {"shared_files": sorted(map(str, shared_files(of_session())))}

    engine_until_killed(model, started, seen, **{f"{parallel}_parallel_size": RANKS})


def main(scenario: str, model: str, output: str, parallel: str) -> None:
    # vllm and what it imports warn about each other; what our own modules do must not warn.
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module="triton_offload")
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else each rank wants a NUMA node
    path = tiny_llama(Path(model))
    if scenario == "until_killed":
        return until_killed(path, Path(output), parallel)
    seen = {"plain": plain, "connected": connected}[scenario](path, parallel)
    Path(output).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
