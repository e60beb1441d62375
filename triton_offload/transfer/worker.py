"""A worker: what moves the jobs of one kind of transfer. The rules that all keep."""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from triton_offload.specs import LoadStoreSpec, TransferResult


class OffloadingWorker(ABC):
    """Moves jobs from one kind of spec to another. Every method may be called from any thread."""

    @abstractmethod
    def transfer_async(
        self,
        job_id: int,
        src: LoadStoreSpec,
        dst: LoadStoreSpec,
        *,
        expedited: bool = False,
        stream: Any = None,
    ) -> None:
        """Accept a job and return; raises, with nothing queued, what is wrong with it.

        `expedited`: not to queue behind ordinary jobs. `stream`: see `Pipeline.submit`.
        """

    @abstractmethod
    def get_finished(self) -> list[TransferResult]:
        """The jobs that ended since the last call: every accepted job once, however it ended."""

    @abstractmethod
    def wait(self, job_ids: Iterable[int], timeout: float | None = None) -> None:
        """Block until these jobs have ended; ids that the worker does not know are ignored.

        Their results stay to be got. Raises TimeoutError.
        """

    @abstractmethod
    def cancel(self, job_ids: Iterable[int]) -> set[int]:
        """Take back those that have not started, and return their ids."""

    def cancel_together(self, job_ids: Iterable[int]) -> bool:
        """Take back all of these or none; False where one has started. Only jobs that are not
        reported yet. A worker that can't promise that takes back none of several."""
        ids = list(job_ids)
        return len(ids) < 2 and len(self.cancel(ids)) == len(ids)

    @abstractmethod
    def shutdown(self, timeout: float | None = None) -> None:
        """Refuse new jobs, cancel what has not started, drain the rest. Idempotent.

        Raises TimeoutError where that takes longer than `timeout` in all; a later call tries again.
        """

    def source_released(self, job_id: int) -> bool:
        """Whether the engine may use the job's pages again: here, when it has ended."""
        try:
            self.wait([job_id], 0.0)
        except TimeoutError:
            return False
        return True

    def wait_on(self, job_id: int, stream: Any) -> None:
        """Let a stream follow the release of the job's pages: here, by blocking the host."""
        self.wait([job_id])


def check_new(job_id: int, jobs: dict[int, Any]) -> None:
    if job_id in jobs:
        raise ValueError(f"job_id: expected one that no job under way has, got {job_id}")


def deadline_after(timeout: float | None) -> float:
    return math.inf if timeout is None else time.monotonic() + timeout


def seconds_until(deadline: float) -> float | None:
    """What is left, never below 0; None for ever."""
    left = max(0.0, deadline - time.monotonic())
    return None if left > threading.TIMEOUT_MAX else left
