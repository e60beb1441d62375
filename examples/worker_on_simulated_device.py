"""A worker of your own, tried on the simulated device: right, and with a wait taken away.

    python examples/worker_on_simulated_device.py

The worker sends blocks to the memory of a peer, through one bounce buffer, on two streams. Each
seed is another order in which CUDA might run that. A wait that is missing is reported whatever the
bytes were: that a run went well is no proof.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from triton_offload.device.base import Device
from triton_offload.specs import GPULoadStoreSpec, LoadStoreSpec, TransferResult, TransferStatus
from triton_offload.testing import RaceError, SimulatedDevice
from triton_offload.transfer.queue_manager import OffloadingQueueManager
from triton_offload.transfer.worker import OffloadingWorker

BLOCKS, PAGE = 8, 32
NUM_SEEDS = 100


@dataclass(frozen=True)
class PeerSpec(LoadStoreSpec):
    rows: tuple[int, ...]


class PeerWorker(OffloadingWorker):
    """Copies `pages[block]` to `peer[row]`: both uint8 `[n, PAGE]` of the device.

    `forgets`: which wait is not there, to see that it is missed.
    """

    def __init__(
        self, device: Device, pages: torch.Tensor, peer: torch.Tensor, forgets: str = ""
    ) -> None:
        self._device, self._pages, self._peer, self._forgets = device, pages, peer, forgets
        self._reading, self._sending = device.new_stream("reading"), device.new_stream("sending")
        self._open = [self._reading, self._sending]
        self._bounce = device.empty(PAGE)
        self._jobs: dict[int, tuple[Any, int]] = {}  # the event of each, and its bytes

    def transfer_async(
        self,
        job_id: int,
        src: LoadStoreSpec,
        dst: LoadStoreSpec,
        *,
        expedited: bool = False,
        stream: Any = None,
    ) -> None:
        assert isinstance(src, GPULoadStoreSpec)
        assert isinstance(dst, PeerSpec)
        device = self._device
        if self._forgets != "the engine":
            # The pages are written by what the engine has queued up to now.
            self._follow(self._reading, stream or device.current_stream())
        for block, row in zip(src.block_ids.tolist(), dst.rows, strict=True):
            device.copy(self._bounce, self._pages[block], self._reading)
            if self._forgets != "the bounce buffer is full":
                self._follow(self._sending, self._reading)
            device.copy(self._peer[row], self._bounce, self._sending)
            if self._forgets != "the bounce buffer is free":
                self._follow(self._reading, self._sending)
        sent = device.new_event()
        device.record(sent, self._sending)
        self._jobs[job_id] = sent, PAGE * len(dst.rows)

    def _follow(self, stream: Any, other: Any) -> None:
        """What is queued on `stream` from now on runs after what is on `other` now."""
        event = self._device.new_event()
        self._device.record(event, other)
        self._device.wait(stream, event)

    def get_finished(self) -> list[TransferResult]:
        results = []
        for job_id, (event, num_bytes) in list(self._jobs.items()):
            if self._device.query(event):
                del self._jobs[job_id]
                results.append(TransferResult(job_id, TransferStatus.SUCCESS, num_bytes))
        return results

    def wait(self, job_ids: Iterable[int], timeout: float | None = None) -> None:
        for job_id in job_ids:
            if job_id in self._jobs:
                self._device.synchronize(self._jobs[job_id][0], timeout)

    def cancel(self, job_ids: Iterable[int]) -> set[int]:
        return set()  # all is queued at once

    def shutdown(self, timeout: float | None = None) -> None:
        self.wait(list(self._jobs), timeout)
        while self._open:
            self._device.close_stream(self._open.pop())


def send(seed: int, forgets: str) -> None:
    """One run; raises RaceError, or AssertionError for a wrong byte."""
    with SimulatedDevice(seed) as device:
        pages, peer = device.empty(BLOCKS * PAGE), device.empty(BLOCKS * PAGE)
        numbers = torch.Generator().manual_seed(seed)
        content = torch.randint(256, (BLOCKS * PAGE,), dtype=torch.uint8, generator=numbers)
        compute = device.current_stream()
        device.launch("attention", compute, writes=[pages], run=lambda: pages.copy_(content))
        rows = peer.view(BLOCKS, PAGE)
        queue = OffloadingQueueManager()
        worker = PeerWorker(device, pages.view(BLOCKS, PAGE), rows, forgets)
        queue.register_worker(GPULoadStoreSpec, PeerSpec, worker)
        job = queue.transfer_async(GPULoadStoreSpec([6, 1, 4]), PeerSpec((0, 5, 3)))
        queue.wait([job])
        (result,) = queue.get_finished()
        assert result.num_bytes == 3 * PAGE
        assert torch.equal(rows[[0, 5, 3]], content.view(BLOCKS, PAGE)[[6, 1, 4]]), "wrong bytes"
        queue.shutdown()


def seeds_that_fail(forgets: str) -> list[int]:
    failed = []
    for seed in range(NUM_SEEDS):
        try:
            send(seed, forgets)
        except (RaceError, AssertionError):
            failed.append(seed)
    return failed


def main() -> int:
    failed = seeds_that_fail("")
    print(f"the worker as it is: {len(failed)} of {NUM_SEEDS} seeds fail")
    ok = not failed
    for forgets in ("the engine", "the bounce buffer is full", "the bounce buffer is free"):
        failed = seeds_that_fail(forgets)
        print(f"without the wait for {forgets!r}: {len(failed)} of {NUM_SEEDS} seeds fail")
        ok = ok and bool(failed)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
