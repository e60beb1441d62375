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
from functools import partial
from pathlib import Path
from typing import Any

from engine import FEW, FEW_TOKENS, one_by_one
from faulty import FaultyDevice

from triton_offload.cli.demo import Engine
from triton_offload.cli.demo_model import tiny_llama


def _engine(
    model: Path, folder: Path, ranks: int = 1, connector: str = "OffloadingConnector", **extra: Any
) -> Engine:
    transfer = {
        "kv_connector": connector,
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
    if connector != "OffloadingConnector":
        transfer["kv_connector_module_path"] = "triton_offload.vllm"
        transfer["kv_load_failure_policy"] = "recompute"
    # Of several ranks each has a process; else vLLM binds both to the same core.
    of_ranks = {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return Engine(
        model,
        kv_transfer_config=transfer,
        max_model_len=1024,
        **(of_ranks if ranks > 1 else {}),
    )


def _manager_of(engine: Engine) -> Any:
    core = engine.llm.llm_engine.engine_core.engine_core
    return core.scheduler.connector.connector_scheduler.manager


def _counts(_: Any) -> tuple[int, int, int, int]:
    """On a rank: loads that succeeded and that failed, their bytes, and what is under way."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector = get_kv_transfer_group().connector_worker
    transfers = getattr(connector.worker, "transfers", connector.worker)
    under_way = transfers.num_in_flight + len(connector._unsubmitted_store_jobs)
    loads = transfers.loads
    return loads.succeeded, loads.failed, loads.num_bytes, under_way


def _settle(engine: Engine) -> None:
    """Until nothing is under way on any rank, nor to or from the tier."""
    deadline = time.monotonic() + 120
    while True:
        engine.generate([[1, 2, 3]], 2)  # no whole block, so nothing new to store
        counts = engine.llm.collective_rpc(_counts)
        if not any(rank[3] for rank in counts) and not _manager_of(engine).has_pending_work():
            return
        assert time.monotonic() < deadline, "the transfers did not end"


def _answered(engine: Engine, host_pool_too: bool = True) -> dict[str, Any]:
    """Each prompt with nothing right on the device, and nothing in the pool."""
    before = engine.llm.collective_rpc(_counts)
    answers = []
    for prompt in FEW:
        _settle(engine)
        engine.forget(host_pool_too=host_pool_too)
        engine.poison()
        answers += one_by_one(engine, [prompt], FEW_TOKENS)
    _settle(engine)
    moved = [
        [now - was for now, was in zip(*both, strict=True)]
        for both in zip(engine.llm.collective_rpc(_counts), before, strict=True)
    ]
    succeeded, failed, num_bytes, _ = zip(*moved, strict=True)
    return {"answers": answers, "loads": succeeded, "failed": failed, "bytes": num_bytes}


def _stored(engine: Engine) -> list[list[int]]:
    answers = one_by_one(engine, FEW, FEW_TOKENS)
    _settle(engine)
    return answers


def fill(model: Path, folder: Path) -> dict[str, Any]:
    """Answers that are computed, and whether each file is what the pool's slots hold."""
    engine = _engine(model, folder)
    from triton_offload.vllm.stale_regions import region_file

    answers = _stored(engine)
    manager, pool = _manager_of(engine), engine.worker.pool
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
        "named": region_file(config.engine_id).exists(),
    }
    del rows
    engine.close()
    return found


def restart(model: Path, folder: Path) -> dict[str, Any]:
    """What another engine loads from the files, and then from files with a byte flipped in each."""
    engine = _engine(model, folder)
    seen = {"intact": _answered(engine)}
    for path in folder.rglob("*.bin"):
        data = bytearray(path.read_bytes())
        data[3] ^= 0x40  # of a float's exponent: what was small is huge
        path.write_bytes(data)
    seen["flipped"] = _answered(engine)
    engine.close()
    return seen


def failures(model: Path, folder: Path) -> dict[str, Any]:
    """With the connector of this package: stores fail, then loads of what a tier brought."""
    from triton_offload.vllm import spec

    device = FaultyDevice()
    vars(spec)["device_for"] = lambda *args: device
    engine = _engine(model, folder, connector="TritonOffloadingConnector", path="staged")
    device.faults["gather"] = 1 << 30
    seen: dict[str, Any] = {"no store": {"answers": _stored(engine)}}
    seen["no store"]["files"] = len(list(folder.rglob("*.bin")))
    device.faults.clear()
    engine.forget(host_pool_too=True)
    seen["stored"] = {"answers": _stored(engine), "files": len(list(folder.rglob("*.bin")))}
    device.faults["scatter"] = 1 << 30
    seen["no load"] = _answered(engine)
    device.faults.clear()
    seen["loaded"] = _answered(engine, host_pool_too=False)
    engine.close()
    return seen


def store_by(ranks: int, canonical: bool, model: Path, folder: Path) -> dict[str, Any]:
    engine = _engine(model, folder, ranks, canonical_layout=canonical)
    seen = {"answers": _stored(engine), "files": len(list(folder.rglob("*.bin")))}
    engine.close()
    return seen


def load_by(ranks: int, canonical: bool, model: Path, folder: Path) -> dict[str, Any]:
    engine = _engine(model, folder, ranks, canonical_layout=canonical)
    seen = _answered(engine)
    engine.close()
    return seen


Life = Callable[[Path, Path], dict[str, Any]]
LIVES: dict[str, Life] = {"fill": fill, "restart": restart, "failures": failures}
for _ranks in (1, 2):
    for _layout, _canonical in (("direct", False), ("canonical", True)):
        LIVES[f"store {_layout} by {_ranks}"] = partial(store_by, _ranks, _canonical)
        LIVES[f"load {_layout} by {_ranks}"] = partial(load_by, _ranks, _canonical)


def _forked(life: Life, model: Path, folder: Path, output: Path) -> Any:
    child = os.fork()
    if child == 0:
        try:
            output.write_text(json.dumps(life(model, folder)))
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"a life ended with {status}"
    return json.loads(output.read_text())


def main(model: str, folder: str, output: str, *lives: str) -> None:
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module="triton_offload")
    # What is read when they are imported; the rest says `Engine`.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import vllm

    assert vllm.LLM  # with all that it needs, which is loaded when it is asked for
    path, seen = tiny_llama(Path(model)), {}
    for life in lives:
        seen[life] = _forked(LIVES[life], path, Path(folder), Path(output))
    Path(output).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
