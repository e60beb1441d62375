"""Copy engine: no kernel; one batch of copies, each of pages that lie together on both sides."""

from __future__ import annotations

from triton_offload.calibration import Path
from triton_offload.transfer.lane_streams import MOST_COPIES, LaneStreams
from triton_offload.transfer.layout import GroupRun
from triton_offload.transfer.paths.base import Crossing, Role
from triton_offload.transfer.ranges import addresses
from triton_offload.transfer.segment import Gate, Queued, Segment


class CopyEngine(Crossing):
    store_roles = load_roles = (Role.COPIES,)
    stands_in = Path.STAGED
    where_unbatched = Path.STAGED
    where_summed = Path.STAGED  # no kernel sees the bytes, and to read them again costs a pass

    def max_chunks(self, streams: LaneStreams, run: GroupRun) -> int:
        pages_of_chunk = run.group.table.blocks_per_chunk * len(run.group.table.pages)
        return min(super().max_chunks(streams, run), MOST_COPIES // pages_of_chunk)

    def store(self, streams: LaneStreams, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        copies, marks = streams.copies, segment.marks
        slots.hold(copies)  # ordering rule 6
        ops = 1 + streams.clear(segment, copies, marks.stale + marks.unfilled)
        pages.hold(copies)  # ordering rule 1
        page, slot, sizes = addresses(segment.run, streams.pool)
        streams.device.copy_batch(slot, page, sizes, copies)
        return streams.end(copies, ops + len(sizes))

    def load(self, streams: LaneStreams, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        copies = streams.copies
        slots.hold(copies)  # ordering rule 6
        pages.hold(copies)  # ordering rule 2
        page, slot, sizes = addresses(segment.run, streams.pool)
        streams.device.copy_batch(page, slot, sizes, copies)
        return streams.end(copies, 1 + len(sizes))
