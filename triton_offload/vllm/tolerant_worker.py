"""A worker whose failed jobs end like others, and are told apart beside."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import Any

from vllm.v1.kv_offload import base as vllm_base

from triton_offload.errors import DeviceLostError
from triton_offload.specs import Direction
from triton_offload.vllm.layer_loads import LayerLoads
from triton_offload.vllm.worker import JobFailedError, TritonOffloadingWorker

_log = logging.getLogger(__name__)


class FailureKind(Enum):
    """Where a job failed."""

    REFUSED = "refused"  # nothing of it was queued
    FAILED = "failed"  # under way
    SYNC = "sync"  # a load that the step waits for, at either of these


@dataclass(frozen=True, slots=True)
class FailedJob:
    """`blocks`: of a load that the step waited for, those whose bytes are not right; else none."""

    job_id: int
    direction: Direction
    kind: FailureKind
    blocks: tuple[int, ...] = ()


class TolerantWorker(vllm_base.OffloadingWorker):  # type: ignore[misc]  # vllm is untyped
    """One rank's transfers, of which none raises where it fails.

    vLLM asserts that every job was accepted, and that each ended well: so a job that failed is
    reported as one that moved no bytes, and `take_failed` has it before the scheduler hears of
    the report. What leaves nothing to go on with, a lost device, raises.
    """

    def __init__(
        self, transfers: TritonOffloadingWorker, layer_loads: LayerLoads | None = None
    ) -> None:
        self.transfers = transfers
        self.layer_loads = layer_loads
        self._sync: dict[int, tuple[int, ...]] = {}  # blocks of loads that a step waits for
        self._refused: list[int] = []  # accepted here, and not reported yet
        self._failed: list[FailedJob] = []
        #: jobs that were reported as ended
        self.num_reported = 0
        #: failures that were made ones of jobs, by direction and kind
        self.survived = Counter[tuple[Direction, FailureKind]]()

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Queue device to host. Returns True, always: what could not be queued has failed."""
        try:
            return self.transfers.submit_store(job_id, src_spec, dst_spec)
        except Exception as error:
            self._refuse(job_id, Direction.STORE, error)
            return True

    def submit_load(
        self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False
    ) -> bool:
        """Queue host to device; `expedited`: the step waits for it, its layers each for their own
        pages where that may be. Returns True, as above."""
        layers = None
        if expedited:
            self._sync[job_id] = tuple(map(int, dst_spec.block_ids))
            layers = self.layer_loads.layers if self.layer_loads is not None else None
        try:
            accepted = self.transfers.submit_load(job_id, src_spec, dst_spec, expedited, layers)
        except Exception as error:
            self._refuse(job_id, Direction.LOAD, error)
            return True
        if layers is not None and self.layer_loads is not None:
            self.layer_loads.add(job_id)
        return accepted

    def get_finished(self) -> list[Any]:
        """vLLM's TransferResult of each job that ended since the last call, each job once.

        Raises RuntimeError where the device is lost.
        """
        reports = [_ended(job_id) for job_id in self._refused]
        self._refused.clear()
        while True:
            try:
                reports += self.transfers.get_finished()
                break
            except JobFailedError as failure:  # one at a time, and no report is lost by it
                _check_device(failure.__cause__)
                why = repr(failure.__cause__)
                self._note(failure.job_id, failure.direction, FailureKind.FAILED, why)
                reports.append(_ended(failure.job_id))
        for report in reports:
            self._sync.pop(report.job_id, None)
        self.num_reported += len(reports)
        return reports

    def take_failed(self) -> list[FailedJob]:
        """The jobs that failed, of those that were reported since the last call or will be next."""
        failed, self._failed = self._failed, []
        return failed

    def wait(self, job_ids: Collection[int]) -> None:
        """Block until these jobs have ended, but for the loads that layers wait for."""
        if self.layer_loads is not None:
            job_ids = set(job_ids) - self.layer_loads.jobs
        self.transfers.wait(job_ids)

    def shutdown(self) -> None:
        self._sync.clear()
        self._refused.clear()
        self._failed.clear()
        self.transfers.shutdown()

    def _refuse(self, job_id: int, direction: Direction, error: Exception) -> None:
        _check_device(error)
        self._refused.append(job_id)
        self._note(job_id, direction, FailureKind.REFUSED, repr(error))

    def _note(self, job_id: int, direction: Direction, kind: FailureKind, why: str) -> None:
        blocks = self._sync.get(job_id, ())
        if blocks:
            kind = FailureKind.SYNC
        self._failed.append(FailedJob(job_id, direction, kind, blocks))
        self.survived[direction, kind] += 1
        if self.survived[direction, kind] == 1:
            _log.warning(
                "KV offloading: %s %d failed (%s): %s; told once, and counted in "
                "triton_offload_survived; `triton-offload doctor` says whether the device works",
                direction.value,
                job_id,
                why,
                _COST[direction],
            )


_COST = {
    Direction.STORE: "its chunks are not kept",
    Direction.LOAD: "its request is recomputed, and its chunks are dropped",
}


def _ended(job_id: int) -> Any:
    return vllm_base.TransferResult(job_id=job_id, success=True)


def _check_device(error: BaseException | None) -> None:
    if isinstance(error, DeviceLostError):
        raise RuntimeError(
            f"KV offloading: the device is lost ({error}); neither transfers nor the model can go "
            "on with it: restart the engine"
        ) from error
