"""The spec: what vLLM asks for sizes, a manager and each rank's worker."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import itertools
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import torch
import vllm
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.parallel_state import get_world_group
from vllm.platforms import current_platform
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.kv_offload.cpu import gpu_worker as vllm_worker
from vllm.v1.kv_offload.cpu import spec as vllm_spec
from vllm.v1.kv_offload.cpu.policies.factory import CachePolicyFactory
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from triton_offload.closing import Closing
from triton_offload.device import Device, device_for
from triton_offload.pool import shared_memory
from triton_offload.pool.host_pool import HostPool
from triton_offload.pool.memory_limits import check_memory, check_room
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.options import PipelineOptions
from triton_offload.transfer.queue_manager import transfer_queue
from triton_offload.tuning.calibrate import calibration_for
from triton_offload.vllm.group_pool import GroupPool
from triton_offload.vllm.group_slots import GroupSlotManager
from triton_offload.vllm.metrics import DEFINITIONS
from triton_offload.vllm.options import read_options
from triton_offload.vllm.stale_regions import remove_stale_regions
from triton_offload.vllm.versions import SUPPORT
from triton_offload.vllm.worker import TritonOffloadingWorker


class TritonOffloadingSpec(vllm_spec.CPUOffloadingSpec):  # type: ignore[misc]  # vllm is untyped
    """vLLM's CPU offloading with this package's transfers.

    Manager, eviction policies, metrics and sizes are inherited. On CUDA the pool is vLLM's shared
    region in vLLM's own slot format. Raises ValueError for what is not supported, as early as the
    engine builds the spec.
    """

    #: whether tiers read and write the pool, too: the scheduler maps the region by its name
    has_tiers: ClassVar[bool] = False

    #: a pool whose slots are as large as each group needs; None: each has all of its blocks' bytes
    group_pool: GroupPool | None = None

    cpu_info: Any  # since vLLM 0.33
    _manager: Any
    _worker: Any

    def __init__(self, config: Any) -> None:
        if config.canonical_layout and not self.has_tiers:
            raise ValueError(
                "canonical_layout: expected false, for TritonOffloadingSpec has no tiers that "
                "other engines read, and TritonTieringOffloadingSpec has, got True"
            )
        if not (current_platform.is_cuda() or current_platform.is_cpu()):
            raise ValueError(f"{SUPPORT}; got the platform {current_platform.device_name!r}")
        if config.extra_config.get("secondary_tiers") and not self.has_tiers:
            # They would read a region that is not the one the workers write.
            raise ValueError(
                "secondary_tiers: expected none, for TritonOffloadingSpec moves chunks between "
                "device and host memory only, and TritonTieringOffloadingSpec on to tiers, "
                f"got {config.extra_config['secondary_tiers']!r}"
            )
        extra = read_options(
            config.extra_config,
            vllm.__version__,
            CachePolicyFactory._registry,
            tiering=self.has_tiers,
        )
        config = dataclasses.replace(config, extra_config=extra)
        # One copy a rank is right for replicated (MLA) caches too, and needs no writer election.
        # It has to be said before the sizes are worked out. Canonical chunks are those of all.
        if config.replicated_layout and not config.canonical_layout:
            config = dataclasses.replace(config, replicated_layout=False)
        _check_stages(config)  # before what may be wrong with one rank alone: all ranks take part
        super().__init__(config)
        if self.num_chunks < 1:
            raise ValueError(
                f"cpu_bytes_to_use: expected at least one chunk of {self.kv_bytes_per_chunk} "
                f"bytes, got {extra['cpu_bytes_to_use']}"
            )

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """vLLM's metrics by name, and this package's."""
        return {**super().build_metric_definitions(extra_config), **DEFINITIONS}

    def size_slots(self, group_bytes: Sequence[int]) -> None:
        """Have slots that are as large as each group needs.

        `group_bytes`: what each group has of a block, on every rank. To be called on the scheduler
        and on all ranks, before a manager or a worker is made. Raises ValueError where the largest
        slot has no room.
        """
        self.group_pool = GroupPool.fit(
            self.extra_config["cpu_bytes_to_use"],
            self.config.parallel.world_size,
            [num_bytes * self.blocks_per_chunk for num_bytes in group_bytes],
        )
        self.num_chunks = self.group_pool.slabs.most_chunks
        if hasattr(self, "cpu_info"):
            self.cpu_info = self.group_pool.described(self.cpu_info, self.config)

    def get_manager(self) -> Any:
        """vLLM's CPUOffloadingManager, made on the first call; where slots differ in size, one that
        knows of them."""
        pool = self.group_pool
        if self._manager is None and pool is not None and len(pool.sizes) > 1:
            options = _taken(
                vllm_spec.CPUOffloadingManager,
                cache_policy=self.eviction_policy,
                cache_policy_module_path=self.cache_policy_module_path,
                enable_events=self.kv_events_config.enable_kv_cache_events,
                store_threshold=int(self.extra_config.get("store_threshold", 0)),
                max_tracker_size=int(self.extra_config.get("max_tracker_size", 64_000)),
                info=getattr(self, "cpu_info", None),
            )
            sizes = pool.size_of_group(self.config.groups)
            self._manager = GroupSlotManager(pool.slabs, sizes, **options)
        return super().get_manager()

    def get_worker(self, kv_caches: Any) -> TritonOffloadingWorker:
        """The worker of this rank, made on the first call.

        `kv_caches`: vLLM's CanonicalKVCaches; the tensors must outlive the worker.
        """
        if self._worker is None:
            self._worker = self.create_worker(kv_caches)
        worker: TritonOffloadingWorker = self._worker
        return worker

    def create_worker(self, kv_caches: Any) -> TritonOffloadingWorker:
        _check_hits()
        if self.group_pool is None:
            _check_whole_blocks(kv_caches, self.config.worker_kv_bytes_per_block)
        layout = self._lay_out(kv_caches)
        resources = Closing()
        try:
            with torch.inference_mode(False):  # threads that are not in it will write to the pool
                return self._make_worker(layout, resources)
        except BaseException as error:
            # Locals of where it came by hold the pool's memory: vLLM could not unmap its region.
            traceback.clear_frames(error.__traceback__)
            resources.close()
            raise

    def _lay_out(self, kv_caches: Any) -> CacheLayout:
        """Where the pages lie in a slot, which is this rank's alone."""
        layout = _layout(kv_caches, self.blocks_per_chunk, packed=self.group_pool is not None)
        if self.group_pool is not None:
            found = tuple(group.table.slot_bytes for group in layout.groups)
            if found != self.group_pool.slot_bytes:
                raise ValueError(
                    f"kv_caches: expected chunks of {self.group_pool.slot_bytes} bytes, by group, "
                    f"as the scheduler has slots for, got {found}"
                )
            return layout
        if layout.slot_bytes > self.cpu_page_size_per_worker:
            raise ValueError(
                f"kv_caches: expected chunks of at most {self.cpu_page_size_per_worker} bytes "
                f"(cpu_page_size_per_worker), got {layout.slot_bytes}"
            )
        return layout

    def _map_slots(self, region: Any, layout: CacheLayout) -> torch.Tensor:
        """int8 [chunks, bytes]: the slots of the layout in vLLM's region."""
        slots: torch.Tensor = region.create_next_worker_view(self.cpu_page_size_per_worker)
        return slots

    def _make_worker(self, layout: CacheLayout, resources: Closing) -> TritonOffloadingWorker:
        path, staging = (
            self.extra_config.get("path", "auto"),
            self.extra_config.get("staging_bytes"),
        )
        calibration = calibration_for(layout.device, self.extra_config.get("calibration", "auto"))
        device = device_for(layout.device, calibration)
        pool = self._create_pool(device, layout, resources)
        verify = self.extra_config.get("verify", "off")
        if staging is None:
            queue = transfer_queue(layout, pool, path, None, calibration, verify)
        else:
            chosen = None if path == "auto" else path
            options = PipelineOptions(path=chosen, buffer_bytes=staging)
            queue = transfer_queue(layout, pool, "auto", options, calibration, verify)
        resources.callback(queue.shutdown)
        return TritonOffloadingWorker(queue, pool, layout, resources)

    def _create_pool(self, device: Device, layout: CacheLayout, resources: Closing) -> HostPool:
        num_slots, slot_bytes = self.num_chunks, self.cpu_page_size_per_worker
        sizes: Sequence[int] = ()
        if self.group_pool is not None:
            slabs, sizes = self.group_pool.slabs, self.group_pool.sizes
            num_slots, slot_bytes = slabs.num_slabs, slabs.slab_bytes
        if not self._uses_shared_region():
            try:
                pool = HostPool.allocate(device, num_slots, slot_bytes, sizes)
            except ValueError as error:  # more than there is: what vLLM's users call it
                message = str(error).replace("host_bytes", "cpu_bytes_to_use")
                raise ValueError(message) from error
            resources.callback(pool.close)
            return pool
        region = self._create_region()
        resources.callback(_release, region)
        pool = self._pool_in(region, device, layout)
        resources.callback(pool.close)
        return pool

    def _pool_in(self, region: Any, device: Device, layout: CacheLayout) -> HostPool:
        if self.group_pool is not None:
            # Each rank has one part of it, which nobody else reads, and pins it in the background.
            slabs, sizes = self.group_pool.slabs, self.group_pool.sizes
            part = region.create_next_worker_view(slabs.num_bytes).view(torch.uint8)
            slots = part.view(slabs.num_slabs, slabs.slab_bytes)
            return HostPool(device, slots, owned=True, pinned=False, sizes=sizes)
        if PIN_MEMORY:
            alone = not self.config.canonical_layout
            _call(vllm_worker.pin_mmap_region, region=region, worker_slot_only=alone)
        slots = self._map_slots(region, layout)
        # What a CPU computes with needs no pinning.
        pinned = region.is_pinned or current_platform.is_cpu()
        pool = HostPool.from_tensor(device, slots.view(torch.uint8), pinned=pinned)
        pool.piece_slots = _pinned_rows(region, self.kv_bytes_per_chunk)
        pool.has_other_writers = self.has_tiers
        return pool

    def _create_region(self) -> Any:
        with suppress(OSError):  # an engine starts without that, too
            remove_stale_regions(self.config.engine_id)
        # With a barrier it takes its name away when all ranks have it, and the scheduler, which
        # comes after them, would make another. Nor does the scheduler know of several files.
        alone = not self.has_tiers
        rows, row_bytes, slot_bytes = (
            self.num_chunks,
            self.kv_bytes_per_chunk,
            self.cpu_page_size_per_worker,
        )
        if self.group_pool is not None:  # one row of all ranks' parts
            slot_bytes = self.group_pool.part_bytes
            rows, row_bytes = 1, slot_bytes * self.group_pool.ranks
        return _call(
            SharedOffloadRegion,
            engine_id=self.config.engine_id,
            num_chunks=rows,
            rank=0 if self.replicated_layout else self.config.parallel.rank,
            kv_bytes_per_chunk=row_bytes,
            cpu_page_size=slot_bytes,
            barrier=vllm_spec._all_workers_barrier if alone else None,
            creator_memory_check=_check_there_is_memory,  # others may have taken it by now
            num_segments=getattr(vllm_spec, "_REGION_SEGMENTS", 1) if alone else 1,  # since 0.33
        )


def _check_there_is_memory(num_bytes: int) -> None:
    check_memory("cpu_bytes_to_use", num_bytes)
    check_room("cpu_bytes_to_use", num_bytes, "/dev/shm")


def _check_stages(config: Any) -> None:
    """Raise on every rank where a stage has more or fewer layers than others.

    The scheduler knows the size of the first one alone, and hands out slots of that pool.
    """
    if config.parallel.pp_size == 1 or not torch.distributed.is_initialized():  # or: beside it
        return
    group = get_world_group().cpu_group
    sizes = [0] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(sizes, config.worker_kv_bytes_per_block, group=group)
    if len(set(sizes)) > 1:
        raise ValueError(
            "pipeline_parallel_size: expected stages of equally many bytes of KV cache per block, "
            f"got {sizes}, by rank; VLLM_PP_LAYER_PARTITION says which layers are in which stage"
        )


def _check_hits() -> None:
    """Raise where the engine would answer wrongly after a load, however right the bytes are.

    Without AMX vLLM's CPU kernels for MLA can't go on from a part of a prompt that is there. Hence
    vLLM turns its own prefix cache off, but not what a connector finds.
    """
    config = get_current_vllm_config_or_none()
    if config is None or not current_platform.is_cpu() or not config.model_config.use_mla:
        return
    if not config.cache_config.enable_prefix_caching:
        raise ValueError(
            "enable_prefix_caching: expected True for MLA on vLLM's CPU platform, got False, as "
            "vLLM has it on processors without AMX: answers after a hit are wrong there, and so "
            "they would be after a load"
        )


def _check_whole_blocks(kv_caches: Any, block_bytes: int) -> None:
    """Raise where the one tensor that vLLM hands over has a part of each block only.

    It takes caches whose pages lie apart for blocks of all layers, and where they end for where the
    next page begins: not so where heads lie outside of blocks, or pages are padded one by one.
    """
    pages = [cache.page_size_bytes for cache in kv_caches.tensors]
    if len(pages) == 1 and pages[0] < block_bytes:
        raise ValueError(
            f"kv_caches: expected blocks of {block_bytes} bytes, got {pages[0]}: of each vLLM "
            "offloads no more; VLLM_KV_CACHE_LAYOUT=BLHNC asks for a layout that moves whole"
        )


def _pinned_rows(region: Any, row_bytes: int) -> int:
    """How many rows vLLM pinned at once; no copy may straddle two such pieces.

    A piece is whole rows, or, since 0.33 and where other ranks' slots take much of a row, one slot.
    """
    starts = sorted(region.pinned_addresses)
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    return int(min(gaps, default=region.total_size_bytes) // row_bytes)


def _release(region: Any) -> None:
    # vLLM unmaps its region, which it can't while a tensor of ours, held by a cycle of the objects
    # that were just shut down, exports that memory.
    gc.collect()
    if region.fd is not None:
        # Where nobody has taken the name away yet. vLLM would take it from another file, too.
        shared_memory.unlink(region.fd, region.mmap_path)
        region._creator = False
    region.cleanup()


def tensors_of(kv_caches: Any) -> list[torch.Tensor]:
    """The caches of vLLM's CanonicalKVCaches as int8 [blocks, page bytes]."""
    return [
        cache.tensor.view(torch.int8).view(-1, cache.page_size_bytes) for cache in kv_caches.tensors
    ]


def _layout(kv_caches: Any, blocks_per_chunk: int, packed: bool) -> CacheLayout:
    groups = []
    for refs in kv_caches.group_data_refs:
        pages: dict[int, int] = {}
        for ref in refs:  # layers that share one cache name its tensor several times
            pages[ref.tensor_idx] = max(pages.get(ref.tensor_idx, 0), ref.page_size_bytes)
        groups.append(list(pages.items()))
    return CacheLayout(tensors_of(kv_caches), blocks_per_chunk, groups, packed=packed)


def _call(function: Callable[..., Any], **offered: Any) -> Any:
    """Call with those of the offered arguments that this version of vLLM takes."""
    return function(**_taken(function, **offered))


def _taken(function: Callable[..., Any], **offered: Any) -> dict[str, Any]:
    taken = inspect.signature(function).parameters
    return {name: value for name, value in offered.items() if name in taken}
