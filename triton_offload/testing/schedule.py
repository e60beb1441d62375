"""What is queued on the simulated device, and which of it runs next.

An operation may run when every operation that it follows has: its predecessor on the stream, and
the records that the stream was told to wait for. Any such operation may be next; an `Order`
chooses. Times are virtual: an operation starts when what it follows has ended and the engine that
it needs is free.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from triton_offload.testing.races import Clock


@dataclass(slots=True, eq=False)
class Stream:
    """A queue of operations that run in order. `index`: its component of every vector clock."""

    name: str
    index: int
    clock: Clock  # what its operations know to be over
    blocking: bool = False  # synchronises with the legacy stream
    learned: int = -1  # how much of the host's knowledge its clock holds
    last: Operation | None = None
    pending: int = 0
    closed: bool = False
    failure: BaseException | None = None  # since the last record that ran
    served: float = 0.0  # when a copy engine last served it

    def __repr__(self) -> str:
        return self.name


@dataclass(slots=True, eq=False)
class Engine:
    """Runs one operation at a time: the copy engine of one direction.

    CUDA promises nothing about whom it serves next. `queue`: where it serves first in, first out,
    all that is queued for it, in the order of submission; None where it serves streams in turn.
    """

    name: str
    queue: deque[Operation] | None = None
    free: float = 0.0
    busy: float = 0.0

    def serves(self, operation: Operation) -> bool:
        return self.queue is None or self.queue[0] is operation


@dataclass(slots=True, eq=False)
class Operation:
    """One thing that is queued on a stream.

    `number` counts operations in the order of submission. `run` moves the bytes; `record` is set
    where it is the record of an event. `reached` is the time at which all that it follows had
    ended; `start` and `end` are set when it runs. `entries`: what it takes of its stream's
    room. `flip`: flips a bit of what it has written, where a fault has it do so.
    """

    number: int
    kind: str
    stream: Stream
    submitted: float
    detail: object = ""
    run: Callable[[], object] | None = None
    flip: Callable[[], object] | None = None
    record: Record | None = None
    engine: Engine | None = None
    seconds: float = 0.0
    entries: int = 1
    waits_for: int = 0
    followers: list[Operation] = field(default_factory=list)
    done: bool = False
    hangs: bool = False
    reached: float = 0.0
    start: float = 0.0
    end: float = 0.0

    def __str__(self) -> str:
        detail = f" of {self.detail}" if self.detail else ""
        return f"#{self.number} {self.kind}{detail} on {self.stream.name}"


@dataclass(slots=True, eq=False)
class Record:
    """One record of an event, with what is over once it is reached."""

    operation: Operation
    clock: Clock
    failure: BaseException | None = None


class Order(Protocol):
    """Chooses among operations that may run."""

    def pick(self, ready: list[Operation]) -> int:
        """The index of the next one in `ready`, which is not empty."""


class RandomOrder:
    """Any order, by a seed.

    Uniform choices alone rarely delay one stream for long, which is what most faults need. So a
    seed also draws, half of the time, a rank for every stream, and the lowest goes first until
    the ranks are drawn anew.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._ranked = rng.random() < 0.5
        self._ranks: dict[int, float] = {}

    def pick(self, ready: list[Operation]) -> int:
        if len(ready) == 1:
            return 0
        rng = self._rng
        if not self._ranked:
            return int(rng.random() * len(ready))
        if rng.random() < 0.02:
            self._ranks.clear()
        best, rank = 0, 2.0
        for i, operation in enumerate(ready):
            mine = self._ranks.get(operation.stream.index)
            if mine is None:
                mine = self._ranks[operation.stream.index] = rng.random()
            if mine < rank:
                best, rank = i, mine
        return best


class TimeOrder:
    """The earliest first. Streams that want one copy engine are served in turn."""

    def pick(self, ready: list[Operation]) -> int:
        return min(range(len(ready)), key=lambda i: self._key(ready[i]))

    @staticmethod
    def _key(operation: Operation) -> tuple[float, float, int]:
        return earliest_start(operation), operation.stream.served, operation.number


def earliest_start(operation: Operation) -> float:
    engine = operation.engine
    return operation.reached if engine is None else max(operation.reached, engine.free)


class Schedule:
    """Operations that are queued, and those of them that may run."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.ready: list[Operation] = []
        self.num_run = 0
        self.num_submitted = 0
        self.lost = False  # nothing moves a byte any more

    def submit(self, operation: Operation, follows: Sequence[Operation]) -> None:
        """Queue behind the stream's last operation and those in `follows`."""
        stream = operation.stream
        operation.reached = operation.submitted
        before = stream.last
        if before is not None:
            self._follow(operation, before)
        for other in follows:
            self._follow(operation, other)
        stream.last = operation
        stream.pending += operation.entries
        self.num_submitted += 1
        if operation.engine is not None and operation.engine.queue is not None:
            operation.engine.queue.append(operation)
        self.offer(operation)

    def step(self) -> Operation:
        """Run the operation that the order picks; `ready` must not be empty."""
        ready = self.ready
        index = self.order.pick(ready)
        operation = ready[index]
        ready[index] = ready[-1]
        ready.pop()
        operation.start = earliest_start(operation)
        operation.end = operation.start + operation.seconds
        engine = operation.engine
        if engine is not None:
            engine.free = operation.end
            engine.busy += operation.seconds
            operation.stream.served = operation.end
        run, operation.run = operation.run, None
        if run is not None and not self.lost:
            try:
                run()
            except Exception as error:  # the next record of the stream hands it on
                operation.stream.failure = operation.stream.failure or error
        self._finish(operation)
        return operation

    @staticmethod
    def _follow(operation: Operation, before: Operation) -> None:
        if before.done:
            operation.reached = max(operation.reached, before.end)
        else:
            operation.waits_for += 1
            before.followers.append(operation)

    def _finish(self, operation: Operation) -> None:
        operation.done = True
        operation.stream.pending -= operation.entries
        self.num_run += 1
        for follower in operation.followers:
            follower.reached = max(follower.reached, operation.end)
            follower.waits_for -= 1
            self.offer(follower)
        operation.followers.clear()
        queue = None if operation.engine is None else operation.engine.queue
        if queue is not None:
            queue.remove(operation)
            if queue:
                self.offer(queue[0])

    def offer(self, operation: Operation) -> None:
        """Let it run where nothing keeps it back."""
        if operation.waits_for or operation.hangs:
            return
        if operation.engine is None or operation.engine.serves(operation):
            self.ready.append(operation)
