"""What each rank tells the scheduler after a step: the jobs that ended, and those that failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingWorkerMetadata,
)


@dataclass
class TritonWorkerMetadata(OffloadingWorkerMetadata):  # type: ignore[misc]  # vllm is untyped
    """vLLM's metadata, and of the jobs in it those that failed on a rank.

    `failed_jobs`: the ids that the scheduler gave them. A job that failed on one rank has failed.
    """

    failed_jobs: set[int] = field(default_factory=set)

    def aggregate(self, other: Any) -> TritonWorkerMetadata:
        """What both ranks told, in a step."""
        assert isinstance(other, TritonWorkerMetadata)
        both = super().aggregate(other)
        failed = self.failed_jobs | other.failed_jobs
        return TritonWorkerMetadata(both.completed_jobs, both.transfer_stats, failed)
