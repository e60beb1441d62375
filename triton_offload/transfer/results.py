"""How a job ended: the one report of it, and whether it brought the bytes that it should."""

from __future__ import annotations

from contextlib import suppress

from triton_offload.device.base import Device
from triton_offload.errors import ChecksumError
from triton_offload.specs import Direction, TransferResult, TransferStatus
from triton_offload.transfer.checksums import Checksums
from triton_offload.transfer.job import Job


def prove(job: Job, checksums: Checksums) -> None:
    """Keep a store's sums; a load that does not bring what was stored has failed."""
    if job.direction is Direction.STORE:
        checksums.store(job.runs, job.sums if job.error is None else ())
    elif job.error is None:
        wrong = checksums.wrong_slots(job.sums)
        if wrong:
            job.error = ChecksumError(wrong)


def result_of(job: Job, device: Device) -> TransferResult:
    """The report of a job, nothing of which can touch a page or a slot any more."""
    if job.cancelled:
        return TransferResult(job.job_id, TransferStatus.CANCELLED)
    if job.error is not None:
        return TransferResult(job.job_id, TransferStatus.FAILED, error=job.error)
    seconds = 0.0
    with suppress(Exception):  # the bytes have landed
        seconds = device.elapsed(job.start, job.end) if job.start else 0.0
    return TransferResult(
        job.job_id,
        TransferStatus.SUCCESS,
        job.num_bytes,
        seconds,
        bytes_by_path=tuple([(path.value, part) for path, part in job.by_path.items()]),
        queue_seconds=job.queue_seconds,
    )
