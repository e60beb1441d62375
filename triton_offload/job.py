"""The handle of a store or a load."""

from __future__ import annotations

from typing import Any, Protocol

from triton_offload.errors import TransferFailedError
from triton_offload.kernels.arguments import as_seconds
from triton_offload.specs import Direction, TransferResult


class JobOwner(Protocol):
    """What a job under way asks of the offloader that moves it."""

    def _collect(self) -> None:
        """Take in what has ended."""

    def _released(self, job: OffloadJob) -> bool:
        """Whether the job's pages are the engine's again."""

    def _wait_on(self, job: OffloadJob, stream: Any) -> None:
        """Let a stream follow that."""

    def _block(self, job: OffloadJob, timeout: float | None) -> None:
        """Block until the job has ended; raises TimeoutError."""


class OffloadJob:
    """A store or a load. Any thread may use it.

    Once the job has ended, the handle keeps its result and nothing else: neither the offloader nor
    its memory lives on for it.
    """

    def __init__(self, owner: JobOwner, job_id: int, direction: Direction) -> None:
        self.job_id = job_id
        self.direction = direction
        self._owner: JobOwner | None = owner  # until it has ended
        self._result: TransferResult | None = None

    def __repr__(self) -> str:
        state = "under way" if self._result is None else self._result.status.value
        return f"<OffloadJob {self.job_id}: {self.direction.value}, {state}>"

    @property
    def result(self) -> TransferResult | None:
        """How the job ended, or None while it is under way."""
        owner = self._owner
        if owner is not None:
            owner._collect()
        return self._result

    @property
    def done(self) -> bool:
        return self.result is not None

    @property
    def source_released(self) -> bool:
        """Whether the engine may use the job's pages again: overwrite what was stored (its bytes
        may still be on their way to the pool), read what was loaded."""
        owner = self._owner
        return owner is None or owner._released(self)

    def wait(self, timeout: float | None = None) -> TransferResult:
        """Block until the bytes have landed. Raises TimeoutError, and TransferFailedError where
        they did not land or the job was cancelled. `get_finished` still reports the job."""
        self.block(timeout)
        result = self._result
        assert result is not None
        if not result.success:
            raise TransferFailedError(result) from result.error
        return result

    def wait_on(self, stream: Any) -> None:
        """Let a stream wait for the release of the job's pages, without the host."""
        owner = self._owner
        if owner is not None:
            owner._wait_on(self, stream)

    def block(self, timeout: float | None = None) -> None:
        """Block until the job has ended, well or not. Raises TimeoutError."""
        timeout = as_seconds("timeout", timeout)
        owner = self._owner
        if owner is not None:
            owner._block(self, timeout)

    def _end(self, result: TransferResult) -> None:
        self._result = result
        self._owner = None
