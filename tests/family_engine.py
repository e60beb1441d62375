"""Runs one model family with real engines and writes what it saw as JSON.

First an engine without a connector, then one with, in one process: most of the time is what the
first one needs to start.

`python tests/family_engine.py FAMILY MODEL OUTPUT [refused]`.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine as scenarios
from engine import FEW, FEW_TOKENS, one_by_one
from families import FAMILIES, Family, make_model

from triton_offload.cli.demo import Engine

_EXTRA = {"cpu_bytes_to_use": "64MiB", "blocks_per_chunk": 1}


def _start(family: Family, model: Path, extra: dict[str, Any] | None = None) -> Engine:
    return Engine(model, extra, **{"max_model_len": 1024, **family.engine})


def plain(family: Family, model: Path) -> dict[str, Any]:
    """Without a connector: each prompt recomputed, or with what the engine's own cache has of it.

    `hit`: answered a second time, one after the other, so that the engine's own cache has what an
    offloader would load.
    """
    engine = _start(family, model)
    recomputed = []
    for prompt in FEW:
        engine.forget()
        recomputed += one_by_one(engine, [prompt], FEW_TOKENS)
    engine.forget()
    first = one_by_one(engine, FEW, FEW_TOKENS)
    hit = one_by_one(engine, FEW, FEW_TOKENS)
    engine.close()
    return {"recomputed": recomputed, "first": first, "hit": hit}


def connected(family: Family, model: Path) -> dict[str, Any]:
    """Stored, loaded into poisoned pages; then with loads that bring nothing, or flipped bytes."""
    engine = _start(family, model, _EXTRA)
    worker = engine.worker
    stored = one_by_one(engine, FEW, FEW_TOKENS)
    engine.settle()
    stores, before = worker.stores, worker.loads
    loaded = scenarios.reloaded(engine, FEW, FEW_TOKENS)
    loads = worker.loads
    with scenarios.loads_that_do_nothing(worker) as skipped:
        without_load = scenarios.reloaded(engine, FEW, FEW_TOKENS)
    assert worker.pool is not None
    worker.pool.slots.bitwise_xor_(0x80)  # the sign of every float, and no NaN
    flipped = scenarios.reloaded(engine, FEW, FEW_TOKENS)
    return {
        "stored": stored,
        "loaded": loaded,
        "without_load": without_load,
        "skipped": len(skipped),
        "flipped": flipped,
        "stores": stores.succeeded,
        "loads": loads.succeeded - before.succeeded,
        "loaded_bytes": loads.num_bytes - before.num_bytes,
    }


def _error_of(run: Callable[[], object]) -> dict[str, Any]:
    try:
        run()
    except Exception as error:
        return {"error": repr(error)}
    return {"error": ""}


def _keep_prefix_caching() -> None:
    """vLLM turns its prefix cache off for MLA on processors without AMX, but not what a connector
    loads: with nothing to compare that with, for prompts are answered otherwise after a hit."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_keep(config: Any) -> None:
        check(config)
        config.cache_config.enable_prefix_caching = True

    CpuPlatform.check_and_update_config = staticmethod(check_and_keep)


def _let_vllm_look_at_numba() -> None:
    """n-gram speculation imports numba, and vLLM then asks every object of every module for its
    `__dict__`: of llvmlite's, one answers with a function of a library, and no engine starts.
    """
    from llvmlite.binding import ffi

    get = ffi._lib_wrapper.__getattr__

    def get_but_dict(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return get(self, name)

    ffi._lib_wrapper.__getattr__ = get_but_dict


def _count_drafts() -> list[int]:
    """How many tokens were proposed in each step, of a speculating engine, from now on."""
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    counts: list[int] = []
    propose = NgramProposer.propose

    def count(*args: Any, **kwargs: Any) -> Any:
        drafts = propose(*args, **kwargs)
        counts.append(sum(map(len, drafts)))
        return drafts

    NgramProposer.propose = count
    return counts


def main(name: str, model: str, output: str, refused: str = "") -> None:
    # vllm and what it imports warn about each other; what our own modules do must not warn.
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module="triton_offload")
    family, path = FAMILIES[name], make_model(name, Path(model))
    if refused:
        seen = _error_of(lambda: _start(family, path, _EXTRA))
    elif family.limit:
        seen = _error_of(lambda: plain(family, path))
    else:
        _keep_prefix_caching()
        speculates = "speculative_config" in family.engine
        if speculates:
            _let_vllm_look_at_numba()
        seen = plain(family, path)
        drafts = _count_drafts() if speculates else []
        seen |= connected(family, path)
        seen["drafts"] = sum(drafts)
    Path(output).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
