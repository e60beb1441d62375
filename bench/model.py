"""A model of how long transfers take: what limits each path, as formulas of published figures.

Pure functions from a card (`hardware.py`) to seconds. Nothing here was measured on a card by this
project: whatever comes out is a prediction. `published.py` holds it against figures of others,
`performance.py` writes docs/performance.md of it. Bytes, seconds, bytes per second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hardware import ISSUES_PER_SECOND, Card
from units import KIB, MIB

from triton_offload.calibration import Path
from triton_offload.kernels.tiling import choose_config
from triton_offload.specs import Direction

# More in flight per CTA brings no more over a link. TensorRT-LLM's comments call these knees
# independent of the platform; SGLang found deeper register pipelines no faster.
READ_KNEE, WRITE_KNEE = 64 * KIB, 32 * KIB

# Memory is set to zero, or sums are copied to the host, behind other work of the same stream: what
# a small copy takes of an engine (8 KiB at 5.2 GB/s are published for an H100).
SMALL_SECONDS = 1.5e-6


@dataclass(frozen=True, slots=True)
class Kernel:
    """A launch: so many CTAs, each with so many bytes between load and store."""

    ctas: int
    flight_bytes: int
    threads: int
    registers: int
    """Of a thread."""
    shared_bytes: int = 0
    """Of a CTA."""
    added: float = 0.0
    """Instructions of a thread for each 16 bytes, beside those that move them: these are a part of
    the round trips, which are those of kernels at work."""

    @property
    def added_seconds(self) -> float:
        """What an SM takes to issue the added instructions of all bytes in flight."""
        return self.flight_bytes / 16 / 32 * self.added / ISSUES_PER_SECOND

    def busiest_bytes(self, num_bytes: int) -> int:
        """Of the CTA that gets most tiles of a job."""
        tiles = math.ceil(num_bytes / self.flight_bytes)
        return min(num_bytes, math.ceil(tiles / self.ctas) * self.flight_bytes)


def _registers_kernel(*, zero_copy: bool) -> Kernel:
    config = choose_config(zero_copy=zero_copy)
    return Kernel(config.programs, config.tile_bytes, config.warps * 32, 64)


STAGED_KERNEL = _registers_kernel(zero_copy=False)
ZERO_COPY_KERNEL = _registers_kernel(zero_copy=True)
# cp.async into a ring of 128 KiB of shared memory: few threads, few registers.
RING_KERNEL = Kernel(2, 128 * KIB, 128, 40, 128 * KIB)


@dataclass(frozen=True, slots=True)
class Host:
    """Seconds of the caller before a job's first operation is queued, and for each segment.

    As measured here with a device that does nothing (`bench/run.py submission`; two cores of an
    Intel Xeon, 2.5 GHz, nothing else running): what the driver takes comes on top, and a server's
    processor takes less.
    """

    job_seconds: float = 30e-6
    segment_seconds: float = 67e-6


NO_HOST = Host(0.0, 0.0)
BUFFERS = 3  # of a staging ring
SEGMENT_BYTES = 16 * MIB


def segments_of(num_bytes: int, most: int = SEGMENT_BYTES) -> list[int]:
    """Equal segments, the last one what is left."""
    whole, rest = divmod(num_bytes, most)
    return [most] * whole + [rest] * (rest > 0)


def ramped(num_bytes: int, direction: Direction, most: int = SEGMENT_BYTES) -> list[int]:
    """Segments of 2, 4, 8, 16, 16, ... MiB for a store, whose first copy waits for a gather, and
    the same from the end for a load, whose last scatter is waited for."""
    found: list[int] = []
    size = most // 8
    while num_bytes > 0:
        found.append(min(size, num_bytes))
        num_bytes -= found[-1]
        size = min(most, 2 * size)
    return found if direction is Direction.STORE else found[::-1]


def link_rate(card: Card, direction: Direction) -> float:
    return card.link.to_host if direction is Direction.STORE else card.link.to_device


def plain_copy_seconds(card: Card, direction: Direction, num_bytes: int) -> float:
    """One copy of contiguous memory: the limit."""
    return card.start_seconds + num_bytes / link_rate(card, direction)


def cta_rate(card: Card, direction: Direction, flight_bytes: float) -> float:
    """Of one CTA on host memory: bytes in flight over the round trip, up to the knee."""
    if direction is Direction.STORE:
        return min(flight_bytes, WRITE_KNEE) / card.link.write_seconds
    return min(flight_bytes, READ_KNEE) / card.link.read_seconds


def zero_copy_seconds(
    card: Card, direction: Direction, num_bytes: int, kernel: Kernel = ZERO_COPY_KERNEL
) -> float:
    """A kernel on mapped host memory: the link's speed, or what its CTAs keep in flight: less while
    they are at what is added."""
    trip = card.link.write_seconds if direction is Direction.STORE else card.link.read_seconds
    in_flight = kernel.flight_bytes * trip / (trip + kernel.added_seconds)
    busiest = kernel.busiest_bytes(num_bytes) / cta_rate(card, direction, in_flight)
    return card.start_seconds + max(trip, busiest, num_bytes / link_rate(card, direction))


def gather_seconds(card: Card, num_bytes: int, kernel: Kernel = STAGED_KERNEL) -> float:
    """A gather or a scatter in device memory, which reads and writes every byte; without the
    launch."""
    trips = kernel.busiest_bytes(num_bytes) / kernel.flight_bytes
    trip = card.memory_seconds + kernel.added_seconds
    return max(trip * max(1.0, trips), 2 * num_bytes / card.memory)


def staged_seconds(
    card: Card,
    direction: Direction,
    segments: Sequence[int],
    host: Host = NO_HOST,
    kernel: Kernel = STAGED_KERNEL,
    *,
    sums: bool = False,
) -> float:
    """A pipeline of two stages over a ring of BUFFERS. `sums`: memory for them is cleared before
    each kernel, and copied to the host behind a store's copy, or a load's kernel.

    A stage of a segment begins when it was queued, when the same stage of the segment before is
    over and, in the first stage, when its buffer is free; the second when the first is over.
    """
    first_over = second_over = 0.0
    free_after: list[float] = []  # when the second stage of each segment was over
    for number, num_bytes in enumerate(segments):
        queued = host.job_seconds + (number + 1) * host.segment_seconds
        copy = num_bytes / link_rate(card, direction)
        pages = gather_seconds(card, num_bytes, kernel)
        if sums:
            pages += SMALL_SECONDS
            if direction is Direction.STORE:
                copy += SMALL_SECONDS
            else:
                pages += SMALL_SECONDS
        first, second = (pages, copy) if direction is Direction.STORE else (copy, pages)
        free = free_after[number - BUFFERS] if number >= BUFFERS else 0.0
        # What is queued while its stream is busy follows at once; after another stream it starts.
        waited = max(queued, free)
        first_over = max(waited + card.start_seconds, first_over) + first
        second_over = max(first_over + card.start_seconds, second_over) + second
        free_after.append(second_over)
    return second_over


def batch_seconds(card: Card, direction: Direction, page_bytes: int, pages: int) -> float:
    """One `cuMemcpyBatchAsync` with a descriptor per page.

    Up to `depth` descriptors are queued before the engine begins, the rest beside it. Small loads
    take the driver's own way: its time hides the queueing while the queue has room, and adds to it
    from then on. That is what a published table shows, not how a driver is known to work.
    """
    driver = card.driver
    enqueue = driver.enqueue_seconds
    if direction is Direction.LOAD and page_bytes < driver.small_bytes:
        move = page_bytes / driver.small_rate
        each = max(enqueue, move) if pages <= driver.depth else enqueue + move
        return card.start_seconds + pages * each
    move = page_bytes / link_rate(card, direction)
    ahead = enqueue * min(pages, driver.depth)
    return card.start_seconds + max(ahead + pages * move, pages * enqueue + move)


def path_seconds(
    card: Card, path: Path, direction: Direction, page_bytes: int, pages: int, host: Host = NO_HOST
) -> float:
    """A job of pages scattered on the device, in adjacent slots.

    Pages of a power of two from 512 bytes on; for others kernels have half as much in flight.
    """
    num_bytes = page_bytes * pages
    if path is Path.STAGED:
        return staged_seconds(card, direction, segments_of(num_bytes), host)
    once = host.job_seconds + host.segment_seconds
    if path is Path.ZERO_COPY:
        return once + zero_copy_seconds(card, direction, num_bytes)
    return once + batch_seconds(card, direction, page_bytes, pages)


def fastest_path(
    card: Card, direction: Direction, page_bytes: int, pages: int, host: Host = NO_HOST
) -> Path:
    return min(Path, key=lambda p: path_seconds(card, p, direction, page_bytes, pages, host))


def both_ways_seconds(
    card: Card, path: Path, page_bytes: int, pages: int, host: Host = NO_HOST
) -> float:
    """A store and a load of so many pages each, at once."""
    alone = max(path_seconds(card, path, each, page_bytes, pages, host) for each in Direction)
    return max(alone, 2 * page_bytes * pages / card.link.both)


def small_copy_wait(card: Card, slice_bytes: int) -> float:
    """Of a small copy to the device while slices are copied, where streams are served in turn."""
    return card.start_seconds + slice_bytes / card.link.to_device


def memory_share(card: Card, path: Path, direction: Direction) -> float:
    """Of device memory's speed, what a transfer at the link's speed takes: every byte once; by
    staging twice more, unless the L2 cache holds the buffers."""
    times = 3 if path is Path.STAGED else 1
    return times * link_rate(card, direction) / card.memory


def room_beside(card: Card, kernel: Kernel) -> float:
    """Of an SM's registers or threads, whichever is scarcer, what a CTA leaves the model's
    kernels."""
    registers = 1 - kernel.threads * kernel.registers / card.registers_per_sm
    threads = 1 - kernel.threads / card.threads_per_sm
    return max(0.0, min(registers, threads))
