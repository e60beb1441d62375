"""A segment: the part of a job that is queued at once, and what it waits for.

Tuples, for a job makes several, and a frozen dataclass takes 2.5 times as long.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from triton_offload.device.base import Device, Event, Stream
from triton_offload.transfer.contents import SlotMarks
from triton_offload.transfer.layout import GroupRun
from triton_offload.transfer.sum_memory import SegmentSums


class Segment(NamedTuple):
    """The part of a job that is queued at once, its ids where kernels read them.

    `sums`: where its blocks are added up as they pass; None: nobody asked for that.
    """

    run: GroupRun
    block_ids: torch.Tensor
    rows: torch.Tensor
    marks: SlotMarks
    sums: SegmentSums | None = None

    @property
    def summed(self) -> dict[str, Any]:
        """What `Device.gather` and `Device.scatter` are told of that."""
        return {} if self.sums is None else {"sums": self.sums.on_device}


class Queued(NamedTuple):
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
        self._passed: dict[int, Stream] = {}

    def hold(self, stream: Stream) -> None:
        if id(stream) not in self._passed:
            for event in self._events:
                self._device.wait(stream, event)
            self._passed[id(stream)] = stream
