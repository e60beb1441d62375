"""Staged: a kernel gathers into a staging buffer, and the copy engine moves that to the slots."""

from __future__ import annotations

from triton_offload.calibration import LaunchShape, Path
from triton_offload.transfer.lane_streams import MOST_COPIES, LaneStreams
from triton_offload.transfer.layout import GroupRun
from triton_offload.transfer.paths.base import Crossing, Role
from triton_offload.transfer.ranges import positions
from triton_offload.transfer.segment import Gate, Queued, Segment

# While the first segment of a store is gathered the link has nothing to do, and while the last of a
# load is scattered. 4 MiB take 12 us (16 CTAs at 450 GB/s, predicted); their copy takes 76 us of a
# link of 55 GB/s, in which the next 16 MiB are queued (40 us, assumed) and gathered (38 us). A
# segment more costs its caller those 40 us: not for less than 8 MiB, 19 us of a gather, beside it.
# Where it costs more (67 us measured on two cores of a Xeon at 2.5 GHz) jobs of 16 and 64 MiB take
# as long with equal segments, as docs/performance.md predicts.
SHORT_BYTES = 4 << 20


class Staged(Crossing):
    store_roles = (Role.KERNELS, Role.COPIES)
    load_roles = (Role.COPIES, Role.KERNELS)
    stands_in = Path.COPY_ENGINE
    launch_shapes = (LaunchShape(8, 8), None, LaunchShape(32, 8), LaunchShape(32, 4))

    def max_chunks(self, streams: LaneStreams, run: GroupRun) -> int:
        most = MOST_COPIES // len(run.group.byte_ranges)  # where no two of its slots are adjacent
        return min(super().max_chunks(streams, run), most)

    def short_chunks(self, run: GroupRun) -> int:
        return max(1, SHORT_BYTES // run.group.packed.slot_bytes)

    def store(self, streams: LaneStreams, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        device, kernels, copies = streams.device, streams.kernels, streams.copies
        run, packed = segment.run, segment.run.group.packed
        buffer = streams.take_buffer(kernels)
        staging = buffer.slots(packed)
        if buffer.holds is not packed:
            if run.group.has_gaps:
                device.fill_zero(buffer.memory, kernels)
            buffer.holds = packed
        for chunk in segment.marks.unfilled:
            device.fill_zero(staging[chunk], kernels)
        pages.hold(kernels)  # ordering rule 1
        streams.clear_sums(segment, kernels)
        device.gather(
            packed,
            segment.block_ids,
            staging,
            streams.places(len(run.slot_ids)),
            run.first,
            kernels,
            zero_copy=False,
            **segment.summed,
        )
        gathered = streams.record(kernels)
        device.wait(copies, gathered)
        slots.hold(copies)  # ordering rule 6
        ops = 6 + streams.clear(segment, copies, segment.marks.stale)
        for chunk in segment.marks.kept:  # ordering rule 8: the slot keeps its other bytes
            begin, end = run.blocks_of_chunk(chunk)
            slot = streams.slot(run, chunk)
            for ours, theirs in zip(packed.pages, run.group.table.pages, strict=True):
                there = positions(slot, theirs, begin, end)
                device.copy(there, positions(staging[chunk], ours, begin, end), copies)
                ops += 1
        ops += streams.copy_chunks(run, staging, segment.marks.kept)
        ops += streams.fetch_sums(segment, copies)  # not between gathers: it queues behind copies
        done = streams.record(copies, timed=True)
        buffer.free_after = done
        return Queued(gathered, done, (gathered, done), ops)

    def load(self, streams: LaneStreams, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        device, kernels, copies = streams.device, streams.kernels, streams.copies
        run, packed = segment.run, segment.run.group.packed
        buffer = streams.take_buffer(copies)
        staging = buffer.slots(packed)
        slots.hold(copies)  # ordering rule 6
        # Ordering rule 2: into private staging at once; only the scatter waits for compute.
        ops = 5 + streams.copy_chunks(run, staging, ())
        copied = streams.record(copies)
        device.wait(kernels, copied)
        pages.hold(kernels)  # ordering rule 2
        streams.clear_sums(segment, kernels)
        device.scatter(
            packed,
            segment.block_ids,
            staging,
            streams.places(len(run.slot_ids)),
            run.first,
            kernels,
            zero_copy=False,
            **segment.summed,
        )
        if segment.sums is None:
            done = streams.record(kernels, timed=True)
            buffer.free_after = done
            return Queued(done, done, (copied, done), ops)
        buffer.free_after = scattered = streams.record(kernels)
        ops += streams.fetch_sums(segment, kernels)
        done = streams.record(kernels, timed=True)
        return Queued(scattered, done, (copied, scattered, done), ops)
