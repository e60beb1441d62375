"""What moves the same bytes: our paths, and what a user could write without this package.

A contender's `start` queues one direction, and `finish` returns when all that was started has
landed. On the CPU `start` of everything but our paths does the work itself.
"""

from __future__ import annotations

import ctypes
import importlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import pytest
import torch
from sizes import HAS_GPU
from timing import DEVICE
from world import World

from triton_offload.calibration import Path
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.transfer.queue_manager import transfer_queue


class Contender(ABC):
    """Moves a world's blocks. `device_seconds`: what the device's own events say, by transfer."""

    def __init__(self) -> None:
        self.device_seconds: list[float] = []

    @abstractmethod
    def start(self, direction: Direction) -> None: ...

    @abstractmethod
    def pending(self) -> bool:
        """Whether anything that was started has not landed yet; does not block."""

    @abstractmethod
    def finish(self) -> None: ...

    def run(self, *directions: Direction) -> None:
        for direction in directions:
            self.start(direction)
        self.finish()

    def close(self) -> None:
        return


class Ours(Contender):
    """This package, by one path, or by the rule (`auto`)."""

    def __init__(self, world: World, path: str, window_bytes: int | None = None) -> None:
        super().__init__()
        self._world = world
        self._pool = world.pool()
        options = PipelineOptions(
            path=None if path == "auto" else Path(path), window_bytes=window_bytes
        )
        self._queue = transfer_queue(world.layout, self._pool, options=options)
        self._jobs: set[int] = set()

    def start(self, direction: Direction) -> None:
        blocks, slots = self._world.ids(direction)
        sizes = [len(blocks)] + [0] * (len(self._world.layout.groups) - 1)
        device_spec = GPULoadStoreSpec(blocks, sizes)
        host_spec = CPULoadStoreSpec(slots, fresh=True)
        if direction is Direction.STORE:
            self._jobs.add(self._queue.transfer_async(device_spec, host_spec))
        else:
            self._jobs.add(self._queue.transfer_async(host_spec, device_spec))

    def pending(self) -> bool:
        for result in self._queue.get_finished():
            if not result.success:
                raise RuntimeError(f"a transfer failed: {result.error}")
            self._jobs.remove(result.job_id)
            self.device_seconds.append(result.seconds)
        return bool(self._jobs)

    def finish(self) -> None:
        # Without a timeout: with one, the device's seam polls in steps of 0.1 ms.
        self._queue.wait(self._jobs)
        if self.pending():
            raise RuntimeError("a transfer was not reported")

    def close(self) -> None:
        self._queue.shutdown(120)
        self._pool.close()


class OnStreams(Contender):
    """Queues plain copies, a stream for each direction; on the CPU they are done at once."""

    def __init__(self) -> None:
        super().__init__()
        self._streams = {d: torch.cuda.Stream() for d in Direction} if HAS_GPU else {}
        self._started: list[tuple[Any, Any]] = []

    @abstractmethod
    def queue(self, direction: Direction) -> None:
        """Queue one direction on the current stream."""

    def start(self, direction: Direction) -> None:
        if not HAS_GPU:
            self.queue(direction)
            return
        with torch.cuda.stream(self._streams[direction]):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.queue(direction)
            end.record()
        self._started.append((start, end))

    def pending(self) -> bool:
        return any(not end.query() for _, end in self._started)

    def finish(self) -> None:
        for start, end in self._started:
            end.synchronize()
            self.device_seconds.append(start.elapsed_time(end) * 1e-3)
        self._started.clear()


class PlainCopy(OnStreams):
    """One copy of `num_bytes` between contiguous device and pinned host memory: the limit."""

    def __init__(self, num_bytes: int, *, duplex: bool = False) -> None:
        super().__init__()
        pairs = [
            (torch.zeros(num_bytes, dtype=torch.uint8, device=DEVICE), _host(num_bytes))
            for _ in range(1 + duplex)
        ]
        self._of = dict(zip(Direction, (pairs[0], pairs[-1]), strict=True))

    def queue(self, direction: Direction) -> None:
        device, host = self._of[direction]
        target, source = (host, device) if direction is Direction.STORE else (device, host)
        target.copy_(source, non_blocking=True)


class IndexSelect(OnStreams):
    """torch alone: `index_select` of each cache into a staging buffer of the whole job, one copy,
    and for loads one copy and `index_copy_`."""

    def __init__(self, world: World) -> None:
        super().__init__()
        # The widest words, for on the CPU torch copies bytes one at a time.
        self._caches = [_words(cache) for cache in world.moved]
        self._ids = {d: torch.from_numpy(world.ids(d)[0]).to(DEVICE) for d in Direction}
        shape = (len(self._caches), len(world.block_ids), self._caches[0].shape[1])
        dtype = self._caches[0].dtype
        shared = world.slots != "duplex"
        self._staging = {d: torch.zeros(shape, dtype=dtype, device=DEVICE) for d in Direction}
        hosts = [torch.zeros(shape, dtype=dtype, pin_memory=HAS_GPU) for _ in range(2 - shared)]
        self._host = dict(zip(Direction, (hosts[0], hosts[-1]), strict=True))

    def queue(self, direction: Direction) -> None:
        staging, host, ids = (x[direction] for x in (self._staging, self._host, self._ids))
        if direction is Direction.STORE:
            for cache, place in zip(self._caches, staging, strict=True):
                torch.index_select(cache, 0, ids, out=place)
            host.copy_(staging, non_blocking=True)
        else:
            staging.copy_(host, non_blocking=True)
            for cache, place in zip(self._caches, staging, strict=True):
                cache.index_copy_(0, ids, place)


class _PageByPage(OnStreams):
    """Knows the address of every page on both sides beforehand: planning is not in its time."""

    def __init__(self, world: World) -> None:
        super().__init__()
        caches = world.moved
        page = world.page_bytes
        self._host = _host(world.num_slots * len(caches) * page)
        self._sides: dict[Direction, tuple[Any, Any]] = {}
        for direction in Direction:
            blocks, slots = world.ids(direction)
            device = np.concatenate([c.data_ptr() + blocks * c.stride(0) for c in caches])
            host = self._host.data_ptr() + np.concatenate(
                [slots * len(caches) * page + i * page for i in range(len(caches))]
            )
            pair = (host, device) if direction is Direction.STORE else (device, host)
            self._sides[direction] = tuple(side.astype(np.uint64) for side in pair)  # type: ignore[assignment]
        self._page_bytes = page


class CopyPerPage(_PageByPage):
    """One `cudaMemcpyAsync` (on the CPU: `memmove`) for every page, issued from Python."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._lists = {d: tuple(map(np.ndarray.tolist, pair)) for d, pair in self._sides.items()}
        self._copy = ctypes.memmove if not HAS_GPU else None
        self._runtime = _bindings("runtime") if HAS_GPU else None

    def queue(self, direction: Direction) -> None:
        targets, sources = self._lists[direction]
        size = self._page_bytes
        if self._copy is not None:
            for target, source in zip(targets, sources, strict=True):
                self._copy(target, source, size)
            return
        runtime: Any = self._runtime
        copy, kind = runtime.cudaMemcpyAsync, runtime.cudaMemcpyKind.cudaMemcpyDefault
        stream = torch.cuda.current_stream().cuda_stream
        for target, source in zip(targets, sources, strict=True):
            (error,) = copy(target, source, size, kind, stream)
            if int(error) != 0:
                raise RuntimeError(f"cudaMemcpyAsync: {error}")


class BatchedCopy(_PageByPage):
    """`cuMemcpyBatchAsync`, a descriptor for every page, source order STREAM.

    Called through ctypes with arrays made beforehand: lists of Python objects, which cuda-bindings
    takes, would cost more than the driver.
    """

    def __init__(self, world: World, *, overlap: bool) -> None:
        if not HAS_GPU:
            pytest.skip("cuMemcpyBatchAsync needs a GPU")
        super().__init__(world)
        driver = _bindings("driver")
        self._attributes = driver.CUmemcpyAttributes()
        self._attributes.srcAccessOrder = (
            driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        )
        if overlap:
            flags = driver.CUmemcpyFlags
            self._attributes.flags = int(flags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE)
        library = driver_library()
        # CUDA 13 dropped the parameter that names the copy which failed.
        newer = hasattr(library, "cuMemcpyBatchAsync_v2")
        if not newer and not hasattr(library, "cuMemcpyBatchAsync"):
            pytest.skip("this driver has no cuMemcpyBatchAsync")
        self._call = library.cuMemcpyBatchAsync_v2 if newer else library.cuMemcpyBatchAsync
        self._failed = () if newer else (ctypes.byref(ctypes.c_size_t()),)
        count = len(self._sides[Direction.STORE][0])
        self._sizes = np.full(count, self._page_bytes, dtype=np.uint64)
        self._first = ctypes.c_size_t(0)

    def queue(self, direction: Direction) -> None:
        target, source = self._sides[direction]
        error = self._call(
            ctypes.c_void_p(target.ctypes.data),
            ctypes.c_void_p(source.ctypes.data),
            ctypes.c_void_p(self._sizes.ctypes.data),
            ctypes.c_size_t(len(self._sizes)),
            ctypes.c_void_p(int(self._attributes.getPtr())),
            ctypes.byref(self._first),
            ctypes.c_size_t(1),
            *self._failed,
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        if error != 0:
            raise RuntimeError(f"cuMemcpyBatchAsync: error {error}")


def driver_library() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _host(num_bytes: int) -> torch.Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=HAS_GPU)


def _words(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.int64) if cache.shape[1] % 8 == 0 else cache


def _bindings(module: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{module}")
    except ImportError:
        pytest.skip("cuda-bindings is not installed")
