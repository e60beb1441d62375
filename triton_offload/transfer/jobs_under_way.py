"""The jobs of all lanes from submission to end, and whom a job on some slots comes after."""

from __future__ import annotations

from triton_offload.slabs import Slabs
from triton_offload.specs import Ids
from triton_offload.transfer.job import Job
from triton_offload.transfer.lanes import LANES
from triton_offload.transfer.last_jobs import LastJobs


class JobsUnderWay:
    """Every job that a lane has and that has not ended. Its user holds the lock."""

    def __init__(self, slabs: Slabs) -> None:
        self._last_jobs = LastJobs(LANES, slabs)
        self._of_lane: dict[str, dict[int, Job]] = {name: {} for name in LANES}  # by sequence

    def __contains__(self, job: Job) -> bool:
        return self._of_lane[job.lane].get(job.sequence) is job

    def of(self, lane: str | None = None) -> list[Job]:
        """Those of a lane, in their order; None: of all lanes."""
        names = LANES if lane is None else (lane,)
        return [job for name in names for job in self._of_lane[name].values()]

    def before(self, lane: str, slot_ids: Ids) -> list[Job]:
        """Ordering rule 6: those that must be done with these slots before a job of the lane."""
        after: list[Job] = []
        if len(slot_ids) == 0:
            return after
        self._last_jobs.use(slot_ids)
        for other in LANES if lane == "store" else ("store",):
            under_way = self._of_lane[other]
            if under_way:
                job = under_way.get(self._last_jobs.on(other, slot_ids))
                if job is not None:
                    after.append(job)
        return after

    def add(self, job: Job, slot_ids: Ids) -> None:
        """A lane has accepted a job on these slots, for which `before` was asked."""
        self._last_jobs.note(job.lane, slot_ids, job.sequence)
        self._of_lane[job.lane][job.sequence] = job

    def remove(self, job: Job) -> None:
        """It has ended."""
        del self._of_lane[job.lane][job.sequence]

    def _check(self, lane: str, sequence: int) -> None:
        """Asserts that no job is noted that the lane, at this number, has not had."""
        self._last_jobs._check(lane, sequence)
