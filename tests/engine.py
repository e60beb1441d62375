"""Runs one scenario with a real engine and writes what it saw as JSON.

Each scenario has a process of its own, for an engine leaves state behind. Most of the time is the
engine's start, so what one engine can show is one scenario.

`python tests/engine.py SCENARIO MODEL OUTPUT [BLOCKS_PER_CHUNK]`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from families import make_model
from faulty import FaultyDevice, fail

from triton_offload.cli.demo import Engine
from triton_offload.cli.demo_model import tiny_llama

OUTPUT_TOKENS = 24
PRESSURE_TOKENS = 40
PRESSURE_ROUNDS = int(os.environ.get("TRITON_OFFLOAD_PRESSURE_ROUNDS", "6"))


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
FEW, FEW_TOKENS = [SINGLE[i] for i in (0, 1, 3, 4)], 8  # of two prefixes, for rounds after rounds


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


def reloaded(
    engine: Engine, requests: list[list[int]] = SINGLE, max_tokens: int = OUTPUT_TOKENS
) -> list[list[int]]:
    """Each prompt with nothing right on the device but what is loaded for it."""
    answers = []
    for prompt in requests:
        engine.settle()
        engine.forget()
        engine.poison()
        answers += one_by_one(engine, [prompt], max_tokens)
    engine.settle()
    return answers


@contextmanager
def loads_that_do_nothing(worker: Any) -> Iterator[list[int]]:
    """Loads that succeed and leave the pages as they were; their ids."""
    submit_load = worker.submit_load
    skipped: list[int] = []

    def do_nothing(job_id: int, src: Any, dst: Any, expedited: bool = False) -> bool:
        from vllm.v1.kv_offload.base import TransferResult

        skipped.append(job_id)
        worker._reports.append(TransferResult(job_id, True, 0, 0.0))
        return True

    worker.submit_load = do_nothing
    yield skipped
    worker.submit_load = submit_load


def intact(model: Path, blocks_per_chunk: int) -> dict[str, Any]:
    """Stored, poisoned, loaded."""
    return _stored_and_loaded(_connected(model, blocks_per_chunk))


def _stored_and_loaded(engine: Engine) -> dict[str, Any]:
    stored = one_by_one(engine, SINGLE, OUTPUT_TOKENS)
    engine.settle()
    loaded = reloaded(engine)
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
    with loads_that_do_nothing(worker) as skipped:
        without_load = reloaded(engine)
    assert worker.pool is not None
    worker.pool.slots.bitwise_xor_(0x80)  # the sign of every float, and no NaN
    flipped = reloaded(engine)
    worker.pool.slots.bitwise_xor_(0x80)
    mended = reloaded(engine)
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


def _surviving(model: Path, device: FaultyDevice, blocks_per_chunk: int) -> Engine:
    """An engine with the connector of this package, on `device`."""
    from triton_offload.vllm import spec

    spec.device_for = lambda *args: device
    config = transfer(blocks_per_chunk, path="staged")
    return Engine(model, kv_transfer_config=config, max_model_len=1024)


def transfer(blocks_per_chunk: int, **extra: Any) -> dict[str, Any]:
    """What follows --kv-transfer-config, with the connector of this package."""
    return {
        "kv_connector": "TritonOffloadingConnector",
        "kv_connector_module_path": "triton_offload.vllm",
        "kv_load_failure_policy": "recompute",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "cpu_bytes_to_use": "64MiB",
            "blocks_per_chunk": blocks_per_chunk,
            **extra,
        },
    }


class Rounds:
    """Answers and counts of jobs, round after round."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seen: dict[str, Any] = {}

    def run(self, name: str, answer: Callable[[], list[list[int]]]) -> None:
        worker = self.engine.worker
        before = worker.loads, worker.stores
        answers = answer()
        self.engine.settle()
        after = worker.loads, worker.stores
        self.seen[name] = {"answers": answers}
        for way, was, now in zip(("loads", "stores"), before, after, strict=True):
            self.seen[name][way] = now.succeeded - was.succeeded
            self.seen[name][f"failed_{way}"] = now.failed - was.failed

    def store(self) -> list[list[int]]:
        self.engine.forget(host_pool_too=True)
        return one_by_one(self.engine, FEW, FEW_TOKENS)

    def load(self) -> list[list[int]]:
        return reloaded(self.engine, FEW, FEW_TOKENS)

    def load_at_once(self) -> list[list[int]]:
        self.engine.forget()
        self.engine.poison()
        return [each.token_ids for each in self.engine.generate(FEW, FEW_TOKENS)]


def verified(model: Path, blocks_per_chunk: int) -> dict[str, Any]:
    """Loads that prove what they bring, with one bit of one slot flipped between two rounds."""
    config = transfer(blocks_per_chunk, verify="load")
    engine = Engine(model, kv_transfer_config=config, max_model_len=1024)
    rounds = Rounds(engine)
    rounds.run("stored", rounds.store)
    rounds.run("loaded", rounds.load)
    assert engine.worker.pool is not None
    slots = engine.worker.pool.slots
    first = int(slots.any(1).nonzero()[0])
    slots[first, slots[first].nonzero()[0]] ^= 0x40  # of an exponent: an answer would show it
    rounds.run("one bit flipped", rounds.load)
    rounds.run("loaded at the end", rounds.load)
    return {**rounds.seen, "wrong_chunks": engine.worker.loads.wrong_chunks}


ALWAYS = 1 << 30


def failures(model: Path, blocks_per_chunk: int) -> dict[str, Any]:
    """One kind of failure after the other, and after each what is stored and loaded again."""
    device = FaultyDevice()
    engine = _surviving(model, device, blocks_per_chunk)
    rounds = Rounds(engine)
    rounds.run("stored", rounds.store)
    device.faults["scatter"] = 1
    rounds.run("one load fails", rounds.load)
    device.faults["scatter"] = ALWAYS
    rounds.run("every load fails", rounds.load)
    rounds.run("every load of many at once fails", rounds.load_at_once)
    device.faults.clear()
    rounds.run("loads work again", rounds.load)
    device.faults["gather"] = ALWAYS
    rounds.run("every store fails", rounds.store)
    rounds.run("nothing was stored", rounds.load)
    device.faults.clear()
    rounds.run("stores work again", rounds.store)
    manager = engine.worker._manager
    assert manager is not None
    transfer_async = manager.transfer_async
    manager.transfer_async = fail  # type: ignore[method-assign]
    rounds.run("every job is refused", rounds.load)
    manager.transfer_async = transfer_async  # type: ignore[method-assign]
    rounds.run("jobs are accepted again", rounds.store)
    rounds.run("loaded at the end", rounds.load)
    return rounds.seen


def hybrid(model: Path, blocks_per_chunk: int) -> dict[str, Any]:
    """A model of three KV cache groups, with slots of two sizes: loads of one group fail, then all,
    then stores."""
    make_model("gemma3", model)
    plain = Engine(model, max_model_len=1024)
    answers = []
    for prompt in FEW:
        plain.forget()
        answers += one_by_one(plain, [prompt], FEW_TOKENS)
    plain.close()
    device = FaultyDevice()
    engine = _surviving(model, device, blocks_per_chunk)
    rounds = Rounds(engine)
    rounds.run("stored", rounds.store)
    rounds.run("loaded", rounds.load)
    device.faults["scatter"] = 1
    rounds.run("one load fails", rounds.load)
    device.faults["scatter"] = ALWAYS
    rounds.run("every load fails", rounds.load)
    device.faults.clear()
    device.faults["gather"] = 1
    rounds.run("one store fails", rounds.store)
    rounds.run("loaded at the end", rounds.load)
    pool = engine.worker.pool
    assert pool is not None
    pool.slots.bitwise_xor_(0x80)  # the sign of every float, and no NaN
    rounds.run("flipped", rounds.load)
    sizes = [cut.num_bytes for cut in pool.slabs.sizes]
    return {"plain": {"answers": answers}, "slot_sizes": sizes, **rounds.seen}


def children() -> dict[str, Any]:
    return {"children": [each.pid for each in multiprocessing.active_children()]}


def until_killed(
    model: Path, started: Path, seen: Callable[[], dict[str, Any]] = children, **llm_args: Any
) -> None:
    """An engine core in a process of its own, which stores and loads until somebody ends it.

    `started` is written when it has answered: what is to be `seen` of it then, by default the ids
    of the processes that it is made of.
    """
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    import vllm

    llm = vllm.LLM(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        block_size=32,
        max_model_len=1024,
        enforce_eager=True,
        kv_transfer_config=transfer(blocks_per_chunk=2),
        **llm_args,
    )
    params = vllm.SamplingParams(temperature=0.0, max_tokens=2, detokenize=False)
    while True:
        llm.generate([{"prompt_token_ids": each} for each in FEW], params, use_tqdm=False)
        llm.reset_prefix_cache()
        if not started.exists():
            written = started.with_suffix(".new")
            written.write_text(json.dumps(seen()))
            written.rename(started)


def main(scenario: str, model: str, output: str, blocks_per_chunk: str = "1") -> None:
    # vllm and what it imports warn about each other; what our own modules do must not warn.
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module="triton_offload")
    path = Path(model) if scenario == "hybrid" else tiny_llama(Path(model))
    if scenario == "plain":
        seen = plain(path)
    elif scenario == "until_killed":
        return until_killed(path, Path(output))
    else:
        scenarios = {
            "intact": intact,
            "broken": broken,
            "pressure": pressure,
            "failures": failures,
            "hybrid": hybrid,
            "verified": verified,
        }
        seen = scenarios[scenario](path, int(blocks_per_chunk))
    Path(output).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
