"""What a lane refills: staging buffers, and memory of ids."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import scenarios

from mutants.registry import Patch, instead, mutant, serving
from triton_offload.device.base import Stream
from triton_offload.testing import SimulatedDevice
from triton_offload.transfer.lane import Lane
from triton_offload.transfer.lane_streams import LaneStreams
from triton_offload.transfer.paths.staged import Staged
from triton_offload.transfer.pipeline import Pipeline
from triton_offload.transfer.staging import IndexRing

# -- 4: staging and ids --


def _without_waiting_for_buffers(*, on_copies: bool) -> Patch:
    def make(take):
        def take_at_once(self, stream):
            return self._ring.take() if (stream is self.copies) == on_copies else take(self, stream)

        return take_at_once

    return instead(LaneStreams, "take_buffer", make)


@mutant("4", serving("staged"))
def a_store_refills_staging_at_once():
    return _without_waiting_for_buffers(on_copies=False)


@mutant("4", serving("staged"))
def a_load_refills_staging_at_once():
    return _without_waiting_for_buffers(on_copies=True)


def _buffers_freed_by_the_first_event(method: str) -> Patch:
    def make(queue):
        def queue_and_free(self, streams, segment, pages, slots):
            queued = queue(self, streams, segment, pages, slots)
            ring = streams._ring
            ring._buffers[(ring.num_taken - 1) % len(ring._buffers)].free_after = queued.events[0]
            return queued

        return queue_and_free

    return instead(Staged, method, make)


@mutant("4", serving("staged"))
def staging_is_refilled_when_it_was_gathered():
    return _buffers_freed_by_the_first_event("store")


@mutant("4", serving("staged"))
def staging_is_refilled_before_it_was_scattered():
    return _buffers_freed_by_the_first_event("load")


@mutant("4", scenarios.a_load_that_waits)
def lanes_share_a_staging_ring():
    def make(init):
        def init_shared(self, *args, **kwargs):
            init(self, *args, **kwargs)
            for lane in self._lanes.values():
                lane.streams._ring = self._lanes["load"].streams._ring

        return init_shared

    return instead(Pipeline, "__init__", make)


class _Deaf:
    """A device on which one stream waits for nothing."""

    def __init__(self, device: SimulatedDevice, deaf: Stream) -> None:
        self._device = device
        self._deaf = deaf

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def wait(self, stream: Stream, event: Any) -> None:
        if stream is not self._deaf:
            self._device.wait(stream, event)


def _second_stage_does_not_wait(method: str, stream: str) -> Patch:
    def make(queue):
        def queue_unordered(self, streams, segment, pages, slots):
            deaf = _Deaf(streams.device, getattr(streams, stream))
            with patch.object(streams, "device", deaf):  # gates have a device of their own
                return queue(self, streams, segment, pages, slots)

        return queue_unordered

    return instead(Staged, method, make)


@mutant("segments: gather before copy", serving("staged"))
def a_copy_does_not_wait_for_its_gather():
    return _second_stage_does_not_wait("store", "copies")


@mutant("segments: copy before scatter", serving("staged"))
def a_scatter_does_not_wait_for_its_copy():
    return _second_stage_does_not_wait("load", "kernels")


@mutant("4", serving("staged"))
def ids_are_freed_when_they_are_queued():
    def make(queue):
        def queue_and_free(self, job, planned):
            queued = queue(self, job, planned)
            if queued and self.lost is None:
                self._indices.free()
                self._in_flight[-1].holds_ids = False
            return queued

        return queue_and_free

    return instead(Lane, "_queue_segment", make)


@mutant("4", serving("staged, hybrid"))
def the_ring_of_ids_overruns_its_tail():
    def find(self, count):
        return self._head if self._head + count <= self.capacity else 0

    return patch.object(IndexRing, "_find", find)


@mutant("4", scenarios.earlier_compute_only)
def one_event_is_recorded_again_for_every_segment():
    def record(self, stream, *, timed=False):
        events = self.__dict__.setdefault("_events", {})
        event = events.setdefault(id(stream), self.device.new_event(timed=timed))
        self.device.record(event, stream)
        return event

    return patch.object(LaneStreams, "record", record)
