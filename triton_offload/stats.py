"""Counts of what an offloader has done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from triton_offload.errors import ChecksumError
from triton_offload.specs import TransferResult, TransferStatus


@dataclass(frozen=True, slots=True)
class PathStats:
    """What crossed by one path. `seconds`: of the jobs that crossed by this path alone."""

    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class DirectionStats:
    """Jobs that ended in one direction: `jobs`, of which some `failed` or were `cancelled`.

    Of those that succeeded: `num_bytes` and `seconds`; `paths`, the same by the name of the path;
    `queue_waits`, how many had bytes to move, and `queue_seconds`, how long these waited in all
    from their submission until something of them was queued on the device. `failures`: how many
    failed by the class name of the error. `wrong_chunks`: chunks whose bytes were not those that
    were stored (`ChecksumError`).
    """

    jobs: int = 0
    failed: int = 0
    cancelled: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    queue_waits: int = 0
    queue_seconds: float = 0.0
    paths: Mapping[str, PathStats] = field(default_factory=dict, hash=False)
    failures: Mapping[str, int] = field(default_factory=dict, hash=False)
    wrong_chunks: int = 0

    @property
    def succeeded(self) -> int:
        return self.jobs - self.failed - self.cancelled

    @property
    def gb_per_s(self) -> float:
        """10**9 bytes per second while jobs were under way; overlapping jobs count twice."""
        return self.num_bytes / self.seconds / 1e9 if self.seconds else 0.0


class DirectionTotals:
    """What `DirectionStats` shows, while it is counted. Its user holds a lock."""

    def __init__(self) -> None:
        self._ended = Counter[TransferStatus]()
        self._num_bytes = 0
        self._seconds = 0.0
        self._queue_waits = 0
        self._queue_seconds = 0.0
        self._bytes_by_path: dict[str, int] = {}
        self._seconds_by_path: dict[str, float] = {}
        self._failures = Counter[str]()
        self._wrong_chunks = 0

    def add(self, result: TransferResult) -> None:
        """A job has ended."""
        self._ended[result.status] += 1
        if result.status is TransferStatus.FAILED:
            error = result.error
            self._failures["unknown" if error is None else type(error).__name__] += 1
            if isinstance(error, ChecksumError):
                self._wrong_chunks += len(error.slot_ids)
        if not result.success:
            return
        self._num_bytes += result.num_bytes
        self._seconds += result.seconds
        self._queue_waits += result.num_bytes > 0
        self._queue_seconds += result.queue_seconds
        for path, num_bytes in result.bytes_by_path:
            self._bytes_by_path[path] = self._bytes_by_path.get(path, 0) + num_bytes
        if len(result.bytes_by_path) == 1:
            ((path, _),) = result.bytes_by_path
            self._seconds_by_path[path] = self._seconds_by_path.get(path, 0.0) + result.seconds

    def stats(self) -> DirectionStats:
        return DirectionStats(
            self._ended.total(),
            self._ended[TransferStatus.FAILED],
            self._ended[TransferStatus.CANCELLED],
            self._num_bytes,
            self._seconds,
            self._queue_waits,
            self._queue_seconds,
            {
                path: PathStats(num_bytes, self._seconds_by_path.get(path, 0.0))
                for path, num_bytes in self._bytes_by_path.items()
            },
            dict(self._failures),
            self._wrong_chunks,
        )


@dataclass(frozen=True, slots=True)
class SizeStats:
    """Chunks of one size: how many the pool has room for if all are such, and how many it holds."""

    slot_bytes: int
    num_chunks: int
    num_used: int

    @property
    def used_bytes(self) -> int:
        return self.slot_bytes * self.num_used


@dataclass(frozen=True, slots=True)
class OffloadingStats:
    """Counts since construction, in chunks where nothing else is said, and how it stands now.

    `pinned`: whether all of the pool is; `pin_error`: why it can't be, None while that is under way
    and where it is pinned. `broken_paths`: those that could not be queued, for which others stand
    in. `host_bytes`, `used_bytes`: of the pool, 0 once the offloader is closed. `limits`: what this
    machine does not have, or refused, and what that costs, a line each.

    Of groups whose chunks differ in size `num_chunks` is how many of the smallest there is room
    for; `sizes` tells them apart. `wasted_bytes`: what lies behind the slots of slabs that are cut.
    """

    store: DirectionStats
    load: DirectionStats
    lookups: int  # chunks asked for
    hits: int  # of those, leading ones that were there
    evictions: int
    num_chunks: int
    num_used: int
    num_pinned: int  # by transfers under way
    host_bytes: int
    used_bytes: int
    pinned: bool
    pin_error: str | None
    broken_paths: tuple[str, ...]
    #: jobs of media of the user's, with the bytes that these counted
    imported: DirectionStats = field(default_factory=DirectionStats)
    exported: DirectionStats = field(default_factory=DirectionStats)
    limits: tuple[str, ...] = ()
    wasted_bytes: int = 0
    sizes: tuple[SizeStats, ...] = ()
