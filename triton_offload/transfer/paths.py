"""The three paths, each for both directions: what is queued for one segment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from triton_offload.calibration import Path
from triton_offload.closing import Closing
from triton_offload.device.base import Device, Event, Stream
from triton_offload.kernels.table import PageTable
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import Direction
from triton_offload.transfer.contents import SlotMarks
from triton_offload.transfer.layout import CacheLayout, GroupRun
from triton_offload.transfer.ranges import (
    SLICE_BYTES,
    ChunkRanges,
    Pair,
    addresses,
    chunk_batches,
    positions,
    whole_chunks,
    zeros_over,
)
from triton_offload.transfer.staging import StagingBuffer, StagingRing

_ZEROS_BYTES = 1 << 20
_MANY_COPIES = 4


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of a job that is queued at once, its ids where kernels read them."""

    run: GroupRun
    block_ids: torch.Tensor
    slot_ids: torch.Tensor
    marks: SlotMarks


@dataclass(frozen=True, slots=True)
class Queued:
    """Events of a queued segment, in the order in which they are reached.

    `released`: its pages may be overwritten (a store's) or read (a load's). `done`: every byte
    has landed, and nothing of the segment touches page, slot or ids any more. A failure of the
    segment is raised by the query of one of `events`.
    """

    released: Event
    done: Event
    events: tuple[Event, ...]
    num_ops: int


class Gate:
    """Events that a job's work must follow. A stream waits for them once, then keeps the order."""

    def __init__(self, device: Device, events: Iterable[Event]) -> None:
        self._device = device
        self._events = tuple(events)
        self._passed: list[Stream] = []

    def hold(self, stream: Stream) -> None:
        if not any(stream is passed for passed in self._passed):
            for event in self._events:
                self._device.wait(stream, event)
            self._passed.append(stream)


class PathQueue:
    """Queues the segments of one direction on a lane's two streams.

    `kernels` runs gathers, scatters and zero fills; `copies` runs what a copy engine does. When
    `queue` raises, part of the segment may be queued: `settle` before anything else.
    """

    def __init__(
        self,
        device: Device,
        layout: CacheLayout,
        pool: HostPool,
        direction: Direction,
        name: str,
        *,
        num_buffers: int,
        buffer_bytes: int,
    ) -> None:
        self._device = device
        self._pool = pool
        self._direction = direction
        self._ring = StagingRing(device, num_buffers, buffer_bytes)
        self._zeros = device.empty(min(_ZEROS_BYTES, pool.slot_bytes))
        # Chunk i of a segment lies in slot i of its staging buffer.
        self._places = device.empty_indices(
            max(buffer_bytes // group.packed.slot_bytes for group in layout.groups)
        )
        self._places.numpy()[:] = np.arange(len(self._places))
        for group in layout.groups:
            device.prepare(group.packed, self._ring.take().slots(group.packed))
            device.prepare(group.table, pool.slots)
        with ExitStack() as undo:
            # A scatter waits behind prefill kernels otherwise: 1.6 ms each in the field.
            self.kernels = device.new_stream(f"{name}-kernels", high_priority=True)
            undo.callback(device.close_stream, self.kernels)
            self.copies = device.new_stream(f"{name}-copies")
            undo.callback(device.close_stream, self.copies)
            device.fill_zero(self._zeros, self.kernels)
            # Slots are cleared with these zeros: no job would tell that there are none.
            device.synchronize(self._record(self.kernels), None)
            undo.pop_all()
        self._streams = Closing()
        self._streams.callback(device.close_stream, self.kernels)
        self._streams.callback(device.close_stream, self.copies)
        # Functions, not methods: those would keep this object, and its memory, in a circle.
        cls = type(self)
        self._queue: dict[Path, Callable[[PathQueue, Segment, Gate, Gate], Queued]]
        if direction is Direction.STORE:
            self._queue = {
                Path.STAGED: cls._store_staged,
                Path.ZERO_COPY: cls._store_zero_copy,
                Path.COPY_ENGINE: cls._store_copy_engine,
            }
        else:
            self._queue = {
                Path.STAGED: cls._load_staged,
                Path.ZERO_COPY: cls._load_zero_copy,
                Path.COPY_ENGINE: cls._load_copy_engine,
            }

    @property
    def reaches_pool(self) -> bool:
        """Whether kernels may read and write the pool, as zero copy does."""
        return self._device.maps_host_memory and self._pool.pinned

    def max_chunks(self, path: Path, run: GroupRun) -> int:
        """Chunks in a segment: what a staging buffer holds; on mapped memory the whole run, which
        gains nothing from being cut (on the host device, eighths of 256 MiB took 1.2 times as
        long)."""
        if path is Path.ZERO_COPY:
            return len(run.slot_ids)
        return self._ring.buffer_bytes // run.group.packed.slot_bytes

    def queue(self, path: Path, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        """`pages` and `slots`: what must be done before the segment touches either."""
        return self._queue[path](self, segment, pages, slots)

    def settle(self) -> tuple[Event, ...]:
        """Let each stream follow all that is queued on the other so far.

        The last of the events is reached when all of that is done on both.
        """
        ends = (self._record(self.kernels), self._record(self.copies))
        self._device.wait(self.kernels, ends[1])
        self._device.wait(self.copies, ends[0])
        return (*ends, self._record(self.copies))

    def distrust(self) -> None:
        """Something failed: what the staging buffers were cleared for may not be so."""
        self._ring.distrust()

    def close_streams(self) -> None:
        """Drain and free both. Idempotent; one that could not be closed is tried again by the next
        call."""
        self._streams.close()

    def close(self) -> None:
        """`close_streams`, free the buffers and let go of the pool; everything queued has ended.
        As idempotent as that."""
        try:
            self.close_streams()
        finally:
            self._ring.close()
            for memory in ("_zeros", "_places", "_pool"):
                vars(self).pop(memory, None)

    # -- staged --

    def _store_staged(self, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        device, run, packed = self._device, segment.run, segment.run.group.packed
        buffer = self._take_buffer(self.kernels)
        staging = buffer.slots(packed)
        if buffer.holds is not packed:
            if run.group.has_gaps:
                device.fill_zero(buffer.memory, self.kernels)
            buffer.holds = packed
        for chunk in segment.marks.unfilled:
            device.fill_zero(staging[chunk], self.kernels)
        pages.hold(self.kernels)  # ordering rule 1
        device.gather(
            packed,
            segment.block_ids,
            staging,
            self._places[: len(run.slot_ids)],
            run.first,
            self.kernels,
            zero_copy=False,
        )
        gathered = self._record(self.kernels)
        device.wait(self.copies, gathered)
        slots.hold(self.copies)  # ordering rule 6
        ops = 6 + self._clear(segment, self.copies, segment.marks.stale)
        for chunk in segment.marks.kept:  # ordering rule 8: the slot keeps its other bytes
            begin, end = run.blocks_of_chunk(chunk)
            slot = self._pool.slots[int(run.slot_ids[chunk])]
            for ours, theirs in zip(packed.pages, run.group.table.pages, strict=True):
                there = positions(slot, theirs, begin, end)
                device.copy(there, positions(staging[chunk], ours, begin, end), self.copies)
                ops += 1
        ops += self._copy_chunks(run, staging, segment.marks.kept)
        done = self._record(self.copies)
        buffer.free_after = done
        return Queued(gathered, done, (gathered, done), ops)

    def _load_staged(self, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        device, run, packed = self._device, segment.run, segment.run.group.packed
        buffer = self._take_buffer(self.copies)
        staging = buffer.slots(packed)
        slots.hold(self.copies)  # ordering rule 6
        # Ordering rule 2: into private staging at once; only the scatter waits for compute.
        ops = 5 + self._copy_chunks(run, staging, ())
        copied = self._record(self.copies)
        device.wait(self.kernels, copied)
        pages.hold(self.kernels)  # ordering rule 2
        device.scatter(
            packed,
            segment.block_ids,
            staging,
            self._places[: len(run.slot_ids)],
            run.first,
            self.kernels,
            zero_copy=False,
        )
        done = self._record(self.kernels)
        buffer.free_after = done
        return Queued(done, done, (copied, done), ops)

    # -- zero copy --

    def _store_zero_copy(self, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        slots.hold(self.kernels)  # ordering rule 6
        ops = 2 + self._clear(segment, self.kernels, segment.marks.stale + segment.marks.unfilled)
        pages.hold(self.kernels)  # ordering rule 1
        self._device.gather(*self._mapped(segment), self.kernels, zero_copy=True)
        return self._end(self.kernels, ops)

    def _load_zero_copy(self, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        slots.hold(self.kernels)  # ordering rule 6
        pages.hold(self.kernels)  # ordering rule 2
        self._device.scatter(*self._mapped(segment), self.kernels, zero_copy=True)
        return self._end(self.kernels, 2)

    # -- copy engine --

    def _store_copy_engine(self, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        slots.hold(self.copies)  # ordering rule 6
        ops = 2 + self._clear(segment, self.copies, segment.marks.stale + segment.marks.unfilled)
        pages.hold(self.copies)  # ordering rule 1
        page, slot, sizes = addresses(segment.run, self._pool)
        self._device.copy_batch(slot, page, sizes, self.copies)
        return self._end(self.copies, ops)

    def _load_copy_engine(self, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        slots.hold(self.copies)  # ordering rule 6
        pages.hold(self.copies)  # ordering rule 2
        page, slot, sizes = addresses(segment.run, self._pool)
        self._device.copy_batch(page, slot, sizes, self.copies)
        return self._end(self.copies, 2)

    # -- shared --

    def _take_buffer(self, stream: Stream) -> StagingBuffer:
        """The ring's next buffer; `stream` refills it only after its last use (rule 4)."""
        buffer = self._ring.take()
        if buffer.free_after is not None:
            self._device.wait(stream, buffer.free_after)
        return buffer

    def _copy_chunks(self, run: GroupRun, staging: torch.Tensor, skip: tuple[int, ...]) -> int:
        """Whole chunks, but those to skip, between staging and slots; how many copies."""
        device, stores = self._device, self._direction is Direction.STORE
        ranges = ChunkRanges.of(run, self._pool, skip)
        ops = 0
        # One call each costs the caller some 10 us, a range of a batch 0.5. Pageable memory, and
        # slots that must be cut in slices, are left to plain copies.
        if (
            device.batches_copies
            and self._pool.pinned
            and run.group.packed.slot_bytes <= SLICE_BYTES
            and len(ranges.firsts) * len(run.group.runs) > _MANY_COPIES
        ):
            for slots, buffer, sizes in chunk_batches(run, self._pool, staging, skip):
                ends = (slots, buffer) if stores else (buffer, slots)
                device.copy_batch(*ends, sizes, self.copies)
                ops += 1
            return ops
        for there, here in whole_chunks(run, self._pool, staging, ranges):
            pair = (there, here) if stores else (here, there)
            device.copy(*pair, self.copies)
            ops += 1
        return ops

    def _clear(self, segment: Segment, stream: Stream, chunks: tuple[int, ...]) -> int:
        """Zero whole slots in the pool, so that no byte of an earlier chunk stays readable."""
        pairs: list[Pair] = []
        for chunk in dict.fromkeys(chunks):
            slot = self._pool.slots[int(segment.run.slot_ids[chunk])]
            pairs.extend(zeros_over(slot, self._zeros))
        for part, zeros in pairs:
            self._device.copy(part, zeros, stream)
        return len(pairs)

    def _mapped(
        self, segment: Segment
    ) -> tuple[PageTable, torch.Tensor, torch.Tensor, torch.Tensor, int]:
        run = segment.run
        return run.group.table, segment.block_ids, self._pool.slots, segment.slot_ids, run.first

    def _end(self, stream: Stream, num_ops: int) -> Queued:
        done = self._record(stream)
        return Queued(done, done, (done,), num_ops)

    def _record(self, stream: Stream) -> Event:
        event = self._device.new_event()
        self._device.record(event, stream)
        return event
