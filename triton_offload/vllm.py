"""The plug-in for vLLM's OffloadingConnector: vLLM decides what to offload, this moves the bytes.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
      "kv_connector_extra_config": {"spec_name": "TritonOffloadingSpec",
      "spec_module_path": "triton_offload.vllm", "cpu_bytes_to_use": 8589934592}}'

Every option of vLLM's `CPUOffloadingSpec` applies; `path` ("auto", "staged", "zero_copy" or
"copy_engine") and `calibration` ("auto", "off" or a file) are ours, and mean what they do for
`KVOffloader`. The only module of this package that imports vllm at its top.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import torch

from triton_offload.calibrate import calibration_for
from triton_offload.device import device_for
from triton_offload.host_pool import HostPool
from triton_offload.layout import CacheLayout
from triton_offload.queue_manager import OffloadingQueueManager, transfer_queue
from triton_offload.specs import CPULoadStoreSpec, GPULoadStoreSpec, TransferStatus

_SUPPORTED_VERSIONS = ("0.32", "0.33")
_SUPPORT = (
    f"triton_offload.vllm supports vLLM {' and '.join(_SUPPORTED_VERSIONS)} "
    "on CUDA and on vLLM's CPU platform, without canonical_layout"
)
# Less than a step of any model takes on a CPU, and enough for some 10 MB of copies.
_GIVE_WAY_SECONDS = 0.002

try:
    import vllm
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import PIN_MEMORY
    from vllm.v1.kv_offload import base as vllm_base
    from vllm.v1.kv_offload.cpu import gpu_worker as vllm_worker
    from vllm.v1.kv_offload.cpu import spec as vllm_spec
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
except ImportError as _error:
    raise ImportError(f"{_SUPPORT}; this one lacks what they have: {_error}") from _error


def require_version(version: str) -> None:
    """Raise ImportError unless `version` is a vLLM that this plug-in was tested with.

    Names and meanings in vLLM's offloading moved in each of its releases.
    """
    if ".".join(version.split(".")[:2]) not in _SUPPORTED_VERSIONS:
        raise ImportError(f"{_SUPPORT}; got vLLM {version}")


require_version(vllm.__version__)


class TritonOffloadingSpec(vllm_spec.CPUOffloadingSpec):  # type: ignore[misc]  # vllm is untyped
    """vLLM's CPU offloading with this package's transfers.

    Manager, eviction policies, metrics and sizes are inherited. On CUDA the pool is vLLM's shared
    region in vLLM's own slot format, so that what reads the region (tiers) reads ours too. Raises
    ValueError for what is not supported, as early as the engine builds the spec.
    """

    _worker: Any

    def __init__(self, config: Any) -> None:
        if getattr(config, "canonical_layout", False):
            raise ValueError(f"{_SUPPORT}; got canonical_layout=True")
        if not (current_platform.is_cuda() or current_platform.is_cpu()):
            raise ValueError(f"{_SUPPORT}; got the platform {current_platform.device_name!r}")
        # One copy a rank is right for replicated (MLA) caches too, and needs no writer election.
        # It has to be said before the sizes are worked out.
        if getattr(config, "replicated_layout", False):
            config = dataclasses.replace(config, replicated_layout=False)
        super().__init__(config)
        if self.num_chunks < 1:
            raise ValueError(
                f"cpu_bytes_to_use: expected at least one chunk of {self.kv_bytes_per_chunk} "
                f"bytes, got {self.extra_config.get('cpu_bytes_to_use')}"
            )

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
        path = self.extra_config.get("path", "auto")
        calibration = calibration_for(layout.device, self.extra_config.get("calibration", "auto"))
        device = device_for(layout.device, calibration)
        if not self._uses_shared_region():
            pool = HostPool.allocate(device, self.num_chunks, self.cpu_page_size_per_worker)
            queue = transfer_queue(layout, pool, path, None, calibration)
            return TritonOffloadingWorker(queue, pool)
        region = self._create_region()
        try:
            if PIN_MEMORY:
                _call(vllm_worker.pin_mmap_region, region=region, worker_slot_only=True)
            slots = region.create_next_worker_view(self.cpu_page_size_per_worker)
            pool = HostPool.from_tensor(device, slots.view(torch.uint8), pinned=region.is_pinned)
            # The region is pinned in pieces of whole rows, and no copy may straddle two.
            rows = vllm_worker.MAX_HOST_REGISTER_CHUNK_BYTES // self.kv_bytes_per_chunk
            pool.piece_slots = max(1, min(pool.num_slots, rows))
            queue = transfer_queue(layout, pool, path, None, calibration)
            return TritonOffloadingWorker(queue, pool, region.cleanup)
        except BaseException:
            region.cleanup()
            raise

    def _create_region(self) -> Any:
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


@dataclasses.dataclass(slots=True)
class TransferCounts:
    """What the jobs of one direction came to that were reported as done."""

    jobs: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


class TritonOffloadingWorker(vllm_base.OffloadingWorker):  # type: ignore[misc]  # vllm is untyped
    """One rank's transfers. vLLM calls every method from the thread that runs the model.

    `release`: called once the last transfer has ended and nothing holds the pool any more.
    """

    def __init__(
        self,
        manager: OffloadingQueueManager,
        pool: HostPool,
        release: Callable[[], None] | None = None,
    ) -> None:
        self.stores, self.loads = TransferCounts(), TransferCounts()
        self.pool: HostPool | None = pool
        self._manager: OffloadingQueueManager | None = manager
        self._release = release
        self._ours: dict[int, int] = {}  # vLLM's job id -> ours, until it is reported
        self._theirs: dict[int, tuple[int, TransferCounts]] = {}
        self._reports: list[Any] = []
        self._failures: deque[RuntimeError] = deque()

    @property
    def num_in_flight(self) -> int:
        """Jobs that were submitted and are not reported yet."""
        return len(self._ours)

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Queue device to host. Returns True, or raises with nothing queued.

        vLLM writes a chunk's slot once, with all that the chunk will ever hold: what a partial
        chunk leaves is cleared, for tiers would persist whatever was there.
        """
        self._submit(job_id, _pages(src_spec), _slots(dst_spec, fresh=True), self.stores)
        return True

    def submit_load(
        self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False
    ) -> bool:
        """Queue host to device; `expedited`: the step waits for it. Returns True, or raises."""
        self._submit(job_id, _slots(src_spec), _pages(dst_spec), self.loads, expedited=expedited)
        return True

    def get_finished(self) -> list[Any]:
        """vLLM's TransferResult of each job that ended since the last call, each job once.

        Raises RuntimeError for a job that failed: vLLM can't do without its bytes, and reported
        as a success it would be a wrong hit. The other jobs are reported by the next calls.
        """
        if self._manager is None:
            return []
        self._give_way(self._manager)
        for result in self._manager.get_finished():
            job_id, counts = self._theirs.pop(result.job_id)
            del self._ours[job_id]
            if result.status is not TransferStatus.SUCCESS:
                kind = "store" if counts is self.stores else "load"
                failure = RuntimeError(
                    f"KV offloading {kind} {job_id} ended as {result.status.value}: "
                    f"{result.error!r}"
                )
                failure.__cause__ = result.error
                self._failures.append(failure)
                continue
            counts.jobs += 1
            counts.num_bytes += result.num_bytes
            counts.seconds += result.seconds
            self._reports.append(
                vllm_base.TransferResult(
                    job_id=job_id,
                    success=True,
                    transfer_size=result.num_bytes,
                    transfer_time=result.seconds,
                )
            )
        if self._failures:
            raise self._failures.popleft()
        reports, self._reports = self._reports, []
        return reports

    def wait(self, job_ids: Collection[int]) -> None:
        """Block until these jobs have ended, without consuming their results.

        Ids that were never submitted here are ignored: ranks that don't write are asked too.
        """
        if self._manager is not None:
            self._manager.wait([self._ours[job] for job in job_ids if job in self._ours])

    def shutdown(self) -> None:
        """End every transfer and give the pool back. Idempotent."""
        manager, pool, release = self._manager, self.pool, self._release
        self._manager = self.pool = self._release = None
        self._ours.clear()
        self._theirs.clear()
        self._reports.clear()
        self._failures.clear()
        if manager is not None:
            manager.shutdown()
        if pool is not None:
            pool.close()
        del manager, pool
        if release is not None:
            # vLLM unmaps its region, which it can't while a tensor of ours, held by a cycle of
            # the objects that were just shut down, exports that memory.
            gc.collect()
            release()

    def _give_way(self, manager: OffloadingQueueManager) -> None:
        """On the host device, let the oldest loads use the interpreter for a moment.

        An engine that has nothing to do but wait for a load calls `get_finished` in a tight loop.
        On the host device the transfers run in Python threads of the same process, which such a
        loop keeps from the interpreter lock: 60 MB took 1.5 s instead of 10 ms.
        """
        if self.pool is None or self.pool.device.name != "host":
            return
        loads = [ours for ours, (_, counts) in self._theirs.items() if counts is self.loads]
        with suppress(TimeoutError):
            manager.wait(loads, _GIVE_WAY_SECONDS)

    def _submit(
        self,
        job_id: int,
        src: GPULoadStoreSpec | CPULoadStoreSpec,
        dst: GPULoadStoreSpec | CPULoadStoreSpec,
        counts: TransferCounts,
        expedited: bool = False,
    ) -> None:
        if self._manager is None:
            raise RuntimeError("the offloading worker is shut down")
        if job_id in self._ours:
            raise ValueError(f"job_id: expected an id that is not in flight, got {job_id}")
        ours = self._manager.transfer_async(src, dst, expedited=expedited)
        self._ours[job_id] = ours
        self._theirs[ours] = (job_id, counts)


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


def _pages(spec: Any) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(spec.block_ids, spec.group_sizes, spec.block_indices)


def _slots(spec: Any, fresh: bool | None = None) -> CPULoadStoreSpec:
    return CPULoadStoreSpec(spec.block_ids, fresh)


def _call(function: Callable[..., Any], **offered: Any) -> Any:
    """Call with those of the offered arguments that this version of vLLM takes."""
    taken = inspect.signature(function).parameters
    return function(**{name: value for name, value in offered.items() if name in taken})
