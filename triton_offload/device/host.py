"""The host device: KV caches in CPU memory. A stream is a thread that runs what it is given."""

from __future__ import annotations

import ctypes
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue

import torch

from triton_offload.calibration import HOST_PATHS
from triton_offload.device import host_pages
from triton_offload.device.realtime import RealTime
from triton_offload.device.threads import OwnThread
from triton_offload.kernels.arguments import shown
from triton_offload.kernels.table import PageTable
from triton_offload.specs import Ids


class Record:
    """A place in a stream; reached when all that was queued there before is done."""

    __slots__ = ("failure", "reached", "time")

    def __init__(self) -> None:
        self.reached = False
        self.time = 0.0
        self.failure: BaseException | None = None


_Work = Callable[[], object]


class _Tasks:
    """What a stream's thread holds of it: nothing but what is queued."""

    def __init__(self, condition: threading.Condition) -> None:
        self.queue: SimpleQueue[_Work | Record | None] = SimpleQueue()
        self._condition = condition
        self._failure: BaseException | None = None  # since the last record
        self._dropping = False

    def run(self) -> None:
        # Caches of an engine may be inference tensors, which nobody may write outside of the mode;
        # in it, others may be written too.
        with torch.inference_mode():
            while self._do(self.queue.get()):
                pass
        self.drop()

    def end(self) -> None:
        """Drop what is queued, and end."""
        self._dropping = True
        self.queue.put(None)

    def drop(self) -> None:
        """Of what is queued and never will be run, only reach the records: they tell that."""
        self._dropping = True
        with suppress(Empty):
            while True:
                self._do(self.queue.get_nowait())

    def check(self) -> None:
        """Called between the parts of long work: it ends here where it is to be dropped."""
        if self._dropping:
            raise RuntimeError("dropped: the stream was closed, or the process is at its end")

    def _do(self, work: _Work | Record | None) -> bool:
        # A function of its own: what was done is not held while nothing is queued.
        if isinstance(work, Record):
            self._reach(work)
        elif work is not None:
            try:
                self.check()
                work()
            except BaseException as error:  # the next record hands it to whoever asks
                traceback.clear_frames(error.__traceback__)  # it outlives the memory used there
                self._failure = self._failure or error
        else:
            return False
        del work  # the error has this frame, too
        return True

    def _reach(self, record: Record) -> None:
        with self._condition:
            record.time = time.perf_counter()
            record.failure, self._failure = self._failure, None
            record.reached = True
            self._condition.notify_all()


class HostStream:
    """Where nobody holds it any more, its thread ends after what is queued."""

    def __init__(self, name: str, condition: threading.Condition) -> None:
        self.tasks = _Tasks(condition)
        self.queue = self.tasks.queue
        self.thread = OwnThread(name, self.tasks.run, self.tasks.end)
        weakref.finalize(self, self.queue.put, None).atexit = False

    def put(self, work: _Work | Record) -> None:
        self.queue.put(work)
        if not self.thread.is_alive():  # closed, or of the process that this one was forked from
            self.tasks.drop()

    def close(self) -> None:
        self.queue.put(None)
        self.thread.wait()


class _HostEvent:
    def __init__(self) -> None:
        self.latest: Record | None = None


class HostDevice(RealTime):
    """See `base.Device`. Compute on the CPU is done when it returns, so there is no current
    stream; kernels are the torch copies of `host_pages`, and all memory is mapped."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.name = "host"
        self.maps_host_memory = True
        self.batches_copies = True
        self.default_paths = HOST_PATHS
        self.needs_interpreter = True  # its streams are Python threads
        self._condition = threading.Condition()

    # -- streams and events --

    def current_stream(self) -> HostStream | None:
        return None

    def check_stream(self, stream: HostStream | None) -> None:
        if stream is not None and not isinstance(stream, HostStream):
            raise ValueError(
                "stream: expected None, or one that `new_stream` of the host device made (what a "
                f"program computes on the CPU is done when it calls), got {shown(stream)}"
            )

    def capturing(self) -> bool:
        return False

    def new_stream(self, name: str, *, high_priority: bool = False) -> HostStream:
        return HostStream(name, self._condition)

    def close_stream(self, stream: HostStream) -> None:
        stream.close()

    def new_event(self, *, timed: bool = False) -> _HostEvent:
        return _HostEvent()

    def record(self, event: _HostEvent, stream: HostStream) -> None:
        event.latest = record = Record()
        stream.put(record)

    def wait(self, stream: HostStream, event: _HostEvent) -> None:
        record = event.latest  # bound here, not when the stream gets there
        if record is not None:
            stream.put(partial(self._reached, record, None))

    def query(self, event: _HostEvent) -> bool:
        record = event.latest
        return record is None or (record.reached and _succeeded(record))

    def synchronize(self, event: _HostEvent, timeout: float | None) -> None:
        record = event.latest
        if record is not None:
            if not self._reached(record, timeout):
                raise TimeoutError(f"the event was not reached within {timeout} s")
            _succeeded(record)

    def elapsed(self, start: _HostEvent, end: _HostEvent) -> float:
        assert start.latest is not None
        assert end.latest is not None
        return end.latest.time - start.latest.time

    def _reached(self, record: Record, timeout: float | None) -> bool:
        with self._condition:
            return self._condition.wait_for(lambda: record.reached, timeout)

    # -- memory --

    def empty(self, num_bytes: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def empty_indices(self, count: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(count, dtype=torch.int64, device="cpu")

    def register(self, host: torch.Tensor) -> bool:
        return True

    def unregister(self, host: torch.Tensor) -> None:
        return

    # -- work --

    def fill_zero(self, buffer: torch.Tensor, stream: HostStream) -> None:
        stream.put(buffer.zero_)

    def copy(self, dst: torch.Tensor, src: torch.Tensor, stream: HostStream) -> None:
        stream.put(partial(dst.copy_, src))

    def copy_batch(self, dst: Ids, src: Ids, sizes: Ids, stream: HostStream) -> None:
        stream.put(partial(_copy_ranges, dst, src, sizes, stream.tasks.check))

    def prepare(self, table: PageTable, slots: torch.Tensor) -> None:
        return

    def gather(
        self,
        table: PageTable,
        block_ids: torch.Tensor,
        slots: torch.Tensor,
        slot_ids: torch.Tensor,
        first_block: int,
        stream: HostStream,
        *,
        zero_copy: bool,
    ) -> None:
        self._move(host_pages.gather, stream, table, block_ids, slots, slot_ids, first_block)

    def scatter(
        self,
        table: PageTable,
        block_ids: torch.Tensor,
        slots: torch.Tensor,
        slot_ids: torch.Tensor,
        first_block: int,
        stream: HostStream,
        *,
        zero_copy: bool,
    ) -> None:
        self._move(host_pages.scatter, stream, table, block_ids, slots, slot_ids, first_block)

    def _move(
        self,
        move: Callable[..., None],
        stream: HostStream,
        table: PageTable,
        block_ids: torch.Tensor,
        slots: torch.Tensor,
        slot_ids: torch.Tensor,
        first_block: int,
    ) -> None:
        check = stream.tasks.check
        stream.put(partial(move, table, block_ids, slots, slot_ids, first_block, check))


def _copy_ranges(dst: Ids, src: Ids, sizes: Ids, check: Callable[[], None]) -> None:
    for to, source, size in zip(dst.tolist(), src.tolist(), sizes.tolist(), strict=True):
        check()
        ctypes.memmove(to, source, size)


def _succeeded(record: Record) -> bool:
    if record.failure is not None:
        raise record.failure
    return True
