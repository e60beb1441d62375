"""Virtual host and device: what runs next, what the host waits for, who knows of what."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

import numpy as np

from triton_offload.errors import DeviceLostError
from triton_offload.testing.background import Background
from triton_offload.testing.faults import Faults
from triton_offload.testing.places import IdMemory, Places
from triton_offload.testing.races import Cells, Clock, RaceChecker
from triton_offload.testing.schedule import (
    Engine,
    Operation,
    Order,
    RandomOrder,
    Record,
    Schedule,
    Stream,
    TimeOrder,
    earliest_start,
)

_HOST = 0  # the host's line in vector clocks
_FOREVER = float("inf")
# How likely it is that the device gets on between two calls of the host.
_EAGERNESS = (0.0, 0.3, 0.6, 0.9)
_KEPT = 2000  # events of the trace
_PATIENCE = 3000  # sleeps, or calls of background functions, in which no operation runs


class Stuck(BaseException):
    """The host waits for what will never happen.

    Not an Exception: code under test that survives those would wait for ever.
    """


class Simulation:
    """One host and one device in virtual time. All of it runs on the caller's thread.

    `num_blocked` counts calls that should only have queued, but blocked the host. `num_queued`
    counts operations by kind and stream.
    """

    def __init__(
        self, seed: int, *, timing_only: bool, max_queued: int, call_seconds: float
    ) -> None:
        self.seed = seed
        self.timing_only = timing_only
        self.rng = random.Random(seed)
        self.faults = Faults()
        self.races = RaceChecker()
        self.places = Places(self.races)
        self.trace: deque[tuple[str, object]] = deque(maxlen=_KEPT)
        self.schedule = Schedule(self._order())
        self.tasks: list[Background] = []
        self.streams: list[Stream] = []
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.num_queued: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.num_blocked = 0
        self.in_task = False
        self.now = 0.0
        self.lost: DeviceLostError | None = None
        self._max_queued = max_queued
        self._call_seconds = call_seconds
        self._eagerness = self.rng.choice(_EAGERNESS)
        self._number = 0
        self._idle_sleeps = 0
        self._run_before = 0
        self._num_lines = 1
        self._host_clock = self.races.new_clock()
        self._host_learned = 0  # counts changes of the host's clock
        self.legacy = self.open_stream("legacy")

    def reseed(self, seed: int) -> None:
        self.seed = seed
        self.rng.seed(seed)
        self.schedule.order = self._order()
        self._eagerness = self.rng.choice(_EAGERNESS)

    # -- the host --

    def note_call(self, call: str, *, though_lost: bool = False) -> None:
        """Every call of the seam begins here."""
        self.calls[call] += 1
        if self.faults.armed:
            self.faults.call(call)
        if self.lost is not None and not though_lost:
            raise self.lost

    def enter(self, call: str, *, though_lost: bool = False) -> None:
        """... and those that reach the device here: it may have got on meanwhile."""
        self.note_call(call, though_lost=though_lost)
        self.now += self._call_seconds
        if self.timing_only:
            while self._step_before(self.now, tasks=False):
                pass
        elif self._eagerness:
            ready, eagerness, draw = self.schedule.ready, self._eagerness, self.rng.random
            while ready and draw() < eagerness:
                self._run_next()

    def sleep(self, seconds: float) -> None:
        """Let everything else go on for so long. Raises Stuck where the host sleeps on and on, and
        no operation runs."""
        until = self.now + seconds
        self._idle_sleeps = 0 if self.schedule.num_run > self._run_before else self._idle_sleeps + 1
        self._run_before = self.schedule.num_run
        if self._idle_sleeps > _PATIENCE:
            self._stuck("the host sleeps")
        if self.timing_only:
            while self._step_before(until):
                pass
        else:
            for _ in range(1 + self.rng.randrange(4)):
                self._step(tasks=True)
        self.now = max(self.now, until)

    def drain(self) -> None:
        """Run every operation that can run."""
        while self.schedule.ready:
            self._step()

    def block_until(
        self,
        operation: Operation,
        what: str,
        timeout: float | None = None,
        *,
        tasks: bool = True,
    ) -> None:
        """Let everything else go on until the operation is done; without `tasks` the device only,
        where the caller may hold a lock. Raises TimeoutError after `timeout` virtual seconds,
        Stuck where it will never be."""
        deadline = _FOREVER if timeout is None else self.now + timeout
        idle = 0
        while not operation.done:
            before = self.schedule.num_run
            if self.timing_only:
                moved = self._step_before(deadline, tasks=tasks)
            else:
                moved = self.now < deadline and self._step(tasks=tasks)
            idle = 0 if self.schedule.num_run > before else idle + 1
            if self.lost is not None:
                raise self.lost
            if timeout is not None and (not moved or idle > 100):
                self._give_up(what, deadline, timeout)
            if not moved or idle > _PATIENCE:
                self._stuck(what)
        if self.timing_only:
            if timeout is not None and operation.end > deadline:
                self._give_up(what, deadline, timeout)
            while self._step_before(operation.end, tasks=tasks):
                pass
        self.now = max(self.now, operation.end)

    def end_hung(self) -> None:
        for operation in self.faults.hung:
            operation.hangs = False
            self.schedule.offer(operation)
        self.faults.hung.clear()

    def learn(self, record: Record) -> None:
        """The host saw the record reached."""
        self._join(self._host_clock, record.clock)
        self._host_learned += 1
        self.now = max(self.now, record.operation.end)

    def drained(self, stream: Stream) -> None:
        """The host saw that all of the stream has run."""
        clock = self.knowledge(stream).copy()
        if stream.last is not None:
            clock[stream.index] = stream.last.number
        self._join(self._host_clock, clock)
        self._host_learned += 1

    def host_access(self, name: str, reads: Sequence[Cells], writes: Sequence[Cells]) -> None:
        """The host itself touches bytes now."""
        self._number += 1
        subject = f"#{self._number} {name} by the host"
        self.races.access(self._number, subject, _HOST, self._host_clock, reads, writes)
        self._host_learned += 1

    def read_ids(self, operation: Operation, ids: IdMemory, first: int, end: int) -> None:
        """A kernel that is to be queued reads ids; the host must not have written over those that
        another one was to read."""
        known = self._host_clock
        readers = [
            reader for reader in ids.readers if known[reader[2].stream.index] < reader[2].number
        ]
        changed = ids.changed(first, end)
        if changed is not None:
            for begin, stop, kernel in readers:
                if changed[max(0, begin - first) : max(0, stop - first)].any():
                    self.races.report_ids(kernel, operation)
        readers.append((first, end, operation))
        ids.readers = readers

    def history(self, last: int | None = None) -> str:
        """The last events, a line each; None: all that are kept."""
        events = list(self.trace)
        if last is not None:
            events = events[-last:]
        return "\n".join(f"{kind:>7} {subject}" for kind, subject in events)

    # -- the device --

    def open_stream(self, name: str, *, blocking: bool = False) -> Stream:
        stream = Stream(name, self._num_lines, self.races.new_clock(), blocking)
        self._num_lines += 1
        if self.races.make_room(self._num_lines):
            self._host_clock = self._fit(self._host_clock)
            for other in (*self.streams, stream):
                other.clock = self._fit(other.clock)
        self.streams.append(stream)
        return stream

    def operation(self, kind: str, stream: Stream, detail: object = "") -> Operation:
        if stream.closed:
            raise RuntimeError(f"stream: expected an open one, got {stream}")
        self._number += 1
        return Operation(self._number, kind, stream, self.now, detail)

    def queue(
        self,
        operation: Operation,
        *,
        reads: Sequence[Cells] = (),
        writes: Sequence[Cells] = (),
        run: Callable[[], object] | None = None,
        flip: Callable[[], object] | None = None,
        engine: Engine | None = None,
        seconds: float = 0.0,
    ) -> Operation:
        """Queue work that touches these bytes."""
        operation.engine, operation.seconds, operation.flip = engine, seconds, flip
        stream = operation.stream
        self.num_queued[operation.kind, stream.name] += 1
        operation.run = operation.run or (None if self.timing_only else run)
        if self.faults.armed:
            self.faults.arm(operation, self._lose)
        self.submit(operation)
        if not self.timing_only:
            number, clock = operation.number, self.knowledge(stream)
            self.races.access(number, operation, stream.index, clock, reads, writes)
        return operation

    def record(self, stream: Stream) -> Record:
        operation = self.operation("record", stream)
        clock = self.knowledge(stream).copy()
        clock[stream.index] = operation.number
        record = Record(operation, clock)
        operation.record = record
        self.submit(operation)
        return record

    def wait(self, stream: Stream, record: Record) -> None:
        self._join(self.knowledge(stream), record.clock)
        operation = self.operation("wait", stream, record.operation)
        self.submit(operation, (record.operation,))

    def submit(self, operation: Operation, follows: Sequence[Operation] = ()) -> None:
        stream, room = operation.stream, self._max_queued - operation.entries
        if stream.pending > room:
            self.num_blocked += 1
            while stream.pending > max(0, room):  # what never fits goes in as its stream drains
                self._step_or_stuck(f"{stream} is full")
        if stream.blocking or stream is self.legacy:
            follows = (*follows, *self._synchronised(stream))
        self.trace.append(("queue", operation))
        self.schedule.submit(operation, follows)

    def knowledge(self, stream: Stream) -> Clock:
        """What the stream's next operation knows to be over; the host's knowledge included."""
        if stream.learned != self._host_learned:
            stream.learned = self._host_learned
            np.maximum(stream.clock, self._host_clock, out=stream.clock)
        return stream.clock

    def _order(self) -> Order:
        return TimeOrder() if self.timing_only else RandomOrder(self.rng)

    def _synchronised(self, stream: Stream) -> list[Operation]:
        """What the legacy stream makes an operation follow."""
        others = [self.legacy]
        if stream is self.legacy:
            others = [other for other in self.streams if other.blocking]
        clock = self.knowledge(stream)
        for other in others:
            np.maximum(clock, other.clock, out=clock)
        return [other.last for other in others if other.last is not None]

    def _fit(self, clock: Clock) -> Clock:
        missing = len(self.races.new_clock()) - len(clock)
        return np.append(clock, np.zeros(missing, dtype=np.int32)) if missing else clock

    @staticmethod
    def _join(clock: Clock, other: Clock) -> None:
        """`clock` knows what `other` knows, which may be from before there were as many lines."""
        mine = clock if len(other) == len(clock) else clock[: len(other)]
        np.maximum(mine, other, out=mine)

    def _step(self, *, tasks: bool = False) -> bool:
        """Run one operation, or with `tasks` perhaps a call of a background function."""
        ready = self.schedule.ready
        if tasks and self.tasks:
            due = [task for task in self.tasks if task.due]
            if due and (not ready or self.rng.random() < 0.1):
                self._run_task(due[self.rng.randrange(len(due))])
                return True
        if not ready:
            return False
        self._run_next()
        return True

    def _step_before(self, until: float, *, tasks: bool = True) -> bool:
        """Run what comes first by virtual time, if that is at `until` or before."""
        ready = self.schedule.ready
        start = min(map(earliest_start, ready)) if ready else _FOREVER
        if tasks:
            due = [task for task in self.tasks if task.due and task.at <= min(start, until)]
            if due:
                task = min(due, key=lambda task: task.at)
                self.now = max(self.now, task.at)
                self._run_task(task)
                return True
        if start > until or not ready:
            return False
        self._run_next()
        return True

    def _run_next(self) -> None:
        operation = self.schedule.step()
        self.trace.append(("run", operation))
        record = operation.record
        if record is not None:
            record.failure, operation.stream.failure = operation.stream.failure, None

    def _run_task(self, task: Background) -> None:
        self.trace.append(("thread", task.name))  # which must not keep what it calls alive
        self.in_task = True
        try:
            task.run(lambda: self.now)
        finally:
            self.in_task = False

    def _step_or_stuck(self, what: str) -> None:
        moved = self._step_before(_FOREVER, tasks=False) if self.timing_only else self._step()
        if not moved:
            self._stuck(what)

    def _give_up(self, what: str, deadline: float, timeout: float) -> None:
        self.now = max(self.now, deadline)
        raise TimeoutError(f"{what} within {timeout} s")

    def _stuck(self, what: str) -> None:
        raise Stuck(f"{what}, and nothing can run (seed {self.seed})\n{self.history(40)}")

    def fail(self, operation: Operation, error: Exception) -> None:
        """Let an operation that is to be queued fault, when it runs, and take the device along."""

        def run() -> None:
            self._lose(error)
            raise error

        operation.run = run

    def _lose(self, error: BaseException) -> None:
        """A fault that nothing queued survives."""
        self.lost = DeviceLostError(str(error))
        self.lost.__cause__ = error
        self.schedule.lost = True
