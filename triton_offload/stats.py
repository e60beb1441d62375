"""Counts of what an offloader has done."""

from __future__ import annotations

from dataclasses import dataclass

from triton_offload.specs import TransferResult


@dataclass(frozen=True, slots=True)
class DirectionStats:
    """Jobs that ended in one direction; `num_bytes` and `seconds` are of those that succeeded."""

    jobs: int = 0
    failed: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    def add(self, result: TransferResult) -> DirectionStats:
        return DirectionStats(
            self.jobs + 1,
            self.failed + (not result.success),
            self.num_bytes + result.num_bytes,
            self.seconds + result.seconds,
        )

    @property
    def gb_per_s(self) -> float:
        """10**9 bytes a second while jobs were under way; overlapping jobs count twice."""
        return self.num_bytes / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class OffloadingStats:
    """Counts since construction, in chunks where nothing else is said."""

    store: DirectionStats
    load: DirectionStats
    lookups: int  # chunks asked for
    hits: int  # of those, leading ones that were there
    evictions: int
    num_chunks: int
    num_used: int
    num_pinned: int
    imported: DirectionStats = DirectionStats()  # from media of the user's; bytes as these counted
    exported: DirectionStats = DirectionStats()
