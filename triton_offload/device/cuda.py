"""CUDA: streams, events, memory and copies by the driver; torch has the engine's stream, and what
launches kernels.

What differs between machines is asked of the driver, never guessed from a name or a version.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import time
from contextlib import suppress

import torch

from triton_offload.calibration import (
    CUDA_PATHS,
    Calibration,
    LaunchShape,
    default_calibration,
)
from triton_offload.device.cuda_batches import find_batches
from triton_offload.device.cuda_memory import PORTABLE_MAPPED, device_bytes, pinned_bytes
from triton_offload.device.driver import (
    Context,
    DriverError,
    bindings,
    call,
    context_of,
    entry_point,
)
from triton_offload.device.numa import node_of_card
from triton_offload.device.realtime import RealTime
from triton_offload.errors import DeviceLostError
from triton_offload.kernels import pages
from triton_offload.kernels.arguments import shown
from triton_offload.kernels.table import PageTable, alignment_of
from triton_offload.specs import Direction, Ids

_log = logging.getLogger(__name__)

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it does not wait for the legacy stream
_DEFAULT, _DISABLE_TIMING = 0, 2  # of events: one without a time is cheaper to record
_POLL_SECONDS = 0.0001


class Event:
    """An event of the driver, destroyed with this."""

    __slots__ = ("_context", "handle")

    def __init__(self, context: Context, flags: int) -> None:
        self._context = context
        with context:
            self.handle = call("cuEventCreate", flags)

    def __del__(self) -> None:
        with suppress(Exception), self._context:  # lost with its context, or never made
            call("cuEventDestroy", self.handle)


class CUDADevice(RealTime):
    """See `base.Device`.

    Raises ValueError where the card does not share the host's addresses, RuntimeError where
    cuda-bindings is missing.
    """

    def __init__(self, device: torch.device, calibration: Calibration | None = None) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.torch_device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(self.torch_device)
        self.blocks_on_pageable = True
        self.default_paths = CUDA_PATHS
        self.needs_interpreter = False
        self._context = context_of(index)
        if not self._context.attribute("UNIFIED_ADDRESSING"):
            raise ValueError(
                "kv_caches: expected tensors on a card that shares the host's addresses (unified "
                f"addressing), got some on {self.name}"
            )
        with self._context:  # "greatest" is the smaller number; everybody else's is the least
            least, greatest = call("cuCtxGetStreamPriorityRange")
        self._priorities = {False: least, True: greatest}
        # Of CUDA 2.0: newer bindings ask for the version of 12.8, which older drivers lack.
        self._elapsed = entry_point(
            "cuEventElapsedTime", 2000, ctypes.POINTER(ctypes.c_float), *(ctypes.c_void_p,) * 2
        )
        self._examine()
        launches = calibration or default_calibration("cuda")
        self._configs = {
            (way, mapped): launch_config(shapes.of(way), zero_copy=mapped)
            for mapped, shapes in ((False, launches.staged), (True, launches.zero_copy))
            for way in Direction
        }

    def _examine(self) -> None:
        """What this card and its driver have, and why they have no more."""
        limits = []
        attribute = self._context.attribute
        node = attribute("HOST_NUMA_ID")  # since CUDA 12.2; -1 where the system has none
        known = node is not None and node >= 0
        self.numa_node = node if known else node_of_card(self._context.bus_id())
        self.maps_host_memory = bool(attribute("CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM"))
        if not self.maps_host_memory:
            limits.append(
                "registered host memory has another address on the card: no zero_copy, and no "
                "batches of copies"
            )
        self._batches = None
        if self.maps_host_memory:
            found = find_batches(self._context)
            if isinstance(found, str):
                limits.append(f"no batches of copies ({found}): small runs are copied one by one")
            else:
                self._batches = found
        self.batches_copies = self._batches is not None
        refusal = self._try_registering()
        self._registers = refusal is None
        if refusal is not None:
            limits.append(
                f"host memory can't be registered ({refusal}): the driver allocates a private pool "
                "pinned, all of it at construction"
            )
        if attribute("INTEGRATED"):
            limits.append("the card's memory is the host's: what is offloaded frees none of it")
        self.limits = tuple(limits)

    def _try_registering(self) -> str | None:
        """Why not, tried with a page of memory."""
        if not self._context.attribute("HOST_REGISTER_SUPPORTED"):
            return "the card has no support for it"
        page = torch.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=torch.uint8)
        try:
            self.register(page)
            self.unregister(page)
        except DriverError as error:
            return str(error)
        return None

    # -- threads --

    def enter_thread(self) -> None:
        torch.cuda.set_device(self.torch_device)

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

    def capturing(self, stream: torch.cuda.Stream | None) -> bool:
        if stream is None:
            stream = torch.cuda.current_stream(self.torch_device)
        try:
            with self._context:
                status = call("cuStreamIsCapturing", stream.cuda_stream)
        except DriverError as error:
            if error.captures:  # the legacy stream, while another one captures
                return True
            raise
        return int(status) != 0  # a capture that was broken is one until it is ended

    def new_stream(self, name: str, *, high_priority: bool = False) -> torch.cuda.Stream:
        priority = self._priorities[high_priority]
        with self._context.beside_captures():
            handle = call("cuStreamCreateWithPriority", _NON_BLOCKING, priority)
        try:
            return torch.cuda.ExternalStream(int(handle), self.torch_device)
        except BaseException:
            with self._context.beside_captures():
                call("cuStreamDestroy", handle)
            raise

    def close_stream(self, stream: torch.cuda.Stream) -> None:
        # A lost context frees its streams itself; the jobs on them carry the error.
        with suppress(DriverError), self._context.beside_captures():
            with suppress(DriverError):
                call("cuStreamSynchronize", stream.cuda_stream)
            call("cuStreamDestroy", stream.cuda_stream)

    def new_event(self, *, timed: bool = False) -> Event:
        return Event(self._context, _DEFAULT if timed else _DISABLE_TIMING)

    def record(self, event: Event, stream: torch.cuda.Stream) -> None:
        with self._context:
            call("cuEventRecord", event.handle, stream.cuda_stream)

    def wait(self, stream: torch.cuda.Stream, event: Event) -> None:
        with self._context:
            call("cuStreamWaitEvent", stream.cuda_stream, event.handle, 0)

    def query(self, event: Event) -> bool:
        return self._reaches("cuEventQuery", event)

    def synchronize(self, event: Event, timeout: float | None) -> None:
        if timeout is None and self._reaches("cuEventSynchronize", event):
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.query(event):
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"the event was not reached within {timeout} s")
            time.sleep(_POLL_SECONDS)

    def _reaches(self, name: str, event: Event) -> bool:
        try:
            with self._context.beside_captures():
                call(name, event.handle)
        except DriverError as error:
            if error.not_ready or error.captures:
                return False
            raise DeviceLostError(str(error)) from error  # a fault of any kernel ends the context
        return True

    def elapsed(self, start: Event, end: Event) -> float:
        milliseconds = ctypes.c_float()
        assert self._elapsed is not None
        with self._context:
            self._elapsed(ctypes.byref(milliseconds), int(start.handle), int(end.handle))
        return milliseconds.value * 1e-3

    # -- memory --

    def empty(self, num_bytes: int) -> torch.Tensor:
        return device_bytes(self._context, self.torch_device, num_bytes)

    def empty_indices(self, count: int) -> torch.Tensor:
        memory = pinned_bytes(self._context, 8 * count)
        with torch.inference_mode(False):  # which a view of another type would be of, too
            return memory.view(torch.int64)

    def empty_pinned(self, num_bytes: int) -> torch.Tensor | None:
        if self._registers:
            return None
        try:
            return pinned_bytes(self._context, num_bytes)
        except DriverError as error:
            _log.warning(
                "%d bytes of pinned host memory are not to be had: %s", num_bytes, str(error)
            )
            return None

    def register(self, host: torch.Tensor) -> bool:
        with self._context.beside_captures():
            call("cuMemHostRegister", host.data_ptr(), _span_bytes(host), PORTABLE_MAPPED)
        return True

    def unregister(self, host: torch.Tensor) -> None:
        with self._context.beside_captures():
            call("cuMemHostUnregister", host.data_ptr())

    # -- work --

    def fill_zero(self, buffer: torch.Tensor, stream: torch.cuda.Stream) -> None:
        with self._context:
            call("cuMemsetD8Async", buffer.data_ptr(), 0, buffer.numel(), stream.cuda_stream)

    def copy(self, dst: torch.Tensor, src: torch.Tensor, stream: torch.cuda.Stream) -> None:
        to, source = dst.data_ptr(), src.data_ptr()
        with self._context:
            if dst.is_contiguous() and src.is_contiguous():
                call("cuMemcpyAsync", to, source, dst.numel(), stream.cuda_stream)
            else:
                call("cuMemcpy2DAsync", _rows(dst, src), stream.cuda_stream)

    def copy_batch(self, dst: Ids, src: Ids, sizes: Ids, stream: torch.cuda.Stream) -> None:
        if len(sizes) == 0:
            return
        with self._context:
            if self._batches is None:
                _copy_each(dst, src, sizes, stream)
                return
            try:
                self._batches.copy(dst, src, sizes, stream.cuda_stream)
            except DriverError as error:
                _copy_each(dst, src, sizes, stream)  # where that fails too, it was not the batch
                self._give_up_batches(str(error))

    def _give_up_batches(self, error: str) -> None:
        if not self.batches_copies:
            return  # another lane was first
        self._batches = None
        self.batches_copies = False
        self.limits += (f"no batches of copies ({error}): small runs are copied one by one",)
        _log.warning(
            "a batch of copies was refused (%s): from now on ranges are copied one by one, which "
            "takes the thread that submits some microseconds for each",
            error,
        )

    def prepare(self, table: PageTable, slots: torch.Tensor, *, sums: bool = False) -> None:
        alignment = alignment_of(slots.data_ptr(), slots.stride(0))
        with self._context.beside_captures():  # a module is loaded
            for config in {
                self._config(way, zero_copy=slots.device.type == "cpu", sums=sums)
                for way in Direction
            }:
                pages.prepare(table, alignment, config, sums=sums)

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
        sums: torch.Tensor | None = None,
    ) -> None:
        config = self._config(Direction.STORE, zero_copy=zero_copy, sums=sums is not None)
        with torch.cuda.stream(stream):
            pages.launch_gather(table, block_ids, slots, slot_ids, first_block, config, sums)

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
        sums: torch.Tensor | None = None,
    ) -> None:
        config = self._config(Direction.LOAD, zero_copy=zero_copy, sums=sums is not None)
        with torch.cuda.stream(stream):
            pages.launch_scatter(table, block_ids, slots, slot_ids, first_block, config, sums)

    def _config(self, way: Direction, *, zero_copy: bool, sums: bool) -> pages.KernelConfig:
        config = self._configs[way, zero_copy]
        if not sums:
            return config
        if config.stages > 1:  # a ring adds nothing up
            config = launch_config(None, zero_copy=zero_copy)
        return pages.summing_config(config)


def launch_config(shape: LaunchShape | None, *, zero_copy: bool) -> pages.KernelConfig:
    """The kernels' own configuration, or one of this shape with as many bytes per thread."""
    own = pages.choose_config(zero_copy=zero_copy, backend="cuda")
    if shape is None:
        return own
    if shape.ring:
        return pages.ring_config(shape.programs)
    return pages.KernelConfig(
        shape.warps, own.tile_bytes // own.warps * shape.warps, shape.programs
    )


def _rows(dst: torch.Tensor, src: torch.Tensor) -> object:
    """A copy of uint8 [rows, width], of which either side's rows may lie apart."""
    driver = bindings()
    copy = driver.CUDA_MEMCPY2D()
    # Whose memory each is, the driver finds out by its address.
    copy.srcMemoryType = copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_UNIFIED
    copy.Height, copy.WidthInBytes = dst.shape
    copy.dstDevice, copy.srcDevice = dst.data_ptr(), src.data_ptr()
    rows, width = dst.shape
    # A single row may have any stride, longer ones than a pitch can be.
    copy.dstPitch, copy.srcPitch = (m.stride(0) if rows > 1 else width for m in (dst, src))
    return copy


def _copy_each(dst: Ids, src: Ids, sizes: Ids, stream: torch.cuda.Stream) -> None:
    for to, source, size in zip(dst.tolist(), src.tolist(), sizes.tolist(), strict=True):
        call("cuMemcpyAsync", to, source, size, stream.cuda_stream)


def _span_bytes(host: torch.Tensor) -> int:
    """From the first byte to the last of uint8 rows that may lie apart, or of one row."""
    return int(sum((n - 1) * step for n, step in zip(host.shape, host.stride(), strict=True)) + 1)
