"""A device for transfers with memory that is not pinned, whose calls block nobody who submits.

A copy from or to pageable memory returns only when its stream has got there, which may be as long
as the engine computes. Here a stream's calls are made by a thread of its own from such a copy on,
in their order, until it has made them all; before and after, by whoever submits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from triton_offload.device.base import Background, Device, Event, Stream

_POLL_SECONDS = 0.0005

# A call of the device: False where its turn has not come.
_Call = Callable[[], bool]


class _Record:
    """One record of an event. `made`: the device knows of it. `failure`: what a deferred call
    on its stream raised before it; `number`: it is so many records since that."""

    __slots__ = ("event", "failure", "made", "number", "stream")

    def __init__(self, event: Event, stream: _Stream | None) -> None:
        self.event = event  # None: there is none, and its stream is drained
        self.stream = stream
        self.made = False
        self.failure: BaseException | None = None
        self.number = 0


class _Event:
    """Bound to its latest record; None: never recorded."""

    __slots__ = ("latest", "timed")

    def __init__(self, timed: bool) -> None:
        self.timed = timed
        self.latest: _Record | None = None


class _Stream:
    """A stream of the device, and what is to be called on it. One thread at a time submits.

    A call that failed may be a wait. So none is made any more but records, until `query` has told
    whoever submits of every job that lacks a call: its later segments would run without a wait.
    """

    def __init__(self, device: Device, name: str, stream: Stream) -> None:
        self.stream = stream
        self.calls: deque[_Call] = deque()
        self.failure: BaseException | None = None
        self.skipped = False  # a call, since the last record
        self.num_failed = self.num_told = 0  # records since the failure
        self.drained = False
        self._device = device
        self._name = name
        self._thread: Background | None = None

    def defer(self, call: _Call) -> None:
        self.calls.append(call)
        if self._thread is None:
            self._thread = self._device.background(f"{self._name}-calls", self._step)
        self._thread.wake()

    def wake(self) -> None:
        if self._thread is not None:
            self._thread.wake()

    def close(self) -> None:
        while self.calls:
            self._device.sleep(_POLL_SECONDS)
        if self._thread is not None:
            self._thread.stop()
        self.drain()

    def drain(self) -> None:
        """Close it, where no event can tell when it is done; no more is called there."""
        if not self.drained:
            self._device.close_stream(self.stream)
            self.drained = True

    def may_call(self) -> bool:
        self.skipped = self.failure is not None
        return not self.skipped

    def forgive(self) -> None:
        """Begin anew where everybody was told."""
        if self.calls or self.skipped or self.drained:
            return
        if 0 < self.num_failed == self.num_told:
            self.failure = None
            self.num_failed = self.num_told = 0

    def _step(self) -> None:
        """Until a call's turn has not come. A call stays in the queue while it is made."""
        while self.calls:
            try:
                if not self.calls[0]():
                    return
            except Exception as error:  # records hand it to whoever asks
                self.failure = error
            self.calls.popleft()


class Deferred:
    """`device`, but for its streams and events: see `device.base.Device` for what they do.

    `blocks`: whether a copy would block its caller now. What a deferred call raises is raised by
    `query` and `synchronize` of the first event that is recorded on its stream after it.
    """

    def __init__(self, device: Device, blocks: Callable[[], bool]) -> None:
        self._device = device
        self._blocks = blocks
        self._streams: list[_Stream] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    # -- streams and events --

    def new_stream(self, name: str, *, high_priority: bool = False) -> _Stream:
        real = self._device.new_stream(name, high_priority=high_priority)
        stream = _Stream(self._device, name, real)
        self._streams.append(stream)
        return stream

    def close_stream(self, stream: _Stream) -> None:
        stream.close()
        self._streams.remove(stream)

    def new_event(self, *, timed: bool = False) -> _Event:
        return _Event(timed)

    def record(self, event: _Event, stream: Stream) -> None:
        """`stream`: one of these, or of the device's own."""
        ours = stream if isinstance(stream, _Stream) else None
        record = _Record(self._device.new_event(timed=event.timed), ours)
        if ours is not None and ours.failure is not None:
            ours.forgive()
        if ours is not None and (ours.calls or ours.drained):
            ours.defer(lambda: self._record(record, ours))
        else:
            self._device.record(record.event, stream if ours is None else ours.stream)
            self._made(record)
        event.latest = record

    def wait(self, stream: Stream, event: _Event) -> None:
        """Of a stream of the device's own, only for what `is_recorded`."""
        record = event.latest
        if record is None:
            return
        if not isinstance(stream, _Stream):
            if record.event is not None:
                self._device.wait(stream, record.event)
            return

        if record.made and record.event is not None and not (stream.calls or stream.failure):
            self._device.wait(stream.stream, record.event)
            return

        def call() -> bool:
            if record.made and stream.may_call() and record.event is not None:
                self._device.wait(stream.stream, record.event)
            return record.made

        self._call(stream, call, deferred=not record.made)

    def is_recorded(self, event: Event) -> bool:
        """Whether the device knows of the event's latest record."""
        return event.latest is None or event.latest.made

    def query(self, event: _Event) -> bool:
        record = event.latest
        if record is None:
            return True
        if not record.made or (record.event is not None and not self._device.query(record.event)):
            return False
        if record.failure is not None:
            if record.stream is not None:
                record.stream.num_told = max(record.stream.num_told, record.number)
            raise record.failure
        return True

    def synchronize(self, event: _Event, timeout: float | None) -> None:
        record = event.latest
        if record is None:
            return
        deadline = None if timeout is None else self._device.monotonic() + timeout
        while not record.made:
            if deadline is not None and self._device.monotonic() >= deadline:
                raise TimeoutError(f"the event was not reached within {timeout} s")
            self._device.sleep(_POLL_SECONDS)
        if record.event is not None:
            left = None if deadline is None else max(0.0, deadline - self._device.monotonic())
            self._device.synchronize(record.event, left)
        if record.failure is not None:  # whoever submits may not know yet
            raise record.failure

    def elapsed(self, start: _Event, end: _Event) -> float:
        if start.latest is None or end.latest is None:
            raise RuntimeError("start, end: expected recorded events")
        return self._device.elapsed(start.latest.event, end.latest.event)

    # -- work --

    def copy(self, dst: Any, src: Any, stream: _Stream) -> None:
        self._work(self._device.copy, (dst, src), stream, deferred=self._blocks())

    def copy_batch(self, dst: Any, src: Any, sizes: Any, stream: _Stream) -> None:
        self._work(self._device.copy_batch, (dst, src, sizes), stream, deferred=self._blocks())

    def fill_zero(self, buffer: Any, stream: _Stream) -> None:
        self._work(self._device.fill_zero, (buffer,), stream)

    def gather(self, *operands: Any, **options: Any) -> None:
        *first, stream = operands
        self._work(self._device.gather, first, stream, **options)

    def scatter(self, *operands: Any, **options: Any) -> None:
        *first, stream = operands
        self._work(self._device.scatter, first, stream, **options)

    # -- inside --

    def _work(
        self,
        function: Callable[..., None],
        operands: Any,
        stream: _Stream,
        *,
        deferred: bool = False,
        **options: Any,
    ) -> None:
        if not (deferred or stream.calls or stream.failure):  # a pinned pool's, nearly always
            function(*operands, stream.stream, **options)
            return

        def call() -> bool:
            if stream.may_call():
                function(*operands, stream.stream, **options)
            return True

        self._call(stream, call, deferred=deferred)

    def _call(self, stream: _Stream, call: _Call, *, deferred: bool = False) -> None:
        """At once, unless something before it on the stream was deferred."""
        stream.forgive()
        if deferred or stream.calls:
            stream.defer(call)
        else:
            call()

    def _record(self, record: _Record, stream: _Stream) -> bool:
        try:
            if not stream.drained:
                self._device.record(record.event, stream.stream)
        except Exception as error:
            stream.failure = stream.failure or error
            stream.drain()
        if stream.drained:
            record.event = None
        self._made(record)
        for other in tuple(self._streams):  # one that waits for it
            other.wake()
        return True

    def _made(self, record: _Record) -> None:
        stream = record.stream
        if stream is not None and stream.failure is not None:
            stream.num_failed += 1
            record.failure, record.number = stream.failure, stream.num_failed
            stream.skipped = False
        record.made = True
