"""One of two ranks that are joined as vLLM joins its ranks (gloo), without an engine.

`python tests/rank_group.py RANK FOLDER ENGINE_ID`: writes RANK.pt into the folder, where both meet.
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
    import vllm
    from vllm.distributed import parallel_state
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.kv_offload.cpu import spec as cpu_spec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm_parts import (
        BLOCKS,
        BLOCKS_PER_CHUNK,
        CHUNKS,
        FIRST,
        SLOT,
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
PADDING, CACHE_POISON = 0x77, 0x55
# Blocks of both groups, where the first of each lies in its chunk, and slots: every slot, and some.
FILLED = (
    [[block % BLOCKS for block in range(CHUNKS * BLOCKS_PER_CHUNK)], []],
    [0, 0],
    [*range(CHUNKS)],
)
PARTIAL = (STORED, FIRST, SLOTS)
# Bytes per block of the stages of a pipeline, by rank.
EVEN, UNEVEN = [[512, 512]], [[512, 768], [768, 512], [0, 512]]


def _make_spec(rank: int, engine_id: str, **changes: Any) -> TritonOffloadingSpec:
    sizes = {"pp_size": RANKS} if "worker_kv_bytes_per_block" in changes else {"tp_size": RANKS}
    parallel = dataclasses.replace(make_config().parallel, rank=rank, world_size=RANKS, **sizes)
    return TritonOffloadingSpec(
        make_config(
            parallel=parallel,
            engine_id=engine_id,
            extra_config={"cpu_bytes_to_use": CHUNKS * 4096, "calibration": "off"},
            **changes,
        )
    )


def _stages(rank: int, engine_id: str) -> dict[str, str]:
    """What a rank is told of each pair of stages; nothing where it is not refused."""
    told = {}
    for sizes in EVEN + UNEVEN:
        try:
            _make_spec(rank, engine_id, worker_kv_bytes_per_block=sizes[rank])
            told[str(sizes)] = ""
        except ValueError as error:
            told[str(sizes)] = str(error)
    return told


def _private_pool(rank: int, engine_id: str) -> dict[str, int]:
    spec = _make_spec(rank, engine_id)
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

    def __init__(self, rank: int, engine_id: str) -> None:
        self._rank = rank
        spec = _make_spec(rank, engine_id)
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
        _barrier()  # the one that made the file takes its name away
        self.seen: dict[str, Any] = {"named": Path(self._region.mmap_path).exists()}

    def _step(self, name: str, ranks: set[int], moved: Any) -> None:
        """A store or a load of these ranks, and what the region holds when they are done."""
        if self._rank in ranks:
            ids, first, slots = moved
            pages, chunks = blocks_of(ids, first), CPULoadStoreSpec(slots)
            if name == "loaded":
                self._worker.submit_load(1, chunks, pages)
            else:
                self._worker.submit_store(1, pages, chunks)
            deadline = time.monotonic() + 60
            while not self._worker.get_finished():
                assert time.monotonic() < deadline, f"{name}: the job did not end"
        _barrier()
        self.seen[name] = self._rows.clone()
        _barrier()

    def run(self) -> dict[str, Any]:
        if self._rank == 0:
            self._rows[:, RANKS * SLOT :] = PADDING
        _barrier()
        self._step("filled", {0, 1}, FILLED)
        self._step("stored by one", {0}, PARTIAL)
        self._step("stored by both", {1}, PARTIAL)
        for cache in self._caches.tensors:
            cache.tensor.fill_(CACHE_POISON)
        self._step("loaded", {0, 1}, PARTIAL)
        self.seen["caches"] = [cache.tensor for cache in self._caches.tensors]
        del self._rows
        self._worker.shutdown()
        self.seen["unmapped"] = self._region.mmap_obj is None
        return self.seen


def _barrier() -> None:
    parallel_state.get_world_group().barrier()


def main(rank: int, folder: Path, engine_id: str) -> None:
    for module in (plugin_spec, cpu_spec):
        module.current_platform = CpuPlatform()
    parallel_state.init_distributed_environment(
        world_size=RANKS,
        rank=rank,
        distributed_init_method=f"file://{folder}/meeting",
        local_rank=rank,
        backend="gloo",
    )
    seen = {
        "version": vllm.__version__,
        "stages": _stages(rank, engine_id),
        "private": _private_pool(rank, engine_id),
    }
    pretend_cuda(setattr)
    seen["region"] = _Region(rank, engine_id).run()
    torch.save(seen, folder / f"{rank}.pt")
    parallel_state.destroy_distributed_environment()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
