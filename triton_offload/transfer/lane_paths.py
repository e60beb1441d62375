"""Which path a lane's segments take: by the rule, but for what could not be queued there."""

from __future__ import annotations

import logging

from triton_offload.calibration import Path, PathTable
from triton_offload.device.base import Stream
from triton_offload.transfer.lane_streams import LaneStreams
from triton_offload.transfer.layout import GroupRun
from triton_offload.transfer.paths.table import CROSSINGS
from triton_offload.transfer.segment import Gate, Queued, Segment

_log = logging.getLogger(__name__)


class LanePaths:
    """The paths of one lane. What could not be queued once is not tried again: see `give_up`."""

    def __init__(
        self, lane: str, streams: LaneStreams, table: PathTable, *, sums: bool = False
    ) -> None:
        self._sums = sums
        self._lane = lane
        self._streams = streams
        self._table = table
        self._broken: set[Path] = set()

    @property
    def broken(self) -> frozenset[Path]:
        """The paths that could not be queued here, for which others stand in."""
        return frozenset(self._broken)

    def choose(self, run: GroupRun) -> Path:
        """The path that the rule has for a run of so many pages of such a size, if it is usable."""
        table = run.group.table
        pages = len(run.block_ids) * len(table.pages)
        page_bytes = table.bytes_per_block // len(table.pages)
        return self.usable(self._table.choose(self._streams.direction, page_bytes, pages))

    def usable(self, path: Path) -> Path:
        """The path, or the one that has to take its place now."""
        unmapped = CROSSINGS[path].where_unmapped
        if unmapped is not None and not self._streams.reaches_pool:
            path = unmapped
        unbatched = CROSSINGS[path].where_unbatched
        if unbatched is not None and not self._streams.takes_batches:
            path = unbatched
        summed = CROSSINGS[path].where_summed
        if summed is not None and self._sums:
            path = summed
        for _ in self._broken:  # enough steps to find one that is not broken: `give_up` keeps one
            if path in self._broken:
                path = CROSSINGS[path].stands_in
        return path

    def give_up(self, path: Path, error: Exception) -> Path | None:
        """A segment could not be queued by `path`: the one to try in its place, if there is any.

        From now on that stands in for all the path's segments. But of two that stand in for each
        other one is kept, though it failed: its failure may pass, and then jobs land again.
        """
        stands_in = CROSSINGS[path].stands_in
        is_the_last = CROSSINGS[stands_in].stands_in is path and stands_in in self._broken
        if not is_the_last:
            self._broken.add(path)
            _log.warning(
                "the path %s of the lane %s could not be queued (%s): %s stands in for it from now "
                "on, which may be slower; `triton-offload doctor` tries every path",
                path.value,
                self._lane,
                repr(error),  # a record that is kept keeps no frames
                self.usable(path).value,
            )
        return None if stands_in in self._broken else stands_in

    def queue(self, path: Path, segment: Segment, pages: Gate, slots: Gate) -> Queued:
        """See `Crossing.queue`."""
        return CROSSINGS[path].queue(self._streams, segment, pages, slots)

    def adds_up(self, path: Path) -> bool:
        """Whether a segment that crosses by it is added up on its way."""
        return self._sums and CROSSINGS[path].where_summed is None

    def first_stream(self, path: Path) -> Stream:
        """The one that the first operation of a segment is queued on."""
        return CROSSINGS[path].first_stream(self._streams)

    def last_stream(self, path: Path) -> Stream:
        """The one that the last operation of a segment is queued on."""
        return CROSSINGS[path].last_stream(self._streams)

    def max_chunks(self, path: Path, run: GroupRun) -> int:
        """Chunks in a segment of the run."""
        return CROSSINGS[path].max_chunks(self._streams, run)

    def short_chunks(self, path: Path, run: GroupRun) -> int:
        """See `Crossing.short_chunks`."""
        return CROSSINGS[path].short_chunks(run)
