"""What a lane's segments share, whatever their path: two streams, staging, zeros, copies."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import numpy as np
import torch

from triton_offload.closing import Closing
from triton_offload.device.base import Device, Event, Stream
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import Direction
from triton_offload.transfer.layout import CacheLayout, GroupLayout, GroupRun
from triton_offload.transfer.ranges import (
    SLICE_BYTES,
    ChunkRanges,
    Pair,
    chunk_batches,
    whole_chunks,
    zeros_over,
)
from triton_offload.transfer.segment import Queued, Segment
from triton_offload.transfer.staging import StagingBuffer, StagingRing

_ZEROS_BYTES = 1 << 20
_MANY_COPIES = 4

#: of one segment, be they ranges of a batch (rule 7): of more a chunk at least is one segment
MOST_COPIES = 400


class LaneStreams:
    """A lane's two streams, and the device memory that its segments pass through.

    `kernels` runs gathers, scatters and zero fills; `copies` runs what a copy engine does. What a
    segment queues on them, its path says (`transfer.paths`).
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
        sums: bool = False,
    ) -> None:
        self.device = device
        self.pool = pool
        self.direction = direction
        self._own_ranges = layout.own_ranges
        self._ring = StagingRing(device, num_buffers, buffer_bytes)
        self._zeros = device.empty(min(_ZEROS_BYTES, pool.slot_bytes))
        self._places = device.empty_indices(MOST_COPIES)  # no staged segment has more chunks
        self._places.numpy()[:] = np.arange(len(self._places))
        self._places_of = len(self._places), self._places
        self._summed = {"sums": True} if sums else {}
        self.prepare(layout.groups)
        with ExitStack() as undo:
            # A scatter waits behind prefill kernels otherwise: 1.6 ms each in the field.
            self.kernels = device.new_stream(f"{name}-kernels", high_priority=True)
            undo.callback(device.close_stream, self.kernels)
            self.copies = device.new_stream(f"{name}-copies")
            undo.callback(device.close_stream, self.copies)
            device.fill_zero(self._zeros, self.kernels)
            # Slots are cleared with these zeros: no job would tell that there are none.
            device.synchronize(self.record(self.kernels), None)
            undo.pop_all()
        self._streams = Closing()
        self._streams.callback(device.close_stream, self.kernels)
        self._streams.callback(device.close_stream, self.copies)

    @property
    def reaches_pool(self) -> bool:
        """Whether kernels may read and write the pool, as zero copy does."""
        return self.device.maps_host_memory and self.pool.pinned

    @property
    def takes_batches(self) -> bool:
        """Whether one call copies many ranges."""
        return self.device.batches_copies

    def chunks_in_buffer(self, run: GroupRun) -> int:
        """How many of the run's chunks a staging buffer holds."""
        return self._ring.buffer_bytes // run.group.packed.slot_bytes

    def prepare(self, groups: Iterable[GroupLayout]) -> None:
        """Do ahead of the first transfer what blocks the host."""
        for group in groups:
            staging = self._ring.take().slots(group.packed)
            self.device.prepare(group.packed, staging, **self._summed)
            self.device.prepare(group.table, self.pool.slots_of(group.size), **self._summed)

    def settle(self) -> tuple[Event, ...]:
        """Let each stream follow all that is queued on the other so far.

        The last of the events is reached when all of that is done on both.
        """
        ends = (self.record(self.kernels), self.record(self.copies))
        self.device.wait(self.kernels, ends[1])
        self.device.wait(self.copies, ends[0])
        return (*ends, self.record(self.copies))

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
            for memory in ("_zeros", "_places", "_places_of", "pool"):
                vars(self).pop(memory, None)

    # -- for the paths --

    def take_buffer(self, stream: Stream) -> StagingBuffer:
        """The ring's next buffer; `stream` refills it only after its last use (rule 4)."""
        buffer = self._ring.take()
        if buffer.free_after is not None:
            self.device.wait(stream, buffer.free_after)
        return buffer

    def places(self, count: int) -> torch.Tensor:
        """int64 [count]: chunk i of a segment lies in slot i of its staging buffer."""
        known, places = self._places_of  # most segments are as long as the one before
        if known != count:
            self._places_of = count, (places := self._places[:count])
        return places

    def copy_chunks(self, run: GroupRun, staging: torch.Tensor, skip: tuple[int, ...]) -> int:
        """Whole chunks, but those to skip, between staging and slots; how many copies, each range
        of a batch one."""
        device, stores = self.device, self.direction is Direction.STORE
        ranges = ChunkRanges.of(run, self.pool, skip)
        ops = 0
        # One call each costs the caller some 10 us, a range of a batch 0.5. Pageable memory, and
        # slots that must be cut in slices, are left to plain copies.
        if (
            self.takes_batches
            and self.pool.pinned
            and run.group.packed.slot_bytes <= SLICE_BYTES
            and len(ranges.firsts) * len(run.group.byte_ranges) > _MANY_COPIES
        ):
            for slots, buffer, sizes in chunk_batches(run, self.pool, staging, skip):
                ends = (slots, buffer) if stores else (buffer, slots)
                device.copy_batch(*ends, sizes, self.copies)
                ops += len(sizes)
            return ops
        for there, here in whole_chunks(run, self.pool, staging, ranges):
            pair = (there, here) if stores else (here, there)
            device.copy(*pair, self.copies)
            ops += 1
        return ops

    def slot(self, run: GroupRun, chunk: int) -> torch.Tensor:
        """uint8 [slot_bytes]: that of one of the run's chunks."""
        return self.pool.slots_of(run.group.size)[int(run.rows[chunk])]

    def clear(self, segment: Segment, stream: Stream, chunks: tuple[int, ...]) -> int:
        """Zero what is ours of these slots, so that no byte of an earlier chunk stays readable."""
        pairs: list[Pair] = []
        for chunk in dict.fromkeys(chunks):
            slot = self.slot(segment.run, chunk)
            for offset, size in self._own_ranges or ((0, slot.shape[0]),):
                pairs.extend(zeros_over(slot[offset : offset + size], self._zeros))
        for part, zeros in pairs:
            self.device.copy(part, zeros, stream)
        return len(pairs)

    def clear_sums(self, segment: Segment, stream: Stream) -> None:
        """Where the segment is added up, begin with zeros."""
        if segment.sums is not None:
            self.device.fill_zero(segment.sums.device_bytes, stream)

    def fetch_sums(self, segment: Segment, stream: Stream) -> int:
        """Where it was, copy the sums to the host; how many operations all that takes."""
        if segment.sums is None:
            return 0
        self.device.copy(segment.sums.host_bytes, segment.sums.device_bytes, stream)
        return 3

    def end(self, stream: Stream, num_ops: int) -> Queued:
        """Of a segment that was queued on one stream alone."""
        done = self.record(stream, timed=True)
        return Queued(done, done, (done,), num_ops)

    def record(self, stream: Stream, *, timed: bool = False) -> Event:
        """A new event, recorded on the stream. `timed`: what a job may end with."""
        event = self.device.new_event(timed=timed)
        self.device.record(event, stream)
        return event
