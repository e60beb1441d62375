"""A host device that a test can hold and make fail, and a world on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from oracle import World, random_pages

from triton_offload.calibration import Path
from triton_offload.device.host import HostDevice
from triton_offload.transfer.pipeline import PipelineOptions


class GatedDevice(HostDevice):
    """A host device whose gathers and scatters wait for `gate`, and fail where told to."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.fail_submission: set[str] = set()
        self.fail_running: set[str] = set()

    def _guard(self, kind: str, stream) -> None:
        if kind in self.fail_submission:
            raise RuntimeError(f"injected: {kind} could not be queued")
        failing = kind in self.fail_running

        def run() -> None:
            assert self.gate.wait(60)
            if failing:
                raise RuntimeError(f"injected: {kind} failed")

        stream.put(run)

    def gather(self, *args, **kwargs):
        self._guard("gather", args[5])
        super().gather(*args, **kwargs)

    def scatter(self, *args, **kwargs):
        self._guard("scatter", args[5])
        super().scatter(*args, **kwargs)

    def copy_batch(self, dst, src, sizes, stream):
        self._guard("copy_batch", stream)
        super().copy_batch(dst, src, sizes, stream)

    def copy(self, dst, src, stream):
        if "copy" in self.fail_submission:
            raise RuntimeError("injected: copy could not be queued")
        super().copy(dst, src, stream)


@contextmanager
def gated_world(device: GatedDevice, num_blocks: int = 16, **options: int) -> Iterator[World]:
    """Blocks of one page of 64 bytes, staged. At its end the gate is opened, whatever was held."""
    world = World.build(
        [random_pages(num_blocks, 64, 64, 0, 1)],
        num_slots=num_blocks,
        device=device,
        options=PipelineOptions(path=Path.STAGED, **options),
    )
    yield world
    device.gate.set()
    world.close()
