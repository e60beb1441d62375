"""CUDA, and ROCm as far as torch carries it. As thin as can be: no test without a GPU reaches it.

torch has streams, events, pinned memory and contiguous copies; cuda-bindings has the copies that
torch lacks.
"""

from __future__ import annotations

import functools
import importlib
import time
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch

from triton_offload.calibration import (
    CUDA_PATHS,
    Calibration,
    LaunchShape,
    default_calibration,
)
from triton_offload.device.realtime import RealTime
from triton_offload.errors import DeviceLostError
from triton_offload.kernels import pages
from triton_offload.kernels.arguments import shown
from triton_offload.kernels.table import PageTable, alignment_of
from triton_offload.specs import Direction, Ids

_REGISTER_PORTABLE_MAPPED = 0x1 | 0x2  # cudaHostRegisterPortable | cudaHostRegisterMapped
_POLL_SECONDS = 0.0001


class CUDADevice(RealTime):
    """See `base.Device`. With unified addressing, registered host memory has one address for the
    host and for kernels."""

    def __init__(self, device: torch.device, calibration: Calibration | None = None) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.torch_device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(self.torch_device)
        self.maps_host_memory = True
        self.blocks_on_pageable = True
        self.default_paths = CUDA_PATHS
        self.needs_interpreter = False
        self.batches_copies = hasattr(_bindings("driver"), "cuMemcpyBatchAsync")
        launches = calibration or default_calibration("cuda")
        self._configs = {
            (way, mapped): launch_config(shapes.of(way), zero_copy=mapped)
            for mapped, shapes in ((False, launches.staged), (True, launches.zero_copy))
            for way in Direction
        }

    # -- streams and events --

    def current_stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.torch_device)

    def check_stream(self, stream: torch.cuda.Stream | None) -> None:
        if stream is None:
            return
        if not isinstance(stream, torch.cuda.Stream) or stream.device != self.torch_device:
            raise ValueError(
                f"stream: expected a torch.cuda.Stream on {self.torch_device}, got {shown(stream)}"
            )

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def new_stream(self, name: str, *, high_priority: bool = False) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.torch_device, priority=-1 if high_priority else 0)

    def close_stream(self, stream: torch.cuda.Stream) -> None:
        # A lost context frees its streams itself; the jobs on them carry the error.
        with suppress(RuntimeError):
            stream.synchronize()

    def new_event(self, *, timed: bool = False) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=timed)

    def record(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        event.record(stream)

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def query(self, event: torch.cuda.Event) -> bool:
        try:
            return bool(event.query())
        except RuntimeError as error:  # a fault of any kernel: the context is gone
            raise DeviceLostError(str(error)) from error

    def synchronize(self, event: torch.cuda.Event, timeout: float | None) -> None:
        if timeout is None:
            try:
                event.synchronize()
            except RuntimeError as error:
                raise DeviceLostError(str(error)) from error
            return
        deadline = time.monotonic() + timeout
        while not self.query(event):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"the event was not reached within {timeout} s")
            time.sleep(_POLL_SECONDS)

    def elapsed(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) * 1e-3

    # -- memory --

    def empty(self, num_bytes: int) -> torch.Tensor:
        with torch.inference_mode(False):
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)
        # torch may hand out memory that what is queued on its own stream still uses; streams of
        # ours know nothing of that. Buffers are made where blocking is allowed.
        torch.cuda.current_stream(self.torch_device).synchronize()
        return buffer

    def empty_indices(self, count: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=True)

    def register(self, host: torch.Tensor) -> bool:
        with torch.cuda.device(self.torch_device):  # another thread has another current device
            error = torch.cuda.cudart().cudaHostRegister(
                host.data_ptr(), _span_bytes(host), _REGISTER_PORTABLE_MAPPED
            )
        return int(error) == 0

    def unregister(self, host: torch.Tensor) -> None:
        with torch.cuda.device(self.torch_device):
            torch.cuda.cudart().cudaHostUnregister(host.data_ptr())

    # -- work --

    def fill_zero(self, buffer: torch.Tensor, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            buffer.zero_()

    def copy(self, dst: torch.Tensor, src: torch.Tensor, stream: torch.cuda.Stream) -> None:
        if dst.is_contiguous() and src.is_contiguous():
            with torch.cuda.stream(stream):
                dst.copy_(src, non_blocking=True)
            return
        runtime = _bindings("runtime")
        if runtime is None:  # torch would copy through a temporary and block
            with torch.cuda.stream(stream):
                for to, source in zip(dst, src, strict=True):
                    to.copy_(source, non_blocking=True)
            return
        rows, width = dst.shape
        _check(
            runtime.cudaMemcpy2DAsync(
                dst.data_ptr(),
                dst.stride(0) if rows > 1 else width,
                src.data_ptr(),
                src.stride(0) if rows > 1 else width,
                width,
                rows,
                runtime.cudaMemcpyKind.cudaMemcpyDefault,
                stream.cuda_stream,
            )
        )

    def copy_batch(self, dst: Ids, src: Ids, sizes: Ids, stream: torch.cuda.Stream) -> None:
        driver = _bindings("driver")
        if driver is None or not self.batches_copies:
            raise RuntimeError(
                "batched copies need cuda-bindings >= 12.8: pip install cuda-bindings"
            )
        if len(sizes) == 0:
            return
        attributes = driver.CUmemcpyAttributes()
        # Never ANY: the source would be read before the work that this stream waits for.
        attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        _check(
            driver.cuMemcpyBatchAsync(
                [driver.CUdeviceptr(address) for address in dst.tolist()],
                [driver.CUdeviceptr(address) for address in src.tolist()],
                sizes.tolist(),
                len(sizes),
                [attributes],
                [0],
                1,
                stream.cuda_stream,
            )
        )

    def prepare(self, table: PageTable, slots: torch.Tensor) -> None:
        alignment = alignment_of(slots.data_ptr(), slots.stride(0))
        for config in {self._configs[way, slots.device.type == "cpu"] for way in Direction}:
            pages.prepare(table, alignment, config)

    def gather(
        self,
        table: PageTable,
        block_ids: torch.Tensor,
        slots: torch.Tensor,
        slot_ids: torch.Tensor,
        first_block: int,
        stream: torch.cuda.Stream,
        *,
        zero_copy: bool,
    ) -> None:
        with torch.cuda.stream(stream):
            config = self._configs[Direction.STORE, zero_copy]
            pages.launch_gather(table, block_ids, slots, slot_ids, first_block, config)

    def scatter(
        self,
        table: PageTable,
        block_ids: torch.Tensor,
        slots: torch.Tensor,
        slot_ids: torch.Tensor,
        first_block: int,
        stream: torch.cuda.Stream,
        *,
        zero_copy: bool,
    ) -> None:
        with torch.cuda.stream(stream):
            config = self._configs[Direction.LOAD, zero_copy]
            pages.launch_scatter(table, block_ids, slots, slot_ids, first_block, config)


def launch_config(shape: LaunchShape | None, *, zero_copy: bool) -> pages.KernelConfig:
    """The kernels' own configuration, or one of this shape with as many bytes per thread."""
    own = pages.choose_config(zero_copy=zero_copy, backend="hip" if torch.version.hip else "cuda")
    if shape is None:
        return own
    lanes = 64 if torch.version.hip else 32
    warps = max(1, shape.warps * 32 // lanes)
    return pages.KernelConfig(warps, own.tile_bytes // own.warps * warps, shape.programs)


def _span_bytes(host: torch.Tensor) -> int:
    """From the first byte to the last of uint8 rows that may lie apart."""
    return int((host.shape[0] - 1) * host.stride(0) + host.shape[1])


@functools.cache
def _bindings(module: str) -> ModuleType | None:
    if torch.version.hip:
        return None
    try:
        return importlib.import_module(f"cuda.bindings.{module}")
    except ImportError:
        return None


def _check(result: tuple[Any, ...]) -> None:
    if int(result[0]) != 0:
        raise RuntimeError(f"the driver refused a copy: {result[0]!r}")
