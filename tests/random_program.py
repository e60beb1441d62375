"""A program that is its own engine, and does at random what one does with an offloader."""

from __future__ import annotations

import itertools
import random
from contextlib import suppress

import torch

from triton_offload.errors import PoolFullError
from triton_offload.job import OffloadJob
from triton_offload.offloader import KVOffloader
from triton_offload.testing import SimulatedDevice


class RandomProgram:
    """Stores and loads chunks whose bytes tell their key."""

    def __init__(self, device: SimulatedDevice, pages: torch.Tensor, rng: random.Random) -> None:
        self.offloader: KVOffloader
        self._device = device
        self._pages = pages
        self._rng = rng
        self._jobs: list[tuple[OffloadJob, frozenset[int]]] = []  # and the blocks that it uses
        self._blocks = itertools.cycle(range(0, 16, 2))

    def step(self) -> None:
        draw, offloader = self._rng.random(), self.offloader
        keys = [bytes([i]) for i in self._rng.sample(range(1, 13), self._rng.randint(1, 2))]
        if draw < 0.45:
            self._store(keys)
        elif draw < 0.8:
            self._load([key for key in keys if offloader.lookup([key])])
        elif draw < 0.9:
            offloader.get_finished()
        elif draw < 0.95 and self._jobs:
            self._rng.choice(self._jobs)[0].block()
        elif draw > 0.98:
            offloader.reset()
        offloader._manager._check()

    def _store(self, keys: list[bytes]) -> None:
        blocks = self._take_blocks(len(keys))
        for key, block in zip(keys, blocks[::2], strict=True):
            self._write(block, key[0])
        if self._rng.random() < 0.1:
            self._device.faults.in_run(self._rng.choice(("gather", "copy")))
        with suppress(PoolFullError):
            self._jobs.append((self.offloader.store(keys, blocks), frozenset(blocks)))

    def _load(self, keys: list[bytes]) -> None:
        if not keys:
            return
        blocks = self._take_blocks(len(keys))
        job = self.offloader.load(keys, blocks)
        self._jobs.append((job, frozenset(blocks)))
        if self._rng.random() < 0.3:
            job.block()
            if job.result is not None and job.result.success:
                for key, block in zip(keys, blocks[::2], strict=True):
                    self._device.touch(reads=[self._pages[block : block + 2].view(-1)])
                    found = self._pages[block : block + 2]
                    assert (found == key[0]).all(), f"key {key[0]}: wrong bytes"

    def _take_blocks(self, num_chunks: int) -> list[int]:
        """The blocks that were used longest ago, once the jobs that use them are over."""
        firsts = [next(self._blocks) for _ in range(num_chunks)]
        blocks = [block for first in firsts for block in (first, first + 1)]
        for job, used in self._jobs:
            if not used.isdisjoint(blocks):
                job.block()
        self._jobs = [(job, used) for job, used in self._jobs if used.isdisjoint(blocks)]
        return blocks

    def _write(self, block: int, value: int) -> None:
        page = self._pages[block : block + 2].view(-1)
        self._device.launch(
            "engine writes",
            self._device.compute_stream,
            writes=[page],
            run=lambda: page.fill_(value),
        )
