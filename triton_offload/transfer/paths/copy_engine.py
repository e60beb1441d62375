"""Copy engine: no kernel; one batch of copies, each of pages that lie together on both sides."""

from __future__ import annotations

from triton_offload.calibration import Path
from triton_offload.transfer.lane_streams import LaneStreams
from triton_offload.transfer.paths.base import Crossing, Role
from triton_offload.transfer.ranges import addresses, batch_ops
from triton_offload.transfer.segment import Gate, Queued, Segment


class CopyEngine(Crossing):
    store_roles = load_roles = (Role.COPIES,)
    stands_in = Path.STAGED
    where_unbatched = Path.STAGED

    def store(self, streams: LaneStreams, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        copies, marks = streams.copies, segment.marks
        slots.hold(copies)  # ordering rule 6
        ops = 1 + streams.clear(segment, copies, marks.stale + marks.unfilled)
        pages.hold(copies)  # ordering rule 1
        page, slot, sizes = addresses(segment.run, streams.pool)
        streams.device.copy_batch(slot, page, sizes, copies)
        return streams.end(copies, ops + batch_ops(sizes))

    def load(self, streams: LaneStreams, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        copies = streams.copies
        slots.hold(copies)  # ordering rule 6
        pages.hold(copies)  # ordering rule 2
        page, slot, sizes = addresses(segment.run, streams.pool)
        streams.device.copy_batch(page, slot, sizes, copies)
        return streams.end(copies, 1 + batch_ops(sizes))
