"""Streams, events and captures as `torch.cuda` has them, on the imitated card."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cuda.bindings import driver

from .asking import OnDevice, ask, card_number, current_index, index_of, use

NON_BLOCKING = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
DISABLE_TIMING = int(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
#: torch hands out this many streams per device and priority, in turn
POOL_STREAMS = 32


class Stream:
    """`torch.cuda.Stream`: one of a pool, and never destroyed."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        index = index_of(device)
        self._is(index, _pooled(index, min(priority, 0)))

    def _is(self, index: int, handle: int) -> None:
        self.device = torch.device("cuda", index)
        self.cuda_stream = handle

    @property
    def priority(self) -> int:
        with OnDevice(self.device):
            return int(ask(driver.cuStreamGetPriority(self.cuda_stream)))

    def query(self) -> bool:
        with OnDevice(self.device):
            return reached(driver.cuStreamQuery(self.cuda_stream))

    def synchronize(self) -> None:
        with OnDevice(self.device):
            ask(driver.cuStreamSynchronize(self.cuda_stream))

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and (self.device, self.cuda_stream) == (
            other.device,
            other.cuda_stream,
        )

    def __hash__(self) -> int:
        return hash((self.device, self.cuda_stream))


class ExternalStream(Stream):
    """`torch.cuda.ExternalStream`: one that was made elsewhere, and belongs there."""

    def __init__(self, stream_ptr: int, device: Any = None) -> None:
        self._is(index_of(device), int(stream_ptr))


_pools: dict[tuple[int, int], Iterator[int]] = {}
_pools_lock = threading.Lock()


def _pooled(index: int, priority: int) -> int:
    with _pools_lock, OnDevice(index):
        if (index, priority) not in _pools:
            made = [
                int(ask(driver.cuStreamCreateWithPriority(NON_BLOCKING, priority)))
                for _ in range(POOL_STREAMS)
            ]
            _pools[index, priority] = itertools.cycle(made)
        return next(_pools[index, priority])


def reached(result: tuple[Any, ...]) -> bool:
    if result[0] == driver.CUresult.CUDA_ERROR_NOT_READY:
        return False
    ask(result)
    return True


class Event:
    """`torch.cuda.Event`: made when it is first recorded, on the device of that stream."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        self._flags = 0 if enable_timing else DISABLE_TIMING
        self._event: Any = None
        self._card = card_number()
        self.device: torch.device | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        with OnDevice(stream.device):
            if self._event is None:
                self._event = ask(driver.cuEventCreate(self._flags))
                self._card, self.device = card_number(), stream.device
            ask(driver.cuEventRecord(self._event, stream.cuda_stream))

    def wait(self, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        if self._event is not None:
            with OnDevice(stream.device):
                ask(driver.cuStreamWaitEvent(stream.cuda_stream, self._event, 0))

    # As torch does, neither sets a device: a thread that has none gets the first one's context.
    def query(self) -> bool:
        if self._event is None:
            return True
        current_index()
        return reached(driver.cuEventQuery(self._event))

    def synchronize(self) -> None:
        if self._event is not None:
            current_index()
            ask(driver.cuEventSynchronize(self._event))

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        current_index()
        return float(ask(driver.cuEventElapsedTime(self._event, end._event)))

    def __del__(self) -> None:
        if self._event is not None and self._card == card_number():
            with OnDevice(self.device):
                driver.cuEventDestroy(self._event)


# -- the current stream: of each thread, of each device --

_own = threading.local()


def _streams() -> dict[tuple[int, int], Stream]:
    """The calling thread's, by card and device."""
    streams: dict[tuple[int, int], Stream] = _own.__dict__.setdefault("streams", {})
    return streams


def current_stream(device: Any = None) -> Stream:
    index = index_of(device)
    return _streams().get((card_number(), index)) or ExternalStream(0, index)


def set_stream(stream: Stream) -> None:
    _streams()[card_number(), stream.device.index] = stream
    use(stream.device.index)


def forget() -> None:
    """There is another card."""
    _pools.clear()


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """`torch.cuda.stream`."""
    if stream is None:
        yield
        return
    index, before = current_index(), current_stream(stream.device)
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)
        use(index)


def synchronize(device: Any = None) -> None:
    with OnDevice(index_of(device)):
        ask(driver.cuCtxSynchronize())


# -- captures --


class Graph:
    """`torch.cuda.CUDAGraph`, as far as the driver has graphs."""


def is_current_stream_capturing() -> bool:
    status = ask(driver.cuStreamIsCapturing(current_stream().cuda_stream))
    return bool(status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE)


_MODES = {
    "global": driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL,
    "thread_local": driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
    "relaxed": driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED,
}


@contextmanager
def capture(
    graph: Graph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    """`torch.cuda.graph`."""
    synchronize()
    with on_stream(stream or Stream()):
        handle = current_stream().cuda_stream
        ask(driver.cuStreamBeginCapture(handle, _MODES[capture_error_mode]))
        try:
            yield
        finally:
            ask(driver.cuGraphDestroy(ask(driver.cuStreamEndCapture(handle))))
