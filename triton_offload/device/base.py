"""The device seam: all that a transfer needs of a device, and nothing else.

A stream runs what it is given in order; streams order each other by events alone. Every method
that takes a stream only queues and returns. The rules are CUDA's:

* `wait` binds the latest `record` of the event at the time of the call; an event that was never
  recorded does not block; `query` sees the latest record.
* A copy reads its source when it runs, not when it is queued.
* `wait` orders and does no more: it hands no failure on. What failed on a stream is raised by
  `query` and `synchronize` of the first event recorded there afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from triton_offload.calibration import PathTable
from triton_offload.kernels.table import PageTable
from triton_offload.specs import Ids

#: How the note begins that tells, of a failed job's error, where it was raised.
WHERE = "Raised in a transfer, at\n"

# Opaque handles: each device has its own (torch.cuda.Stream, a thread with a queue, a record of
# the simulator), and only that device looks inside.
Stream = Any
Event = Any


class Background(Protocol):
    """A function that the device calls again and again beside its callers."""

    def wake(self) -> None:
        """Call it soon, if it waits for this."""

    def stop(self) -> None:
        """Call it no more, and return when no call is under way (but its caller's). Idempotent."""


class Device(Protocol):
    """What a transfer asks of a device."""

    torch_device: torch.device
    name: str
    #: whether a kernel may read and write registered host memory
    maps_host_memory: bool
    #: whether it has `copy_batch`
    batches_copies: bool
    #: whether a copy from or to host memory that is not registered blocks its caller
    blocks_on_pageable: bool
    #: the paths that are taken where nothing was measured and nobody chose
    default_paths: PathTable
    #: whether its work needs the interpreter, which a caller that polls in a loop keeps from it
    needs_interpreter: bool
    #: the NUMA node of the machine that it is closest to; None: they are all the same
    numa_node: int | None
    #: what this machine keeps it from, and why: a line for each, for whoever runs the machine
    limits: tuple[str, ...]

    # -- the host's own steps, which a simulation picks like any other --

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back."""

    def sleep(self, seconds: float) -> None:
        """Let the calling thread pause."""

    def background(
        self,
        name: str,
        step: Callable[[], float | None],
        orphaned: Callable[[], None] | None = None,
    ) -> Background:
        """Call `step` on a thread of its own until `stop`: again after the seconds that it
        returned, or, where it returned None, when woken; after `math.inf` seconds means never, and
        the thread ends. It must not raise.

        A bound method is held weakly. When its object is gone, though nobody called `stop`, the
        thread calls `orphaned`, which may block and must not hold the object, and ends.
        """

    # -- streams and events --

    def current_stream(self) -> Stream | None:
        """The calling thread's compute stream; None where compute is done when it returns."""

    def check_stream(self, stream: Stream | None) -> None:
        """Raise ValueError that names `stream` unless the device can follow it: one of its own, or
        None, which stands for the current stream."""

    def capturing(self, stream: Stream | None) -> bool:
        """Whether the stream (None: the current one) captures a graph, so that nothing may follow
        it."""

    def new_stream(self, name: str, *, high_priority: bool = False) -> Stream: ...

    def close_stream(self, stream: Stream) -> None:
        """Drain the stream and free it."""

    def new_event(self, *, timed: bool = False) -> Event: ...

    def record(self, event: Event, stream: Stream) -> None: ...

    def wait(self, stream: Stream, event: Event) -> None: ...

    def query(self, event: Event) -> bool:
        """Whether the latest record has been reached. Raises what failed before it."""

    def synchronize(self, event: Event, timeout: float | None) -> None:
        """Block the host until then. Raises TimeoutError after `timeout` seconds."""

    def elapsed(self, start: Event, end: Event) -> float:
        """Seconds between two timed events that have both been reached."""

    # -- memory: every buffer is a one-dimensional uint8 tensor --

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Device memory, uninitialised."""

    def empty_indices(self, count: int) -> torch.Tensor:
        """int64 [count] in host memory that kernels of the device can read."""

    def empty_pinned(self, num_bytes: int) -> torch.Tensor | None:
        """Host memory that is pinned already, uninitialised, where the device can't `register`
        what is there; None where it can, and where there is none. May block for seconds."""

    def register(self, host: torch.Tensor) -> bool:
        """Pin host memory for the device; False, or an error that says why, where it can't. Safe
        on any thread, and while another captures a graph."""

    def unregister(self, host: torch.Tensor) -> None: ...

    # -- work --

    def fill_zero(self, buffer: torch.Tensor, stream: Stream) -> None:
        """Zero a contiguous device buffer."""

    def copy(self, dst: torch.Tensor, src: torch.Tensor, stream: Stream) -> None:
        """Copy uint8 [rows, width] or [width]; rows may lie apart on either side."""

    def copy_batch(self, dst: Ids, src: Ids, sizes: Ids, stream: Stream) -> None:
        """Copy `sizes[i]` bytes from address `src[i]` to `dst[i]`, in any order among them."""

    def prepare(self, table: PageTable, slots: torch.Tensor, *, sums: bool = False) -> None:
        """Compile and load the kernels for these operands, where `sums` those that add up; blocks,
        at construction only."""

    def gather(
        self,
        table: PageTable,
        block_ids: torch.Tensor,
        slots: torch.Tensor,
        slot_ids: torch.Tensor,
        first_block: int,
        stream: Stream,
        *,
        zero_copy: bool,
        sums: torch.Tensor | None = None,
    ) -> None:
        """Pages to slots (see `kernels.pages.gather_pages`), ids already checked.

        The id tensors come from `empty_indices` or lie on the device, and stay as they are until
        the work is done. `sums`: int64 `[blocks]` of `empty`; what the pages of block i add up to,
        as they pass, is added to `sums[i]` (see `kernels.sums`).
        """

    def scatter(
        self,
        table: PageTable,
        block_ids: torch.Tensor,
        slots: torch.Tensor,
        slot_ids: torch.Tensor,
        first_block: int,
        stream: Stream,
        *,
        zero_copy: bool,
        sums: torch.Tensor | None = None,
    ) -> None:
        """Slots to pages, the other way."""
