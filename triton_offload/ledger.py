"""The jobs of an offloader: which transfers each has, and which stores each follows."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from triton_offload.job import OffloadJob
from triton_offload.medium import ChunkSpec
from triton_offload.scheduler.policies import Key
from triton_offload.specs import Direction, TransferResult, TransferStatus
from triton_offload.stats import DirectionTotals

_log = logging.getLogger(__name__)

# Results that nobody asks for: of a program that only waits, the latest are kept.
_MAX_UNREAD = 1 << 16


@dataclass(slots=True, eq=False)
class Entry:
    """A job under way.

    `keys`: the chunks that it moves. `transfers`: those that have not ended, `parts`: how the
    others did. `follows`: jobs that are storing chunks which this one names too; of each it needs
    the bytes which that one moves itself, and no more, so that whom that one follows is nothing to
    this one. `followed_by`: the same, from the other side. `error`: why what it follows failed.
    `chunks`: what an export or import has handed to the medium's worker.
    """

    job: OffloadJob
    keys: list[Key]
    slots: list[int]  # of those
    transfers: set[int] = field(default_factory=set)
    parts: list[TransferResult] = field(default_factory=list)
    follows: dict[Entry, None] = field(default_factory=dict)
    followed_by: dict[Entry, None] = field(default_factory=dict)
    moved: bool = False  # all of its own bytes have, or never will
    error: BaseException | None = None
    chunks: ChunkSpec | None = None


class JobLedger:
    """Every job from its submission to its result. Its user holds a lock.

    A call costs O(its jobs, keys and transfers), however many others are under way.
    """

    def __init__(self) -> None:
        self.totals = {direction: DirectionTotals() for direction in Direction}
        #: of exports (LOAD) and imports (STORE)
        self.medium_totals = {direction: DirectionTotals() for direction in Direction}
        self._entries: dict[OffloadJob, Entry] = {}
        self._of_transfer: dict[int, Entry] = {}
        self._cancelled: set[int] = set()  # transfers of reported jobs that are not reported yet
        self._storing: dict[Key, Entry] = {}  # the job that moves the chunk
        self._finished: deque[TransferResult] = deque(maxlen=_MAX_UNREAD)
        self._watched = False  # somebody takes results, and would miss those that are dropped
        self._told = False  # that some were

    @property
    def entries(self) -> list[Entry]:
        """Those under way, the oldest first."""
        return list(self._entries.values())

    @property
    def awaits_any(self) -> bool:
        """Whether a transfer is not reported yet."""
        return bool(self._of_transfer or self._cancelled)

    def open(self, entry: Entry, follows: Iterable[Key] = ()) -> None:
        """Note a job whose transfers are submitted; it ends no sooner than the stores under way of
        the chunks `follows`."""
        self._entries[entry.job] = entry
        self._of_transfer.update(dict.fromkeys(entry.transfers, entry))
        for key in follows:
            other = self._storing.get(key)
            if other is not None:
                entry.follows[other] = None
                other.followed_by[entry] = None
        if entry.job.direction is Direction.STORE:
            self._storing.update(dict.fromkeys(entry.keys, entry))

    def take(self, result: TransferResult) -> Entry | None:
        """Note the end of a transfer; the job's entry where it was the last."""
        if result.job_id in self._cancelled:
            self._cancelled.remove(result.job_id)
            return None
        entry = self._of_transfer.pop(result.job_id)
        entry.transfers.discard(result.job_id)
        entry.parts.append(result)
        return None if entry.transfers else entry

    def moved(self, entry: Entry) -> None:
        """All of a job's own transfers have ended: report it, and those that followed it."""
        entry.moved = True
        for key in entry.keys if entry.job.direction is Direction.STORE else ():
            if self._storing.get(key) is entry:
                del self._storing[key]
        bad = failure(entry.parts) if entry.followed_by else None
        for follower in entry.followed_by:
            del follower.follows[entry]
            if bad is not None and follower.error is None:
                follower.error = bad.error or RuntimeError(
                    f"job {entry.job.job_id}, which was storing some of its chunks, "
                    f"was {bad.status.value}"
                )
            if follower.moved and not follower.follows:
                self._report(follower)
        entry.followed_by.clear()
        if not entry.follows:
            self._report(entry)

    def cancelled(self, entry: Entry) -> None:
        """None of a job's transfers will ever start, and it follows no other any more."""
        for transfer in entry.transfers:
            del self._of_transfer[transfer]
        self._cancelled |= entry.transfers
        entry.transfers.clear()
        entry.parts.append(TransferResult(entry.job.job_id, TransferStatus.CANCELLED))
        for other in entry.follows:
            del other.followed_by[entry]
        entry.follows.clear()

    def entry_of(self, job: OffloadJob) -> Entry | None:
        return self._entries.get(job)

    def take_finished(self) -> list[TransferResult]:
        """The results since the last call; of those that nobody took, the latest 65,536."""
        self._watched = True
        taken = list(self._finished)
        self._finished.clear()
        return taken

    def _report(self, entry: Entry) -> None:
        job, result = entry.job, _joined(entry)
        del self._entries[job]
        totals = self.totals if entry.chunks is None else self.medium_totals
        totals[job.direction].add(result)
        dropped = len(self._finished) == self._finished.maxlen
        self._finished.append(result)
        job._end(result)
        if dropped and self._watched and not self._told:
            self._told = True
            _log.warning(
                "results of jobs were dropped: more than %d ended since the last call of "
                "get_finished, and the latest are kept; call it more often, or never and wait for "
                "jobs",
                self._finished.maxlen,
            )

    def _check(self) -> None:
        """Asserts that jobs, transfers and keys belong together."""
        for job, entry in self._entries.items():
            assert entry.job is job
            assert job._result is None
            assert job._owner is not None
            assert entry.moved == (not entry.transfers), "a job that moved nothing more is open"
            assert not entry.moved or entry.follows, "a job that ended was not reported"
            assert all(self._of_transfer[transfer] is entry for transfer in entry.transfers)
            assert all(entry in other.followed_by and not other.moved for other in entry.follows)
            assert all(entry in other.follows for other in entry.followed_by)
        assert all(entry.job in self._entries for entry in self._of_transfer.values())
        assert self._cancelled.isdisjoint(self._of_transfer)
        assert sum(len(e.transfers) for e in self._entries.values()) == len(self._of_transfer)
        for key, entry in self._storing.items():
            assert key in entry.keys
            assert not entry.moved, "a job that ended is still storing"


def _joined(entry: Entry) -> TransferResult:
    """How a job ended, of the results of its parts."""
    job_id, parts = entry.job.job_id, entry.parts
    if len(parts) == 1 and entry.error is None:
        part = parts[0]
        return TransferResult(
            job_id,
            part.status,
            part.num_bytes,
            part.seconds,
            part.error,
            part.bytes_by_path,
            part.queue_seconds,
        )
    bad = failure(parts)
    if bad is not None:
        return replace(bad, job_id=job_id)
    if entry.error is not None:
        return TransferResult(job_id, TransferStatus.FAILED, error=entry.error)
    return TransferResult(
        job_id,
        TransferStatus.SUCCESS,
        sum([part.num_bytes for part in parts]),
        sum([part.seconds for part in parts]),
        bytes_by_path=_by_path(parts),
        queue_seconds=min([part.queue_seconds for part in parts], default=0.0),
    )


def _by_path(parts: Sequence[TransferResult]) -> tuple[tuple[str, int], ...]:
    if len(parts) == 1:
        return parts[0].bytes_by_path
    total = Counter[str]()
    for part in parts:
        total.update(dict(part.bytes_by_path))
    return tuple(total.items())


def failure(parts: Sequence[TransferResult]) -> TransferResult | None:
    """How a job ended of which not every part moved its bytes: cancelled if every part was."""
    failed = [part for part in parts if part.status is TransferStatus.FAILED]
    cancelled = [part for part in parts if part.status is TransferStatus.CANCELLED]
    if failed or not cancelled:
        return failed[0] if failed else None
    if len(cancelled) == len(parts):
        return cancelled[0]
    error = RuntimeError("a part of the job was cancelled")
    return replace(cancelled[0], status=TransferStatus.FAILED, error=error)
