"""What happened in a simulation, for a reader."""

from __future__ import annotations

from collections import deque

_KEPT = 2000


class Trace:
    """The last events; they become text when somebody asks."""

    def __init__(self) -> None:
        self._events: deque[tuple[str, object]] = deque(maxlen=_KEPT)

    def note(self, kind: str, subject: object) -> None:
        self._events.append((kind, subject))

    def text(self, last: int | None = None) -> str:
        events = list(self._events)
        if last is not None:
            events = events[-last:]
        return "\n".join(f"{kind:>7} {subject}" for kind, subject in events)
