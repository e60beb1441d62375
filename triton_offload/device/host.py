"""The host device: KV caches in CPU memory. A stream is a thread that runs what it is given.

What is small does not go there while the stream has nothing to do: handing it over, and being
woken when it is done, takes longer than the copy. It runs on its submitter's thread, which has the
stream's turn meanwhile: what others submit queues behind it. It is a part of the stream in all
else, and what it raises is told by the next event. Submission waits for no other work, then, and
for no more than `_INLINE_BYTES` of its own until an event is asked for (ordering rule 7).
"""

from __future__ import annotations

import ctypes
import logging
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
from triton_offload.device import host_pages, native
from triton_offload.device.base import WHERE
from triton_offload.device.realtime import RealTime
from triton_offload.device.threads import OwnThread, on_own_thread
from triton_offload.kernels.arguments import shown
from triton_offload.kernels.table import PageTable
from triton_offload.process_lock import fork_number
from triton_offload.specs import Ids

_log = logging.getLogger(__name__)

# Handing over to a thread and being woken by it takes 0.1 ms on two cores of an EPYC, to move this
# many bytes 0.2 ms. And the sums of a thousand blocks, cleared before and fetched behind.
_INLINE_BYTES = (2 << 20) + (16 << 10)


class Record:
    """A place in a stream; reached when all that was queued there before is done."""

    __slots__ = ("failure", "reached", "time")

    def __init__(self) -> None:
        self.reached = False
        self.time = 0.0
        self.failure: BaseException | None = None


_Work = Callable[[], object]
_Move = Callable[..., None]


class _Tasks:
    """What a stream's thread holds of it: nothing but what is queued."""

    def __init__(self, condition: threading.Condition) -> None:
        self._queue: SimpleQueue[_Work | Record | None] = SimpleQueue()
        self._condition = condition
        self._lock = threading.Lock()  # of the next, and of the order of submissions; held briefly
        self._unfinished = 0  # what was submitted and is not done
        self._turn = threading.Lock()  # held by who runs what is the stream's
        self._failure: BaseException | None = None  # since the last record
        self._dropping = False
        self._ended = False  # the thread does nothing any more
        self._forks = fork_number()

    def put(self, work: _Work | Record, *, inline: bool) -> bool:
        """Queue it; or, where `inline` allows that and nothing is before it, do it: True then."""
        if self._forks != fork_number():  # here is no thread, and the lock may be held for ever
            self._queue.put(work)
            self.drop()
            return False
        with self._lock:
            inline = inline and not self._unfinished
            self._unfinished += 1
            if inline:
                self._turn.acquire()  # free: nothing is under way
            else:
                self._queue.put(work)
        if not inline:
            if self._ended:
                self.drop()
            return False
        try:
            self._do(work)
        finally:
            self._turn.release()
            self._finish()
        return True

    def record(self, record: Record) -> None:
        """Queue it, or reach it here where nothing is before it."""
        if self._forks == fork_number():  # else the lock may be held by nobody that is here
            with self._lock:
                if not self._unfinished:
                    self._reach(record)
                    return
        self.put(record, inline=False)

    def run(self) -> None:
        while self._next(self._queue.get()):
            pass
        self._ended = True  # before: what is put from here on, whoever puts it drops
        self.drop()

    def finish(self) -> None:
        """End when all that is queued is done."""
        self._queue.put(None)

    def end(self) -> None:
        """Drop what is queued, and end."""
        self._dropping = True
        self._queue.put(None)

    def drop(self) -> None:
        """Of what is queued and never will be run, only reach the records: they tell that."""
        self._dropping = True
        with suppress(Empty):
            while True:
                work = self._queue.get_nowait()
                if work is not None:
                    self._do(work)

    def check(self) -> None:
        """Called between the parts of long work: it ends here where it is to be dropped."""
        if self._dropping:
            raise RuntimeError("dropped: the stream was closed, or the process is at its end")

    def _next(self, work: _Work | Record | None) -> bool:
        # A function of its own: what was done is not held while nothing is queued.
        if work is None:
            return False
        with self._turn:
            self._do(work)
        self._finish()
        return True

    def _do(self, work: _Work | Record) -> None:
        if isinstance(work, Record):
            with self._condition:
                self._reach(work)
                self._condition.notify_all()
            return
        try:
            self.check()
            work()
        except BaseException as error:  # the next record hands it to whoever asks
            # It outlives the memory used there: a frame holds that, and its callers' frames.
            error.add_note(WHERE + "".join(traceback.format_tb(error.__traceback__)))
            error.__traceback__ = None
            self._failure = self._failure or error
            if not isinstance(error, Exception) and not on_own_thread():
                raise  # whoever interrupts the submitter means that, too

    def _finish(self) -> None:
        with self._lock:
            self._unfinished -= 1

    def _reach(self, record: Record) -> None:
        record.time = time.perf_counter()
        record.failure, self._failure = self._failure, None
        record.reached = True


class HostStream:
    """Where nobody holds it any more, its thread ends after what is queued."""

    def __init__(self, name: str, condition: threading.Condition) -> None:
        self.tasks = _Tasks(condition)
        self.thread = OwnThread(name, self.tasks.run, self.tasks.end)
        weakref.finalize(self, self.tasks.finish).atexit = False

    def put(self, work: _Work | Record, *, inline: bool = False) -> bool:
        """Whether it was done at once, which `inline` allows."""
        return self.tasks.put(work, inline=inline)

    def close(self) -> None:
        self.tasks.finish()
        self.thread.wait()


class _HostEvent:
    def __init__(self) -> None:
        self.latest: Record | None = None


class HostDevice(RealTime):
    """See `base.Device`. Compute on the CPU is done when it returns, so there is no current
    stream; kernels are the copies of `host_pages`, and all memory is mapped."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.name = "host"
        self.maps_host_memory = True
        self.batches_copies = True
        self.blocks_on_pageable = False
        self.default_paths = HOST_PATHS
        self.needs_interpreter = True  # its streams are Python threads
        self.numa_node: int | None = None
        self.limits = _limits()
        self._condition = threading.Condition()
        self._inline_left = _INLINE_BYTES  # may run on submitters' threads until an event is asked

    # -- streams and events --

    def current_stream(self) -> HostStream | None:
        return None

    def check_stream(self, stream: HostStream | None) -> None:
        if stream is not None and not isinstance(stream, HostStream):
            raise ValueError(
                "stream: expected None, or one that `new_stream` of the host device made (what a "
                f"program computes on the CPU is done when it calls), got {shown(stream)}"
            )

    def capturing(self, stream: HostStream | None) -> bool:
        return False

    def new_stream(self, name: str, *, high_priority: bool = False) -> HostStream:
        return HostStream(name, self._condition)

    def close_stream(self, stream: HostStream) -> None:
        stream.close()

    def new_event(self, *, timed: bool = False) -> _HostEvent:
        return _HostEvent()

    def record(self, event: _HostEvent, stream: HostStream) -> None:
        record = Record()
        stream.tasks.record(record)
        event.latest = record  # only now: nobody waits yet for one that is reached at once

    def wait(self, stream: HostStream, event: _HostEvent) -> None:
        record = event.latest  # bound here, not when the stream gets there
        if record is not None and not record.reached:
            stream.put(partial(self._reached, record, None))

    def query(self, event: _HostEvent) -> bool:
        self._inline_left = _INLINE_BYTES
        record = event.latest
        return record is None or (record.reached and _succeeded(record))

    def synchronize(self, event: _HostEvent, timeout: float | None) -> None:
        self._inline_left = _INLINE_BYTES
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
        if record.reached:
            return True
        with self._condition:
            return self._condition.wait_for(lambda: record.reached, timeout)

    # -- memory --

    def empty(self, num_bytes: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def empty_indices(self, count: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(count, dtype=torch.int64, device="cpu")

    def empty_pinned(self, num_bytes: int) -> torch.Tensor | None:
        return None

    def register(self, host: torch.Tensor) -> bool:
        return True

    def unregister(self, host: torch.Tensor) -> None:
        return

    # -- work --

    def fill_zero(self, buffer: torch.Tensor, stream: HostStream) -> None:
        self._submit(stream, partial(_write, buffer, torch.Tensor.zero_), buffer.numel())

    def copy(self, dst: torch.Tensor, src: torch.Tensor, stream: HostStream) -> None:
        self._submit(stream, partial(_write, dst, torch.Tensor.copy_, src), src.numel())

    def copy_batch(self, dst: Ids, src: Ids, sizes: Ids, stream: HostStream) -> None:
        work = partial(_copy_ranges, dst, src, sizes, stream.tasks.check)
        self._submit(stream, work, int(sizes.sum()))

    def prepare(self, table: PageTable, slots: torch.Tensor, *, sums: bool = False) -> None:
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
        sums: torch.Tensor | None = None,
    ) -> None:
        self._move(host_pages.gather, stream, table, block_ids, slots, slot_ids, first_block, sums)

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
        sums: torch.Tensor | None = None,
    ) -> None:
        self._move(host_pages.scatter, stream, table, block_ids, slots, slot_ids, first_block, sums)

    def _move(
        self,
        move: _Move,
        stream: HostStream,
        table: PageTable,
        block_ids: torch.Tensor,
        slots: torch.Tensor,
        slot_ids: torch.Tensor,
        first_block: int,
        sums: torch.Tensor | None,
    ) -> None:
        check = stream.tasks.check
        work = partial(move, table, block_ids, slots, slot_ids, first_block, check, sums)
        self._submit(stream, work, block_ids.shape[0] * table.bytes_per_block)

    def _submit(self, stream: HostStream, work: _Work, num_bytes: int) -> None:
        """Many small operations in a row are as long as a large one: they share what is left."""
        if stream.put(work, inline=num_bytes <= self._inline_left):
            self._inline_left -= num_bytes


def _limits() -> tuple[str, ...]:
    """What is not there of `host_pages.c`, which is compiled here if it never was."""
    failure = native.load().failure
    if not failure:
        return ()
    what = f"copies of pages could not be compiled ({failure}): numpy and torch make them"
    _log.warning(
        "%s, which takes longer for a few pages, and twice as long or more with checksums; install "
        "a C compiler (cc, gcc, clang or $CC), and `triton-offload doctor` shows whether it works",
        what,
    )
    return (what,)


def _write(target: torch.Tensor, work: Callable[..., object], *arguments: object) -> None:
    """Caches of an engine may be inference tensors, which nobody may write outside of the mode."""
    if target.is_inference():
        with torch.inference_mode():
            work(target, *arguments)
    else:
        work(target, *arguments)


def _copy_ranges(dst: Ids, src: Ids, sizes: Ids, check: Callable[[], None]) -> None:
    for to, source, size in zip(dst.tolist(), src.tolist(), sizes.tolist(), strict=True):
        check()
        ctypes.memmove(to, source, size)


def _succeeded(record: Record) -> bool:
    if record.failure is not None:
        raise record.failure
    return True
