"""This package's metrics beside vLLM's, in the same `GET /metrics`.

Names and meanings are those of `triton_offload.metrics`, counted over all ranks; what is of a rank
has the label `rank`. vLLM carries them from its workers: with the connector of this package, that
is. The spec alone declares them, and their values never come.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingGaugeMetadata

from triton_offload.calibration import Path
from triton_offload.specs import Direction, TransferStatus
from triton_offload.stats import DirectionStats, PathStats
from triton_offload.vllm.tolerant_worker import FailureKind, TolerantWorker

LOST_CHUNKS = "triton_offload_lost_chunks"
RECOMPUTED_REQUESTS = "triton_offload_recomputed_requests"

_WAY = ("direction",)
_COUNTERS = {
    "jobs": ("Stores and loads that ended, by how.", (*_WAY, "status")),
    "failures": ("Stores and loads that failed, by the class of the error.", (*_WAY, "cause")),
    "survived": (
        "Failures that did not end the engine: refused at submission, failed under way, or (sync) "
        "a load that its step waited for.",
        (*_WAY, "kind"),
    ),
    "bytes": ("Bytes of pages that landed, by the path that they took.", (*_WAY, "path")),
    "path_seconds": (
        "Seconds that jobs which took one path alone were under way; jobs may overlap.",
        (*_WAY, "path"),
    ),
    "transfer_seconds": (
        "Seconds that jobs which succeeded were under way; jobs may overlap.",
        _WAY,
    ),
    "queue_wait_seconds": (
        "Seconds from submission until something of a job was queued on the device.",
        _WAY,
    ),
    "queue_waits": ("Jobs whose wait is counted in queue_wait_seconds.", _WAY),
    "wrong_chunks": ("Chunks whose bytes were not those that were stored.", _WAY),
    "lost_chunks": (
        "Chunks that left the pool because a store or a load of them failed.",
        _WAY,
    ),
    "recomputed_requests": ("Requests that were recomputed because their load failed.", ()),
}
_GAUGES = {
    "pool_bytes": ("Bytes of host memory that the rank's pool has.", ("rank",)),
    "pool_pinned": (
        "1 where all of the pool is pinned, else 0: copies may block, zero_copy is not to be had.",
        ("rank",),
    ),
    "path_broken": (
        "1 where the path could not be queued and another stands in for it, else 0.",
        ("rank", "path"),
    ),
}

DEFINITIONS: dict[str, Any] = {
    f"triton_offload_{name}": kind(documentation=text, labelnames=labels)
    for kind, metrics in (
        (OffloadingCounterMetadata, _COUNTERS),
        (OffloadingGaugeMetadata, _GAUGES),
    )
    for name, (text, labels) in metrics.items()
}

# A metric without its prefix, the values of its labels, and its value.
_Sample = tuple[str, tuple[str, ...], float]


class WorkerMetrics:
    """What one rank's worker has counted, as what was added since it was told last."""

    def __init__(self, rank: int) -> None:
        self._rank = str(rank)
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}
        self._seen: tuple[object, ...] = ()

    def collect(self, worker: TolerantWorker) -> Any:
        """vLLM's OffloadingConnectorStats with what has changed; None where nothing has.

        The first has every metric, for a rate needs a value before the first increase.
        """
        # Every step of the engine comes by here, and few have anything to tell.
        pool = worker.transfers.pool
        pinned = None if pool is None else pool.pinned
        seen = (worker.num_reported, pinned, worker.transfers.broken_paths)
        if seen == self._seen:
            return None
        self._seen = seen
        changed = OffloadingConnectorStats()
        for name, labels, value in (*_counters(worker), *self._gauges(worker)):
            before = self._told.get((name, labels))
            if value == before:
                continue
            self._told[name, labels] = value
            full_name = f"triton_offload_{name}"
            if name in _GAUGES:
                changed.set_gauge(full_name, value, labels)
            else:
                changed.increase_counter(full_name, value - (before or 0), labels)
        return None if changed.is_empty() else changed

    def _gauges(self, worker: TolerantWorker) -> Iterator[_Sample]:
        pool = worker.transfers.pool
        if pool is None:  # shut down
            return
        yield "pool_bytes", (self._rank,), pool.num_slots * pool.slot_bytes
        yield "pool_pinned", (self._rank,), int(pool.pinned)
        broken = worker.transfers.broken_paths
        for path in Path:
            yield "path_broken", (self._rank, path.value), int(path.value in broken)


def _counters(worker: TolerantWorker) -> Iterator[_Sample]:
    transfers = worker.transfers
    for direction, stats in (
        (Direction.STORE, transfers.stores),
        (Direction.LOAD, transfers.loads),
    ):
        yield from _of_direction(direction.value, stats)
        for kind in FailureKind:
            survived = worker.survived[direction, kind]
            yield "survived", (direction.value, kind.value), survived


def _of_direction(way: str, stats: DirectionStats) -> Iterator[_Sample]:
    yield "jobs", (way, TransferStatus.SUCCESS.value), stats.succeeded
    yield "jobs", (way, TransferStatus.FAILED.value), stats.failed
    yield "jobs", (way, TransferStatus.CANCELLED.value), stats.cancelled
    yield "transfer_seconds", (way,), stats.seconds
    yield "queue_wait_seconds", (way,), stats.queue_seconds
    yield "queue_waits", (way,), stats.queue_waits
    yield "wrong_chunks", (way,), stats.wrong_chunks
    for path in Path:
        crossed = stats.paths.get(path.value, PathStats())
        yield "bytes", (way, path.value), crossed.num_bytes
        yield "path_seconds", (way, path.value), crossed.seconds
    for cause, count in stats.failures.items():
        yield "failures", (way, cause), count
