"""What there is to say of a path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import ClassVar

from triton_offload.calibration import LaunchShape, Path
from triton_offload.device.base import Stream
from triton_offload.specs import Direction
from triton_offload.transfer.lane_streams import LaneStreams
from triton_offload.transfer.layout import GroupRun
from triton_offload.transfer.segment import Gate, Queued, Segment


class Role(Enum):
    """Which of a lane's two streams: a name of `LaneStreams`."""

    KERNELS = "kernels"
    COPIES = "copies"


class Crossing(ABC):
    """One path: all that differs by it. It holds nothing, so that all lanes share one."""

    #: the streams that a store's work is queued on, from its first to its last, and a load's
    store_roles: ClassVar[tuple[Role, ...]]
    load_roles: ClassVar[tuple[Role, ...]]
    #: the path that stands in for it where it could not be queued; following these from any path
    #: must lead to two that stand in for each other
    stands_in: ClassVar[Path]
    #: the path in its place while kernels can't reach the pool; None: it does without that
    where_unmapped: ClassVar[Path | None] = None
    #: the same while the device takes no batches of copies
    where_unbatched: ClassVar[Path | None] = None
    #: the same where pages are added up as they pass; None: its kernels do that
    where_summed: ClassVar[Path | None] = None
    #: launches of its kernels to be tried when a machine is measured, cheapest first (less memory,
    #: or fewer CTAs that the model would miss); None among them: the kernels' own. The best goes
    #: into the field of `Calibration` that has the path's name
    launch_shapes: ClassVar[tuple[LaunchShape | None, ...]] = ()

    def max_chunks(self, streams: LaneStreams, run: GroupRun) -> int:
        """Chunks of the run in a segment: what a staging buffer holds, so that a path that goes
        through one can stand in."""
        return streams.chunks_in_buffer(run)

    def short_chunks(self, run: GroupRun) -> int:
        """Chunks of a segment that fills or drains the path's stages, where there are two: less
        than a buffer holds. 0: there is one stage."""
        return 0

    def queue(self, streams: LaneStreams, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        """Queue the segment in the direction of the lane. `pages` and `slots`: what must be done
        before it touches either. When it raises, part may be queued: settle before anything else.
        """
        if streams.direction is Direction.STORE:
            return self.store(streams, segment, pages, slots)
        return self.load(streams, segment, pages, slots)

    @abstractmethod
    def store(self, streams: LaneStreams, segment: Segment, pages: Gate, slots: Gate) -> Queued: ...

    @abstractmethod
    def load(self, streams: LaneStreams, segment: Segment, pages: Gate, slots: Gate) -> Queued: ...

    def first_stream(self, streams: LaneStreams) -> Stream:
        """The one that the first operation of a segment is queued on."""
        return getattr(streams, self._roles(streams)[0].value)

    def last_stream(self, streams: LaneStreams) -> Stream:
        """The one that the last operation of a segment is queued on."""
        return getattr(streams, self._roles(streams)[-1].value)

    def _roles(self, streams: LaneStreams) -> tuple[Role, ...]:
        return self.store_roles if streams.direction is Direction.STORE else self.load_roles
