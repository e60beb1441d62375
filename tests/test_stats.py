"""Counts of what an offloader has done."""

from __future__ import annotations

import pytest

from triton_offload.specs import TransferResult, TransferStatus
from triton_offload.stats import DirectionStats


def test_jobs_are_counted_however_they_ended_and_bytes_where_they_landed():
    stats = DirectionStats()
    assert stats.gb_per_s == 0.0
    for result in (
        TransferResult(1, TransferStatus.SUCCESS, 3_000_000_000, 1.0),
        TransferResult(2, TransferStatus.FAILED, error=OSError()),
        TransferResult(3, TransferStatus.CANCELLED),
        TransferResult(4, TransferStatus.SUCCESS, 1_000_000_000, 3.0),
        TransferResult(5, TransferStatus.SUCCESS),
    ):
        stats = stats.add(result)
    assert (stats.jobs, stats.failed, stats.num_bytes) == (5, 2, 4_000_000_000)
    assert stats.gb_per_s == pytest.approx(1.0)
