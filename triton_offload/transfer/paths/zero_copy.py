"""Zero copy: a kernel reads or writes the slots themselves, mapped host memory."""

from __future__ import annotations

import torch

from triton_offload.calibration import LaunchShape, Path
from triton_offload.kernels.table import PageTable
from triton_offload.transfer.lane_streams import LaneStreams
from triton_offload.transfer.layout import GroupRun
from triton_offload.transfer.paths.base import Crossing, Role
from triton_offload.transfer.segment import Gate, Queued, Segment


class ZeroCopy(Crossing):
    store_roles = load_roles = (Role.KERNELS,)
    stands_in = Path.COPY_ENGINE
    where_unmapped = Path.STAGED
    launch_shapes = (
        None,
        LaunchShape(4, 4, ring=True),
        LaunchShape(4, 16),
        LaunchShape(4, 32),
        LaunchShape(8, 32),
    )

    def max_chunks(self, streams: LaneStreams, run: GroupRun) -> int:
        """The whole run, which gains nothing from being cut (on the host device, eighths of 256 MiB
        took 1.2 times as long)."""
        return len(run.slot_ids)

    def store(self, streams: LaneStreams, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        kernels, marks = streams.kernels, segment.marks
        slots.hold(kernels)  # ordering rule 6
        ops = 2 + streams.clear(segment, kernels, marks.stale + marks.unfilled)
        pages.hold(kernels)  # ordering rule 1
        streams.clear_sums(segment, kernels)
        operands = _mapped(streams, segment)
        streams.device.gather(*operands, kernels, zero_copy=True, **segment.summed)
        ops += streams.fetch_sums(segment, kernels)
        return streams.end(kernels, ops)

    def load(self, streams: LaneStreams, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        kernels = streams.kernels
        slots.hold(kernels)  # ordering rule 6
        pages.hold(kernels)  # ordering rule 2
        streams.clear_sums(segment, kernels)
        operands = _mapped(streams, segment)
        streams.device.scatter(*operands, kernels, zero_copy=True, **segment.summed)
        return streams.end(kernels, 2 + streams.fetch_sums(segment, kernels))


def _mapped(
    streams: LaneStreams, segment: Segment
) -> tuple[PageTable, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    run = segment.run
    slots = streams.pool.slots_of(run.group.size)
    return run.group.table, segment.block_ids, slots, segment.rows, run.first
