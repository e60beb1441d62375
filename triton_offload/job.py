"""The handle of a store or a load under way."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from triton_offload.scheduler.policies import Key
from triton_offload.specs import Direction, TransferResult

if TYPE_CHECKING:
    from triton_offload.offloader import KVOffloader


class TransferFailedError(RuntimeError):
    """A job did not move all of its bytes; the cause is in `result.error`."""

    def __init__(self, result: TransferResult) -> None:
        super().__init__(f"job {result.job_id} {result.status.value}: {result.error}")
        self.result = result


class OffloadJob:
    """A store or a load under way. Any thread may use it."""

    def __init__(
        self, offloader: KVOffloader, job_id: int, direction: Direction, keys: list[Key]
    ) -> None:
        self.job_id = job_id
        self.direction = direction
        self._offloader = offloader
        self._keys = keys
        self._transfers: set[int] = set()
        self._others: list[OffloadJob] = []  # stores by other jobs of keys that this one names
        self._parts: list[TransferResult] = []
        self._result: TransferResult | None = None

    @property
    def result(self) -> TransferResult | None:
        """How the job ended, or None while it is under way."""
        if self._result is None:
            self._offloader._collect()
        return self._result

    @property
    def done(self) -> bool:
        return self.result is not None

    @property
    def source_released(self) -> bool:
        """Whether the engine may use the job's pages again: overwrite what was stored (its bytes
        may still be on their way to the pool), read what was loaded."""
        queue = self._offloader._queue
        return self._result is not None or all(
            queue.source_released(job_id) for job_id in self._under_way()
        )

    def wait(self, timeout: float | None = None) -> TransferResult:
        """Block until the bytes have landed. Raises TimeoutError, and TransferFailedError where
        they did not land or the job was cancelled. `get_finished` still reports the job."""
        self.block(timeout)
        result = self.result
        assert result is not None
        if not result.success:
            raise TransferFailedError(result) from result.error
        return result

    def wait_on(self, stream: Any) -> None:
        """Let a stream wait for the release of the job's pages, without the host."""
        for job_id in self._under_way():
            self._offloader._queue.wait_on(job_id, stream)

    def block(self, timeout: float | None = None) -> None:
        """Block until the job has ended, well or not. Raises TimeoutError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for other in self._others:
            other.block(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if self._result is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._offloader._queue.wait(self._under_way(), left)
            self._offloader._collect()

    def _under_way(self) -> tuple[int, ...]:
        with self._offloader._lock:  # another thread may just take one in
            return tuple(self._transfers)
