"""The lanes over one pool, and what each is made of."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

from triton_offload.calibration import Path, PathTable
from triton_offload.device import Device
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import Direction
from triton_offload.transfer.checksums import Checksums
from triton_offload.transfer.contents import SlotContents
from triton_offload.transfer.lane import Lane
from triton_offload.transfer.lane_streams import LaneStreams
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.options import PipelineOptions

#: the lanes, and the direction of their jobs
LANES = {
    "store": Direction.STORE,
    "load": Direction.LOAD,
    "expedited": Direction.LOAD,
}

# Whose bytes are added up as they pass.
_PROVED: dict[str, tuple[Direction, ...]] = {
    "off": (),
    "store": (Direction.STORE,),
    "load": (Direction.STORE, Direction.LOAD),
}


def open_lanes(
    names: Iterable[str],
    device: Device,
    layout: CacheLayout,
    pool: HostPool,
    options: PipelineOptions,
    checksums: Checksums | None,
) -> dict[str, Lane]:
    """Those of `LANES` that are named, each with streams and buffers of its own. Where one could
    not be had, none is left open."""
    table = options.paths or device.default_paths
    if options.path is not None:
        table = PathTable(Path(options.path))
    largest = max(group.packed.slot_bytes for group in layout.groups)
    contents = SlotContents(layout, pool.slabs, other_writers=pool.has_other_writers)
    lanes: dict[str, Lane] = {}
    with ExitStack() as undo:
        for name in names:
            direction = LANES[name]
            proved = direction in _PROVED[options.verify]
            # Ordering rule 4: every lane has its own ring, so that none starves another.
            streams = LaneStreams(
                device,
                layout,
                pool,
                direction,
                f"triton-offload-{name}",
                num_buffers=options.num_buffers,
                buffer_bytes=max(options.buffer_bytes, largest),
                sums=proved,
            )
            undo.callback(streams.close)
            lanes[name] = Lane(
                name,
                direction,
                device,
                streams,
                table,
                blocks_per_chunk=layout.blocks_per_chunk,
                max_indices=options.max_indices,
                window_bytes=options.window_bytes,
                contents=contents if direction is Direction.STORE else None,
                checksums=checksums if proved else None,
            )
        undo.pop_all()
    return lanes
