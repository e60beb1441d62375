"""The host device: KV caches in CPU memory. A stream is a thread that runs what it is given."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

import torch

from triton_offload.device import host_pages
from triton_offload.device.realtime import RealTime
from triton_offload.kernels.table import PageTable
from triton_offload.specs import Ids


class _HostStream:
    def __init__(self, name: str) -> None:
        self.queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self.failure: BaseException | None = None  # since the last record; the thread's own
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (work := self.queue.get()) is not None:
            try:
                work()
            except BaseException as error:  # the next record hands it to whoever asks
                self.failure = self.failure or error


class _HostEvent:
    def __init__(self, condition: threading.Condition) -> None:
        self.condition = condition
        self.recorded = 0  # records queued so far
        self.reached = 0  # the latest of them that a stream has reached
        self.time = 0.0
        self.failure: BaseException | None = None


class HostDevice(RealTime):
    """See `base.Device`. Compute on the CPU is done when it returns, so there is no current
    stream; kernels are the torch copies of `host_pages`, and all memory is mapped."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.name = "host"
        self.maps_host_memory = True
        self.batches_copies = True
        self._condition = threading.Condition()

    # -- streams and events --

    def current_stream(self) -> _HostStream | None:
        return None

    def capturing(self) -> bool:
        return False

    def new_stream(self, name: str, *, high_priority: bool = False) -> _HostStream:
        return _HostStream(name)

    def close_stream(self, stream: _HostStream) -> None:
        stream.queue.put(None)
        stream.thread.join()

    def new_event(self, *, timed: bool = False) -> _HostEvent:
        return _HostEvent(self._condition)

    def record(self, event: _HostEvent, stream: _HostStream) -> None:
        with event.condition:
            event.recorded += 1
            number = event.recorded

        def reach() -> None:
            with event.condition:
                # Records of one event from two streams may be reached out of order.
                if number > event.reached:
                    event.reached = number
                    event.time = time.perf_counter()
                    event.failure = stream.failure
                stream.failure = None
                event.condition.notify_all()

        stream.queue.put(reach)

    def wait(self, stream: _HostStream, event: _HostEvent) -> None:
        with event.condition:
            number = event.recorded

        def block() -> None:
            with event.condition:
                event.condition.wait_for(lambda: event.reached >= number)

        stream.queue.put(block)

    def query(self, event: _HostEvent) -> bool:
        with event.condition:
            if event.reached < event.recorded:
                return False
            if event.failure is not None:
                raise event.failure
            return True

    def synchronize(self, event: _HostEvent, timeout: float | None) -> None:
        with event.condition:
            number = event.recorded
            if not event.condition.wait_for(lambda: event.reached >= number, timeout):
                raise TimeoutError(f"the event was not reached within {timeout} s")
            if event.failure is not None:
                raise event.failure

    def elapsed(self, start: _HostEvent, end: _HostEvent) -> float:
        return end.time - start.time

    # -- memory --

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def empty_indices(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int64)

    def register(self, host: torch.Tensor) -> bool:
        return True

    def unregister(self, host: torch.Tensor) -> None:
        return

    # -- work --

    def fill_zero(self, buffer: torch.Tensor, stream: _HostStream) -> None:
        stream.queue.put(lambda: buffer.zero_())

    def copy(self, dst: torch.Tensor, src: torch.Tensor, stream: _HostStream) -> None:
        stream.queue.put(lambda: dst.copy_(src))

    def copy_batch(self, dst: Ids, src: Ids, sizes: Ids, stream: _HostStream) -> None:
        def run() -> None:
            for to, source, size in zip(dst.tolist(), src.tolist(), sizes.tolist(), strict=True):
                ctypes.memmove(to, source, size)

        stream.queue.put(run)

    def prepare(self, table: PageTable, slots: torch.Tensor) -> None:
        return

    def gather(
        self,
        table: PageTable,
        block_ids: torch.Tensor,
        slots: torch.Tensor,
        slot_ids: torch.Tensor,
        first_block: int,
        stream: _HostStream,
        *,
        zero_copy: bool,
    ) -> None:
        stream.queue.put(lambda: host_pages.gather(table, block_ids, slots, slot_ids, first_block))

    def scatter(
        self,
        table: PageTable,
        block_ids: torch.Tensor,
        slots: torch.Tensor,
        slot_ids: torch.Tensor,
        first_block: int,
        stream: _HostStream,
        *,
        zero_copy: bool,
    ) -> None:
        stream.queue.put(lambda: host_pages.scatter(table, block_ids, slots, slot_ids, first_block))
