"""The spec: what vLLM asks for sizes, a manager and each rank's worker."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import itertools
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import vllm
from vllm.distributed.parallel_state import get_world_group
from vllm.platforms import current_platform
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.kv_offload.cpu import gpu_worker as vllm_worker
from vllm.v1.kv_offload.cpu import spec as vllm_spec
from vllm.v1.kv_offload.cpu.policies.factory import CachePolicyFactory
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from triton_offload.closing import Closing
from triton_offload.device import Device, device_for
from triton_offload.pool.host_pool import HostPool
from triton_offload.pool.memory_limits import check_memory, check_room
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.options import PipelineOptions
from triton_offload.transfer.queue_manager import transfer_queue
from triton_offload.tuning.calibrate import calibration_for
from triton_offload.vllm.metrics import DEFINITIONS
from triton_offload.vllm.options import read_options
from triton_offload.vllm.stale_regions import remove_stale_regions
from triton_offload.vllm.versions import SUPPORT
from triton_offload.vllm.worker import TritonOffloadingWorker


class TritonOffloadingSpec(vllm_spec.CPUOffloadingSpec):  # type: ignore[misc]  # vllm is untyped
    """vLLM's CPU offloading with this package's transfers.

    Manager, eviction policies, metrics and sizes are inherited. On CUDA the pool is vLLM's shared
    region in vLLM's own slot format, so that what reads the region (tiers) reads ours too. Raises
    ValueError for what is not supported, as early as the engine builds the spec.
    """

    _worker: Any

    def __init__(self, config: Any) -> None:
        if getattr(config, "canonical_layout", False):
            raise ValueError(f"{SUPPORT}; got canonical_layout=True")
        if not (current_platform.is_cuda() or current_platform.is_cpu()):
            raise ValueError(f"{SUPPORT}; got the platform {current_platform.device_name!r}")
        if config.extra_config.get("secondary_tiers"):
            # They would read a region that is not the one the workers write.
            raise ValueError(
                "secondary_tiers: expected none, for TritonOffloadingSpec moves chunks between "
                f"device and host memory only, got {config.extra_config['secondary_tiers']!r}"
            )
        extra = read_options(config.extra_config, vllm.__version__, CachePolicyFactory._registry)
        config = dataclasses.replace(config, extra_config=extra)
        # One copy a rank is right for replicated (MLA) caches too, and needs no writer election.
        # It has to be said before the sizes are worked out.
        if getattr(config, "replicated_layout", False):
            config = dataclasses.replace(config, replicated_layout=False)
        super().__init__(config)
        if self.num_chunks < 1:
            raise ValueError(
                f"cpu_bytes_to_use: expected at least one chunk of {self.kv_bytes_per_chunk} "
                f"bytes, got {extra['cpu_bytes_to_use']}"
            )
        _check_stages(config)

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """vLLM's metrics by name, and this package's."""
        return {**super().build_metric_definitions(extra_config), **DEFINITIONS}

    def get_worker(self, kv_caches: Any) -> TritonOffloadingWorker:
        """The worker of this rank, made on the first call.

        `kv_caches`: vLLM's CanonicalKVCaches; the tensors must outlive the worker.
        """
        if self._worker is None:
            self._worker = self.create_worker(kv_caches)
        worker: TritonOffloadingWorker = self._worker
        return worker

    def create_worker(self, kv_caches: Any) -> TritonOffloadingWorker:
        layout = _layout(kv_caches, self.blocks_per_chunk)
        if layout.slot_bytes > self.cpu_page_size_per_worker:
            raise ValueError(
                f"kv_caches: expected chunks of at most {self.cpu_page_size_per_worker} bytes "
                f"(cpu_page_size_per_worker), got {layout.slot_bytes}"
            )
        resources = Closing()
        try:
            with torch.inference_mode(False):  # threads that are not in it will write to the pool
                return self._make_worker(layout, resources)
        except BaseException as error:
            # Locals of where it came by hold the pool's memory: vLLM could not unmap its region.
            traceback.clear_frames(error.__traceback__)
            resources.close()
            raise

    def _make_worker(self, layout: CacheLayout, resources: Closing) -> TritonOffloadingWorker:
        path, staging = (
            self.extra_config.get("path", "auto"),
            self.extra_config.get("staging_bytes"),
        )
        calibration = calibration_for(layout.device, self.extra_config.get("calibration", "auto"))
        device = device_for(layout.device, calibration)
        pool = self._create_pool(device, resources)
        verify = self.extra_config.get("verify", "off")
        if staging is None:
            queue = transfer_queue(layout, pool, path, None, calibration, verify)
        else:
            chosen = None if path == "auto" else path
            options = PipelineOptions(path=chosen, buffer_bytes=staging)
            queue = transfer_queue(layout, pool, "auto", options, calibration, verify)
        resources.callback(queue.shutdown)
        return TritonOffloadingWorker(queue, pool, resources)

    def _create_pool(self, device: Device, resources: Closing) -> HostPool:
        if not self._uses_shared_region():
            try:
                pool = HostPool.allocate(device, self.num_chunks, self.cpu_page_size_per_worker)
            except ValueError as error:  # more than there is: what vLLM's users call it
                message = str(error).replace("host_bytes", "cpu_bytes_to_use")
                raise ValueError(message) from error
            resources.callback(pool.close)
            return pool
        region = self._create_region()
        resources.callback(_release, region)
        if PIN_MEMORY:
            _call(vllm_worker.pin_mmap_region, region=region, worker_slot_only=True)
        slots = region.create_next_worker_view(self.cpu_page_size_per_worker)
        pool = HostPool.from_tensor(device, slots.view(torch.uint8), pinned=region.is_pinned)
        resources.callback(pool.close)
        pool.piece_slots = _pinned_rows(region, self.kv_bytes_per_chunk)
        return pool

    def _create_region(self) -> Any:
        num_bytes = self.num_chunks * self.kv_bytes_per_chunk
        check_memory("cpu_bytes_to_use", num_bytes)
        check_room("cpu_bytes_to_use", num_bytes, "/dev/shm")
        with suppress(OSError):  # an engine starts without that, too
            remove_stale_regions(self.config.engine_id)
        return _call(
            SharedOffloadRegion,
            engine_id=self.config.engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
            barrier=vllm_spec._all_workers_barrier,
            num_segments=getattr(vllm_spec, "_REGION_SEGMENTS", 1),  # since 0.33
        )


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
    region.cleanup()


def _layout(kv_caches: Any, blocks_per_chunk: int) -> CacheLayout:
    tensors = [
        cache.tensor.view(torch.int8).view(-1, cache.page_size_bytes) for cache in kv_caches.tensors
    ]
    groups = []
    for refs in kv_caches.group_data_refs:
        pages: dict[int, int] = {}
        for ref in refs:  # layers that share one cache name its tensor several times
            pages[ref.tensor_idx] = max(pages.get(ref.tensor_idx, 0), ref.page_size_bytes)
        groups.append(list(pages.items()))
    return CacheLayout(tensors, blocks_per_chunk, groups)


def _call(function: Callable[..., Any], **offered: Any) -> Any:
    """Call with those of the offered arguments that this version of vLLM takes."""
    taken = inspect.signature(function).parameters
    return function(**{name: value for name, value in offered.items() if name in taken})
