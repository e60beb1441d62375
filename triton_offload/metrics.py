"""Prometheus collectors over `KVOffloader.stats` (the extra `metrics`).

```python
from prometheus_client import REGISTRY
from triton_offload.metrics import OffloaderCollector

REGISTRY.register(OffloaderCollector({"rank0": offloader}))
```
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from triton_offload.calibration import Path
from triton_offload.specs import Direction, TransferStatus
from triton_offload.stats import DirectionStats, OffloadingStats, PathStats

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "triton_offload.metrics needs prometheus-client: pip install triton-offload[metrics]"
    ) from error

if TYPE_CHECKING:
    from triton_offload.offloader import KVOffloader

_log = logging.getLogger(__name__)


class OffloaderCollector(Collector):
    """Shows the stats of one or several offloaders in each scrape, by the label `offloader`.

    `offloaders`: by name; one alone is named "default". The collector keeps none of them alive: one
    that is closed goes on showing its last counts, and one that was collected disappears. A scrape
    raises nothing: an offloader whose stats can't be had (in a fork of its process) is left out.

    A registry takes one collector of this kind.
    """

    def __init__(self, offloaders: Mapping[str, KVOffloader] | KVOffloader) -> None:
        named = offloaders if isinstance(offloaders, Mapping) else {"default": offloaders}
        for name, offloader in named.items():
            if not isinstance(name, str) or not hasattr(offloader, "stats"):
                raise TypeError(
                    f"offloaders: expected a KVOffloader, or several by name, got {name!r}: "
                    f"{type(offloader).__name__}"
                )
        self._offloaders = {name: weakref.ref(offloader) for name, offloader in named.items()}
        self._silent: set[str] = set()  # those whose stats could not be had, which was told

    def describe(self) -> Iterable[Metric]:
        """The metrics without a sample: what a registry keeps others from taking."""
        return _families({})

    def collect(self) -> Iterable[Metric]:
        return _families(dict(self._stats()))

    def _stats(self) -> Iterator[tuple[str, OffloadingStats]]:
        for name, reference in self._offloaders.items():
            offloader = reference()
            if offloader is None:
                continue
            try:
                stats = offloader.stats()
            except Exception as error:
                if name not in self._silent:
                    self._silent.add(name)
                    _log.warning(
                        "the offloader %s is left out of metrics: %s; in a fork, make a new one; "
                        "`triton-offload doctor` says whether the device works",
                        name,
                        repr(error),
                    )
                continue
            yield name, stats


# The values of a metric's labels, `offloader` apart, and its value with them.
_Sample = tuple[tuple[str, ...], float]
_Samples = Callable[[OffloadingStats], Iterable[_Sample]]
# What is counted alike for several directions, by the value of the label `direction`.
_Ways = Callable[[OffloadingStats], Mapping[str, DirectionStats]]
# A metric: its name, its help, the names of its labels, and what they are given.
_Row = tuple[str, str, tuple[str, ...], _Samples]


def _families(stats: Mapping[str, OffloadingStats]) -> list[Metric]:
    """Every metric, with samples of these offloaders."""
    families: list[Metric] = []
    for kind, rows in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
        for name, text, labels, samples in rows:
            metric = kind(f"triton_offload_{name}", text, labels=("offloader", *labels))
            for offloader, each in stats.items():
                for values, value in samples(each):
                    metric.add_metric((offloader, *values), value)
            families.append(metric)
    return families


def _transfers(stats: OffloadingStats) -> dict[str, DirectionStats]:
    return {Direction.STORE.value: stats.store, Direction.LOAD.value: stats.load}


def _media(stats: OffloadingStats) -> dict[str, DirectionStats]:
    return {"import": stats.imported, "export": stats.exported}


def _one(value: Callable[[OffloadingStats], float]) -> _Samples:
    return lambda stats: [((), value(stats))]


def _by_way(ways: _Ways, value: Callable[[DirectionStats], float]) -> _Samples:
    return lambda stats: [((way,), value(each)) for way, each in ways(stats).items()]


def _by_path(value: Callable[[PathStats], float]) -> _Samples:
    # All paths from the beginning: a rate needs a value before the first increase.
    return lambda stats: [
        ((way, path.value), value(each.paths.get(path.value, PathStats())))
        for way, each in _transfers(stats).items()
        for path in Path
    ]


def _jobs(ways: _Ways) -> _Samples:
    def samples(stats: OffloadingStats) -> Iterator[_Sample]:
        for way, each in ways(stats).items():
            yield (way, TransferStatus.SUCCESS.value), each.succeeded
            yield (way, TransferStatus.FAILED.value), each.failed
            yield (way, TransferStatus.CANCELLED.value), each.cancelled

    return samples


def _failures(ways: _Ways) -> _Samples:
    return lambda stats: [
        ((way, cause), count)
        for way, each in ways(stats).items()
        for cause, count in each.failures.items()
    ]


def _broken(stats: OffloadingStats) -> Iterator[_Sample]:
    for path in Path:
        yield (path.value,), path.value in stats.broken_paths


_WAY: tuple[str, ...] = ("direction",)
_COUNTERS: tuple[_Row, ...] = (
    ("jobs", "Stores and loads that ended, by how.", (*_WAY, "status"), _jobs(_transfers)),
    (
        "failures",
        "Stores and loads that failed, by the class of the error.",
        (*_WAY, "cause"),
        _failures(_transfers),
    ),
    (
        "bytes",
        "Bytes of pages that landed, by the path that they took.",
        (*_WAY, "path"),
        _by_path(lambda each: each.num_bytes),
    ),
    (
        "path_seconds",
        "Seconds that jobs which took one path alone were under way; jobs may overlap.",
        (*_WAY, "path"),
        _by_path(lambda each: each.seconds),
    ),
    (
        "transfer_seconds",
        "Seconds that jobs which succeeded were under way; jobs may overlap.",
        _WAY,
        _by_way(_transfers, lambda each: each.seconds),
    ),
    (
        "queue_wait_seconds",
        "Seconds from submission until something of a job was queued on the device.",
        _WAY,
        _by_way(_transfers, lambda each: each.queue_seconds),
    ),
    (
        "queue_waits",
        "Jobs whose wait is counted in queue_wait_seconds.",
        _WAY,
        _by_way(_transfers, lambda each: each.queue_waits),
    ),
    (
        "wrong_chunks",
        "Chunks whose bytes were not those that were stored.",
        _WAY,
        _by_way(_transfers, lambda each: each.wrong_chunks),
    ),
    ("medium_jobs", "Imports and exports that ended, by how.", (*_WAY, "status"), _jobs(_media)),
    (
        "medium_failures",
        "Imports and exports that failed, by the class of the error.",
        (*_WAY, "cause"),
        _failures(_media),
    ),
    (
        "medium_bytes",
        "Bytes that workers of media say they moved.",
        _WAY,
        _by_way(_media, lambda each: each.num_bytes),
    ),
    (
        "medium_seconds",
        "Seconds that imports and exports which succeeded were under way; they may overlap.",
        _WAY,
        _by_way(_media, lambda each: each.seconds),
    ),
    ("lookups", "Chunks that were asked for by lookup.", (), _one(lambda stats: stats.lookups)),
    (
        "hits",
        "Of the chunks asked for, leading ones that were in the pool.",
        (),
        _one(lambda stats: stats.hits),
    ),
    (
        "evictions",
        "Chunks that were evicted from the pool.",
        (),
        _one(lambda stats: stats.evictions),
    ),
)
_GAUGES: tuple[_Row, ...] = (
    (
        "pool_bytes",
        "Bytes of host memory that the pool has; 0 once the offloader is closed.",
        (),
        _one(lambda stats: stats.host_bytes),
    ),
    (
        "pool_used_bytes",
        "Bytes of the pool that hold chunks; 0 once the offloader is closed.",
        (),
        _one(lambda stats: stats.used_bytes),
    ),
    (
        "pool_wasted_bytes",
        "Bytes of the pool that slots of several sizes leave over where they lie.",
        (),
        _one(lambda stats: stats.wasted_bytes),
    ),
    (
        "pool_size_used_bytes",
        "Bytes of chunks, by the size of their slots; of a closed offloader as it last was.",
        ("slot_bytes",),
        lambda stats: [((str(size.slot_bytes),), size.used_bytes) for size in stats.sizes],
    ),
    (
        "pool_pinned",
        "1 where all of the pool is pinned, else 0: copies are slower, zero_copy is not to be had.",
        (),
        _one(lambda stats: stats.pinned),
    ),
    (
        "chunks_in_transfer",
        "Chunks that transfers under way use, and that are not evicted.",
        (),
        _one(lambda stats: stats.num_pinned),
    ),
    (
        "path_broken",
        "1 where the path could not be queued and another stands in for it, else 0.",
        ("path",),
        _broken,
    ),
)
