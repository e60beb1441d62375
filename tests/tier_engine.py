"""Lives of engines with a tier of files, one after the other, and what each of them saw.

Each has a process of its own, forked from one that has imported vllm, which takes as long as an
engine's start.

`python tests/tier_engine.py MODEL FOLDER OUTPUT LIFE...`. `FOLDER`: where the files are.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import FEW, FEW_TOKENS, one_by_one

from triton_offload.cli.demo import Engine, tiny_llama


def _engine(model: Path, folder: Path, **extra: Any) -> Engine:
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "TritonTieringOffloadingSpec",
            "spec_module_path": "triton_offload.vllm",
            "cpu_bytes_to_use": "64MiB",
            "blocks_per_chunk": 2,
            "secondary_tiers": [{"type": "fs", "root_dir": str(folder)}],
            **extra,
        },
    }
    return Engine(model, kv_transfer_config=transfer, max_model_len=1024)


def manager_of(engine: Engine) -> Any:
    core = engine.llm.llm_engine.engine_core.engine_core
    return core.scheduler.connector.connector_scheduler.manager


def settle(engine: Engine) -> None:
    """Until nothing is under way to or from the tier, either."""
    engine.settle()
    deadline = time.monotonic() + 60
    while manager_of(engine).has_pending_work():
        assert time.monotonic() < deadline, "the tier's transfers did not end"
        engine.settle()


def loaded(engine: Engine) -> dict[str, Any]:
    """Each prompt with nothing right on the device, and nothing in the pool."""
    before = engine.worker.loads
    answers = []
    for prompt in FEW:
        settle(engine)
        engine.forget(host_pool_too=True)
        engine.poison()
        answers += one_by_one(engine, [prompt], FEW_TOKENS)
    settle(engine)
    after = engine.worker.loads
    return {
        "answers": answers,
        "loads": after.succeeded - before.succeeded,
        "loaded_bytes": after.num_bytes - before.num_bytes,
    }


def fill(model: Path, folder: Path) -> dict[str, Any]:
    """Answers that are computed, and whether each file is what the pool's slots hold."""
    engine = _engine(model, folder)
    from triton_offload.vllm.stale_regions import region_file

    answers = one_by_one(engine, FEW, FEW_TOKENS)
    settle(engine)
    manager, pool = manager_of(engine), engine.worker.pool
    config = engine.llm.llm_engine.vllm_config.kv_transfer_config
    assert pool is not None
    (tier,) = manager.secondary_tiers
    row_bytes = pool.slots.stride(0)
    rows = pool.slots.as_strided((pool.num_slots, row_bytes), (row_bytes, 1)).numpy()
    wrong = []
    for key, chunk in manager.primary_tier._policy.chunks.items():
        written = Path(tier.file_mapper.get_file_name(key)).read_bytes()
        if written != rows[chunk.chunk_id].tobytes() or not any(written):
            wrong.append(key.hex())
    found = {
        "answers": answers,
        "chunks": len(manager.primary_tier._policy.chunks),
        "files": len(list(folder.rglob("*.bin"))),
        "wrong": wrong,
        "loads": engine.worker.loads.jobs,
        "named": region_file(config.engine_id).exists(),
    }
    del rows
    engine.close()
    return found


def restart(model: Path, folder: Path) -> dict[str, Any]:
    """What another engine loads from the files, and then from files with a byte flipped in each."""
    engine = _engine(model, folder)
    seen = {"intact": loaded(engine)}
    for path in folder.rglob("*.bin"):
        data = bytearray(path.read_bytes())
        data[3] ^= 0x40  # of a float's exponent: what was small is huge
        path.write_bytes(data)
    seen["flipped"] = loaded(engine)
    engine.close()
    return seen


LIVES = {"fill": fill, "restart": restart}


def _forked(life: Callable[[Path, Path], Any], model: Path, folder: Path, output: Path) -> Any:
    child = os.fork()
    if child == 0:
        try:
            output.write_text(json.dumps(life(model, folder)))
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"{life.__name__} ended with {status}"
    return json.loads(output.read_text())


def main(model: str, folder: str, output: str, *lives: str) -> None:
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module="triton_offload")
    # What is read when they are imported; the rest says `Engine`.
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")
    import vllm

    assert vllm.LLM  # with all that it needs, which is loaded when it is asked for

    path, seen = tiny_llama(Path(model)), {}
    for life in lives:
        seen[life] = _forked(LIVES[life], path, Path(folder), Path(output))
    Path(output).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
