"""A host device whose operations can be made to fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from triton_offload.device.host import HostDevice


class FaultyDevice(HostDevice):
    """A host device on which so many more of each operation fail while they run."""

    def __init__(self) -> None:
        super().__init__()
        self.faults = Counter[str]()
        self.fault: Callable[[], None] = fail  # what an operation does in its place

    def _maybe_fail(self, kind: str, stream: Any) -> None:
        if self.faults[kind] > 0:
            self.faults[kind] -= 1
            stream.put(self.fault)

    def gather(self, *args: Any, **kwargs: Any) -> None:
        self._maybe_fail("gather", args[5])
        super().gather(*args, **kwargs)

    def scatter(self, *args: Any, **kwargs: Any) -> None:
        self._maybe_fail("scatter", args[5])
        super().scatter(*args, **kwargs)


def fail(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("injected: the link is down")
