"""One of two ranks that are joined as vLLM joins its ranks (gloo), without an engine.

`python tests/rank_group.py RANK FOLDER`: writes RANK.pt into FOLDER, which both ranks are given.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vllm's own imports warn about
    from vllm.distributed import parallel_state
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.kv_offload.cpu import spec as cpu_spec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm_parts import (
        CHUNKS,
        FIRST,
        SLOTS,
        STORED,
        blocks_of,
        make_config,
        pretend_cuda,
        random_caches,
    )

    from triton_offload.vllm import TritonOffloadingSpec
    from triton_offload.vllm import spec as plugin_spec

RANKS = 2
ROW_POISON, CACHE_POISON = 0x77, 0x55
# Bytes per block of the stages of a pipeline, by rank.
EVEN, UNEVEN = [[512, 512]], [[512, 768], [768, 512], [0, 512]]


def _make_spec(rank: int, folder: Path, **changes: Any) -> TritonOffloadingSpec:
    sizes = {"pp_size": RANKS} if "worker_kv_bytes_per_block" in changes else {"tp_size": RANKS}
    parallel = dataclasses.replace(make_config().parallel, rank=rank, world_size=RANKS, **sizes)
    return TritonOffloadingSpec(
        make_config(
            parallel=parallel,
            engine_id=f"{folder.parent.name}-{folder.name}",
            extra_config={"cpu_bytes_to_use": CHUNKS * 4096, "calibration": "off"},
            **changes,
        )
    )


def _stages(rank: int, folder: Path) -> dict[str, str]:
    """What a rank is told of each pair of stages; nothing where it is not refused."""
    told = {}
    for sizes in EVEN + UNEVEN:
        try:
            _make_spec(rank, folder, worker_kv_bytes_per_block=sizes[rank])
            told[str(sizes)] = ""
        except ValueError as error:
            told[str(sizes)] = str(error)
    return told


def _private_pool(rank: int, folder: Path) -> dict[str, int]:
    spec = _make_spec(rank, folder)
    worker = spec.get_worker(random_caches(rank))
    pool = worker.pool
    assert pool is not None
    seen = {
        "chunks": spec.num_chunks,
        "slots": pool.num_slots,
        "slot_bytes": pool.slot_bytes,
        "memory": pool.slots.untyped_storage().nbytes(),
    }
    worker.shutdown()
    return seen


class _Region:
    """This rank's worker on the region of both, and every byte of the region after each step."""

    def __init__(self, rank: int, folder: Path) -> None:
        self._rank = rank
        spec = _make_spec(rank, folder)
        create, regions = spec._create_region, []

        def note() -> Any:
            regions.append(create())
            return regions[-1]

        spec._create_region = note  # type: ignore[method-assign]
        self._caches = random_caches(rank)
        self._worker = spec.get_worker(self._caches)
        (self._region,) = regions
        shape = spec.num_chunks, spec.kv_bytes_per_chunk
        self._rows = self._region.base_tensor.view(torch.uint8).view(shape)
        self.seen: dict[str, Any] = {"named": Path(self._region.mmap_path).exists()}

    def _step(self, name: str, ranks: set[int], job: int) -> None:
        """A store or a load of these ranks, and what the region holds when they are done."""
        if self._rank in ranks:
            submit = self._worker.submit_load if name == "loaded" else self._worker.submit_store
            ends = [blocks_of(STORED, FIRST), CPULoadStoreSpec(SLOTS)]
            submit(job, *(reversed(ends) if name == "loaded" else ends))
            deadline = time.monotonic() + 60
            while not self._worker.get_finished():
                assert time.monotonic() < deadline, f"{name}: the job did not end"
        _barrier()
        self.seen[name] = self._rows.clone()
        _barrier()

    def run(self) -> dict[str, Any]:
        if self._rank == 0:
            self._rows.fill_(ROW_POISON)
        _barrier()
        self._step("stored by one", {0}, job=1)
        self._step("stored by both", {1}, job=2)
        for cache in self._caches.tensors:
            cache.tensor.fill_(CACHE_POISON)
        self._step("loaded", {0, 1}, job=3)
        self.seen["caches"] = [cache.tensor for cache in self._caches.tensors]
        del self._rows
        self._worker.shutdown()
        self.seen["unmapped"] = self._region.mmap_obj is None
        return self.seen


def _barrier() -> None:
    parallel_state.get_world_group().barrier()


def main(rank: int, folder: Path) -> None:
    for module in (plugin_spec, cpu_spec):
        module.current_platform = CpuPlatform()
    parallel_state.init_distributed_environment(
        world_size=RANKS,
        rank=rank,
        distributed_init_method=f"file://{folder}/meeting",
        local_rank=rank,
        backend="gloo",
    )
    seen = {"stages": _stages(rank, folder), "private": _private_pool(rank, folder)}
    pretend_cuda(setattr)
    seen["region"] = _Region(rank, folder).run()
    torch.save(seen, folder / f"{rank}.pt")
    parallel_state.destroy_distributed_environment()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
