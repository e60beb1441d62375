"""vLLM's own worker as a peer: whole on a GPU, its planning where there is none.

vLLM is taken from where it is installed. A machine that can't install it may have its worker
packed: a folder whose `activate.sh` puts vLLM on PYTHONPATH, named by `--peer` of `bench/run.py` or
by TRITON_OFFLOAD_PEER, and looked for in `.cache/vllm-worker` otherwise.
"""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from contenders import Contender
from sizes import HAS_GPU
from world import World

from triton_offload.specs import Direction, Ids

PACK_VARIABLE = "TRITON_OFFLOAD_PEER"
PACK_FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "vllm-worker"


def pack_environment(folder: Path | None) -> dict[str, str]:
    """The environment in which a packed vLLM is found; nothing new where there is no pack."""
    folder = folder or Path(os.environ.get(PACK_VARIABLE) or PACK_FOLDER)
    script = folder / "activate.sh"
    if not script.is_file():
        return {}
    done = subprocess.run(
        ["bash", "-c", 'source "$0" >&2; printf %s "$PYTHONPATH"', str(script)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {"PYTHONPATH": done.stdout}


@functools.cache
def _import_or_reason(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(f"vllm.{name}")
    except Exception as error:  # a part of it may be missing in many ways
        return f"vLLM is not here ({type(error).__name__}: {error})"


def vllm_module(name: str) -> Any:
    """The module `vllm.NAME`. Skips where it can't be imported."""
    module = _import_or_reason(name)
    if isinstance(module, str):
        pytest.skip(module)
    return module


class VLLMWorker(Contender):
    """vLLM's `CPUOffloadingWorker` with a pinned tensor for each cache, chunks of one block."""

    def __init__(self, world: World) -> None:
        super().__init__()
        if not HAS_GPU:
            pytest.skip("vLLM's worker needs a GPU")
        worker = vllm_module("v1.kv_offload.cpu.gpu_worker")
        base = vllm_module("v1.kv_offload.base")
        common = vllm_module("v1.kv_offload.cpu.common")
        if world.slots == "ranks":
            pytest.skip("vLLM's worker is measured without the rows of other ranks")
        groups = [
            [
                base.CanonicalKVCacheRef(tensor_idx=i, page_size_bytes=page.page_bytes)
                for i, cache in enumerate(world.caches)
                for page in group.table.pages
                if page.view.data_ptr() == cache.data_ptr()
            ]
            for group in world.layout.groups
        ]
        tensors = [
            base.CanonicalKVCacheTensor(tensor=cache, page_size_bytes=world.page_bytes)
            for cache in world.caches
        ]
        caches = base.CanonicalKVCaches(tensors=tensors, group_data_refs=groups)
        self._worker = worker.CPUOffloadingWorker(caches, 1, world.num_slots)
        empty = [0] * (len(groups) - 1)
        self._specs = {}
        for direction in Direction:
            blocks, slots = world.ids(direction)
            gpu = base.GPULoadStoreSpec(
                blocks.tolist(), group_sizes=[len(blocks), *empty], block_indices=[0, *empty]
            )
            self._specs[direction] = gpu, common.CPULoadStoreSpec(slots.tolist())
        self._jobs: set[int] = set()
        self._next = 0

    def start(self, direction: Direction) -> None:
        gpu, cpu = self._specs[direction]
        self._next += 1
        if direction is Direction.STORE:
            self._worker.submit_store(self._next, gpu, cpu)
        else:
            self._worker.submit_load(self._next, cpu, gpu)
        self._jobs.add(self._next)

    def pending(self) -> bool:
        for result in self._worker.get_finished():
            if not result.success:
                raise RuntimeError("a transfer of vLLM's failed")
            self._jobs.remove(result.job_id)
            self.device_seconds.append(result.transfer_time)
        return bool(self._jobs)

    def finish(self) -> None:
        self._worker.wait(set(self._jobs))
        if self.pending():
            raise RuntimeError("a transfer of vLLM's was not reported")

    def close(self) -> None:
        self._worker.shutdown()


def vllm_planner(
    caches: list[torch.Tensor], slots: torch.Tensor
) -> Callable[[Ids, Ids], tuple[int, int]]:
    """vLLM's planning of a store of whole chunks of one block: a descriptor for every page.

    `caches`: int8 [num_blocks, page_bytes] each; `slots`: int8 [num_slots, sum of page bytes]. The
    function returned takes block ids and slot ids, and returns the number of descriptors and of
    bytes. vLLM's handler asserts tensors on a GPU when it is built, so that its planning code runs
    here on an object with the fields that it reads.
    """
    worker = vllm_module("v1.kv_offload.cpu.gpu_worker")
    pages = [cache.shape[1] for cache in caches]
    offsets = np.cumsum([0, *pages])
    handler = SimpleNamespace(
        src_tensors=caches,
        dst_tensors=[
            slots[:, offset : offset + page]
            for offset, page in zip(offsets.tolist(), pages, strict=False)
        ],
        src_blocks_per_chunk=1,
        dst_blocks_per_chunk=1,
        layer_refs_per_group=[
            [SimpleNamespace(tensor_idx=i, page_size_bytes=page) for i, page in enumerate(pages)]
        ],
    )
    fill = getattr(worker.SingleDirectionOffloadingHandler, "_fill_direct_ops", None)
    if fill is None:
        pytest.skip("this vLLM plans inside its submission, which is measured as a whole")

    def plan(block_ids: Ids, slot_ids: Ids) -> tuple[int, int]:
        count = len(block_ids) * len(caches)
        # vLLM reuses pinned buffers; np.empty costs it no more.
        src, dst, sizes = (np.empty(count, dtype=np.int64) for _ in range(3))
        return fill(
            handler,
            0,
            group_src=block_ids,
            group_dst=slot_ids,
            group_size=len(block_ids),
            src_skip_count=0,
            dst_skip_count=0,
            all_src=src,
            all_dst=dst,
            all_sizes=sizes,
            op_idx=0,
        )

    return plan
