"""Runs one scenario with a real engine and writes what it saw as JSON.

Each scenario has a process of its own, for an engine leaves state behind. Most of the time is the
engine's start, so what one engine can show is one scenario.

`python tests/engine.py SCENARIO MODEL OUTPUT [BLOCKS_PER_CHUNK]`.
"""

from __future__ import annotations

import json
import random
import sys
import warnings
from pathlib import Path
from typing import Any

from triton_offload.cli.demo import Engine, tiny_llama

OUTPUT_TOKENS = 24
PRESSURE_TOKENS = 40
PRESSURE_ROUNDS = 20


def prompts(num_prefixes: int, num_suffixes: int, seed: int) -> list[list[int]]:
    """Random prompts that share prefixes; few of their lengths are whole blocks or chunks."""
    rng = random.Random(seed)
    made = []
    for _ in range(num_prefixes):
        prefix = [rng.randrange(3, 512) for _ in range(rng.randint(135, 230))]
        for _ in range(num_suffixes):
            made.append(prefix + [rng.randrange(3, 512) for _ in range(rng.randint(1, 100))])
    return made


SINGLE = prompts(3, 3, seed=1)
CROWD = prompts(6, 3, seed=2)


def one_by_one(engine: Engine, requests: list[list[int]], max_tokens: int) -> list[list[int]]:
    return [engine.generate([prompt], max_tokens)[0].token_ids for prompt in requests]


def plain(model: Path) -> dict[str, Any]:
    """Without a connector, each prompt recomputed."""
    engine = Engine(model)
    smallest = 1e9
    answers: dict[str, list[list[int]]] = {"single": [], "crowd": []}
    sets = {"single": (SINGLE, OUTPUT_TOKENS), "crowd": (CROWD, PRESSURE_TOKENS)}
    for name, (requests, max_tokens) in sets.items():
        for prompt in requests:
            engine.forget()
            answer = engine.generate([prompt], max_tokens)[0]
            answers[name].append(answer.token_ids)
            smallest = min(smallest, *answer.margins)
    return {**answers, "smallest_margin": smallest}


def _connected(
    model: Path, blocks_per_chunk: int, host_bytes: int = 256 << 20, **llm_args: Any
) -> Engine:
    extra = {"cpu_bytes_to_use": host_bytes, "blocks_per_chunk": blocks_per_chunk}
    return Engine(model, extra, **llm_args)


def _reloaded(engine: Engine) -> list[list[int]]:
    """Each prompt with nothing right on the device but what is loaded for it."""
    answers = []
    for prompt in SINGLE:
        engine.settle()
        engine.forget()
        engine.poison()
        answers += one_by_one(engine, [prompt], OUTPUT_TOKENS)
    engine.settle()
    return answers


def intact(model: Path, blocks_per_chunk: int) -> dict[str, Any]:
    """Stored, poisoned, loaded."""
    return _stored_and_loaded(_connected(model, blocks_per_chunk))


def _stored_and_loaded(engine: Engine) -> dict[str, Any]:
    stored = one_by_one(engine, SINGLE, OUTPUT_TOKENS)
    engine.settle()
    loaded = _reloaded(engine)
    worker = engine.worker
    return {
        "stored": stored,
        "loaded": loaded,
        "stores": worker.stores.jobs,
        "loads": worker.loads.jobs,
        "loaded_bytes": worker.loads.num_bytes,
    }


def broken(model: Path, blocks_per_chunk: int) -> dict[str, Any]:
    """After `intact`: loads that do nothing, and then loads of stored bytes flipped."""
    engine = _connected(model, blocks_per_chunk)
    seen = _stored_and_loaded(engine)
    worker = engine.worker
    submit_load = worker.submit_load
    skipped = []

    def do_nothing(job_id: int, src: Any, dst: Any, expedited: bool = False) -> bool:
        from vllm.v1.kv_offload.base import TransferResult

        skipped.append(job_id)
        worker._reports.append(TransferResult(job_id, True, 0, 0.0))
        return True

    worker.submit_load = do_nothing
    without_load = _reloaded(engine)
    worker.submit_load = submit_load
    assert worker.pool is not None
    worker.pool.slots.bitwise_xor_(0x80)  # the sign of every float, and no NaN
    flipped = _reloaded(engine)
    worker.pool.slots.bitwise_xor_(0x80)
    mended = _reloaded(engine)
    return {
        **seen,
        "without_load": without_load,
        "skipped": len(skipped),
        "flipped": flipped,
        "mended": mended,
    }


def pressure(model: Path, blocks_per_chunk: int) -> dict[str, Any]:
    """Many requests at once in a device cache that holds few of them, round after round.

    The host pool is too small as well, so that slots are evicted and written anew all the time.
    """
    preempted = 0
    engine = _connected(
        model,
        blocks_per_chunk,
        host_bytes=24 * blocks_per_chunk * 64 << 10,
        num_gpu_blocks_override=33,  # some four requests' worth
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=512,
    )
    from vllm.v1.core.sched.scheduler import Scheduler

    preempt = Scheduler._preempt_request

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal preempted
        preempted += 1
        return preempt(*args, **kwargs)

    Scheduler._preempt_request = count
    rng = random.Random(3)
    answers: list[list[list[int]]] = []
    for _ in range(PRESSURE_ROUNDS):
        engine.settle()
        engine.forget()
        engine.poison()
        order = rng.sample(range(len(CROWD)), len(CROWD))
        done = engine.generate([CROWD[i] for i in order], PRESSURE_TOKENS)
        by_prompt = dict(zip(order, done, strict=True))
        answers.append([by_prompt[i].token_ids for i in range(len(CROWD))])
    engine.settle()
    worker = engine.worker
    return {
        "answers": answers,
        "preempted": preempted,
        "stores": worker.stores.jobs,
        "loads": worker.loads.jobs,
        "loaded_bytes": worker.loads.num_bytes,
    }


def main(scenario: str, model: str, output: str, blocks_per_chunk: str = "1") -> None:
    # vllm and what it imports warn about each other; what our own modules do must not warn.
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module="triton_offload")
    path = tiny_llama(Path(model))
    if scenario == "plain":
        seen = plain(path)
    else:
        scenarios = {"intact": intact, "broken": broken, "pressure": pressure}
        seen = scenarios[scenario](path, int(blocks_per_chunk))
    Path(output).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
