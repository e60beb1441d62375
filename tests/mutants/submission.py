"""What submission may queue, and what a burst may take."""

from __future__ import annotations

from unittest.mock import patch

import scenarios

from mutants.registry import instead, mutant, serving
from triton_offload.device.deferred import Deferred
from triton_offload.testing import SimulatedDevice
from triton_offload.transfer import ranges
from triton_offload.transfer.lane import Lane
from triton_offload.transfer.lane_streams import LaneStreams
from triton_offload.transfer.pipeline import Pipeline

# -- 7: submission --


@mutant("7", scenarios.burst)
def operations_are_queued_without_a_bound():
    return patch.object(Lane, "_has_room", lambda self, run: True)


@mutant("7", scenarios.burst_of_batches)
def a_batch_of_copies_is_one_operation():
    def make(fly):
        def fly_light(self, work):
            work.num_ops = min(work.num_ops, 8)
            fly(self, work)

        return fly_light

    return instead(Lane, "_fly", make)


@mutant("7", serving("staged"))
def the_host_waits_for_a_staging_buffer():
    def take_buffer(self, stream):
        buffer = self._ring.take()
        if buffer.free_after is not None:
            self.device.synchronize(buffer.free_after, None)
        return buffer

    return patch.object(LaneStreams, "take_buffer", take_buffer)


@mutant("7", scenarios.nobody_calls)
def nobody_feeds_the_backlog():
    return patch.object(Pipeline, "_feed", lambda self: None)


@mutant("7", scenarios.capture)
def a_transfer_is_queued_into_a_captured_graph():
    return patch.object(SimulatedDevice, "capturing", lambda self, stream: False)


@mutant("7, memory that is not pinned", serving("staged, deferred"))
def copies_of_pageable_memory_are_called_by_the_submitter():
    return patch.object(Deferred, "_work", _at_once)


def _at_once(self, function, operands, stream, *, deferred=False, **options):
    function(*operands, stream.stream, **options)


@mutant("7, memory that is not pinned", serving("staged, deferred"))
def a_stream_does_not_wait_for_what_threads_record():
    def make(wait):
        def wait_if_made(self, stream, event):
            if self.is_recorded(event):
                wait(self, stream, event)

        return wait_if_made

    return instead(Deferred, "wait", make)


# -- 11: bursts --


@mutant("11", scenarios.small_copy_in_turn)
def copies_are_not_cut_in_slices():
    return patch.object(ranges, "SLICE_BYTES", 1 << 40)


@mutant("11", scenarios.small_copy_first_in_first_out)
def nothing_bounds_the_bytes_queued_ahead():
    def make(init):
        def init_open(self, *args, window_bytes=None, **kwargs):
            init(self, *args, window_bytes=None, **kwargs)

        return init_open

    return instead(Lane, "__init__", make)
