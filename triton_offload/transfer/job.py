"""A job on its way through a lane: what is known of it, what it is made of, what is queued."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from triton_offload.calibration import Path
from triton_offload.device.base import Event
from triton_offload.specs import Direction, TransferResult
from triton_offload.transfer.checksums import RunSums
from triton_offload.transfer.layout import GroupRun
from triton_offload.transfer.segment import Gate, Queued, Segment


@dataclass(slots=True, eq=False)
class Job:
    """One transfer, from submission to its report.

    `lane`: its name. `sequence`: its number among the lane's jobs. `compute`: what was queued on
    the engine's stream at submission. `after`: jobs of other lanes on the same slots. `started`:
    something of it may be queued. `start`: None where it could not be marked, and the job is not
    timed. `submitted`, `queue_seconds`: when (the device's clock), and how long it then waited
    for its first segment. `by_path`: bytes of the segments queued whole. `run_of_layer`: of a load
    by layers, the run after which each layer's pages are there; `landed`: an event after each run
    that is queued whole, in their order; `num_asked`: how many runs are to be queued by now;
    `computed`: the last run of the layer that was waited for last. `queued`: all of it is queued,
    or it has failed. `finished`: nothing of it touches a page or a slot any more, `result` says how
    it ended, and it keeps neither ids nor events.

    Where bytes are added up: `sums`, of its segments that have ended; `before`, the jobs that had
    its slots before it, and that finish before it.
    """

    job_id: int
    direction: Direction
    lane: str
    sequence: int
    num_bytes: int
    runs: list[GroupRun]
    compute: Event | None
    after: list[Job]
    submitted: float | None
    queue_seconds: float = 0.0
    before: tuple[Job, ...] = ()
    sums: list[RunSums] = field(default_factory=list)
    by_path: dict[Path, int] = field(default_factory=dict)
    run_of_layer: tuple[int, ...] = ()
    landed: list[Event] = field(default_factory=list)
    num_asked: int = 0
    computed: int = -1
    planned: Iterator[Planned] | None = None
    held: Planned | None = None  # taken from `planned`, not queued yet
    pages: Gate | None = None
    slots: Gate | None = None
    start: Event | None = None
    end: Event | None = None
    last: Queued | None = None
    started: bool = False
    queued: bool = False
    finished: bool = False
    cancelled: bool = False
    error: BaseException | None = None
    result: TransferResult | None = None

    @property
    def released(self) -> Event | None:
        """Once all of it is queued: what its pages are the engine's after (ordering rule 3)."""
        # Of a job that failed, what came after its last whole segment may still touch them.
        return self.end if self.last is None or self.error is not None else self.last.released

    def released_after(self, layer: int | None) -> Event | None:
        """What the pages of a layer (None: all) are the engine's after; None while some of them
        have not been queued. Runs are queued in order: an event of one follows those before."""
        if layer is not None and self.run_of_layer[layer] < len(self.landed):
            return self.landed[self.run_of_layer[layer]]
        return self.released if self.queued else None

    def let_go(self) -> None:
        """Of what it moved, once it is finished: who keeps the job keeps its result alone."""
        self.runs, self.start, self.end, self.last = [], None, None, None
        self.landed.clear()
        self.before, self.sums = (), []

    def ask_for(self, layer: int | None) -> None:
        """The caller waits for a layer (None: for all): have its pages queued, and those of the
        layers after the one that it waited for before, which it computes meanwhile. So it comes to
        the first layer early, and finds the others queued when it comes to them."""
        if layer is None:
            self.num_asked = len(self.runs)
        elif not self.queued:
            after = self.run_of_layer[bisect_right(self.run_of_layer, self.computed) :][:1]
            self.computed = self.run_of_layer[layer]
            self.num_asked = max(self.num_asked, self.computed + 1, *(run + 1 for run in after))

    @property
    def has_all_asked_for(self) -> bool:
        """Whether of a load by layers no more is to be queued by now."""
        return bool(self.run_of_layer) and len(self.landed) >= self.num_asked


class Planned(NamedTuple):
    """What one segment is made of, and the path that it is to cross by."""

    path: Path
    run: GroupRun


@dataclass(slots=True)
class InFlight:
    """What the lane waits for next: a queued segment, or the end of a job (`ends`).

    `holds_ids`: the oldest ids in the ring are free when it is over. `summed`: the segment, where
    the host has its sums then.
    """

    job: Job
    events: tuple[Event, ...]
    done: Event
    num_ops: int
    num_bytes: int = 0
    holds_ids: bool = False
    summed: Segment | None = None
    ends: bool = False
