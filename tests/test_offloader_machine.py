"""Random calls of KVOffloader against a plain model of what every key must hold."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from triton_offload import KVOffloader
from triton_offload.calibration import Path
from triton_offload.manager import UnknownKeyError, UnwrittenBlocksError
from triton_offload.offloader import PoolFullError
from triton_offload.pipeline import PipelineOptions


class OffloaderMachine(RuleBasedStateMachine):
    """Random calls against a dict of what every key's written blocks must hold."""

    BLOCKS = 24
    SIZE = 3

    def __init__(self) -> None:
        super().__init__()
        self.pages = torch.zeros(self.BLOCKS, 8, dtype=torch.uint8)
        self.other = torch.zeros(self.BLOCKS, 2, 3, dtype=torch.int16)
        self.offloader = KVOffloader(
            [self.pages, self.other],
            host_bytes=5 * self.SIZE * 20,
            blocks_per_chunk=self.SIZE,
            options=PipelineOptions(path=Path.STAGED, buffer_bytes=2 * self.SIZE * 20),
        )
        self.rng = random.Random(0)
        self.under_way: list = []

    def teardown(self) -> None:
        self.offloader.close(60)

    @staticmethod
    def content(key: bytes, position: int) -> int:
        return (key[0] * 7 + position * 31) % 251

    def write(self, block: int, value: int) -> None:
        self.pages[block] = value
        self.other[block] = value * 3

    def reads(self, block: int, value: int) -> bool:
        return bool((self.pages[block] == value).all() and (self.other[block] == value * 3).all())

    def settle(self) -> None:
        for job in self.under_way:
            job.wait(60)
        self.under_way.clear()

    @rule(
        start=st.integers(0, 12),
        count=st.integers(1, 7),
        first=st.integers(0, 2),
        wait=st.booleans(),
    )
    def store(self, start, count, first, wait):
        chunks = -(-(first + count) // self.SIZE)
        keys = [bytes([start + c]) for c in range(chunks)]
        self.settle()
        blocks = self.rng.sample(range(self.BLOCKS), count)
        for i, block in enumerate(blocks):
            chunk, position = divmod(first + i, self.SIZE)
            self.write(block, self.content(keys[chunk], position))
        try:
            job = self.offloader.store(keys, blocks, first_block=first)
        except PoolFullError:
            assert chunks > 5 or self.under_way
            return
        if wait:
            job.wait(60)
            assert self.offloader.lookup(keys, num_blocks=count, first_block=first) == chunks
        else:
            self.under_way.append(job)

    @rule(start=st.integers(0, 12), count=st.integers(1, 7), first=st.integers(0, 2))
    def load(self, start, count, first):
        chunks = -(-(first + count) // self.SIZE)
        keys = [bytes([start + c]) for c in range(chunks)]
        there = self.offloader.lookup(keys, num_blocks=count, first_block=first)
        blocks = self.rng.sample(range(self.BLOCKS), count)
        self.settle()  # stores that read the pages which the load would write
        if there < chunks:
            if self.offloader.lookup(keys, num_blocks=count, first_block=first) < chunks:
                with pytest.raises((UnknownKeyError, UnwrittenBlocksError)):
                    self.offloader.load(keys, blocks, first_block=first)
            return
        job = self.offloader.load(keys, blocks, first_block=first, expedited=start % 2 == 0)
        job.wait(60)
        for i, block in enumerate(blocks):
            chunk, position = divmod(first + i, self.SIZE)
            assert self.reads(block, self.content(keys[chunk], position)), (keys, i)

    @precondition(lambda self: not self.under_way)
    @rule()
    def reset(self):
        self.offloader.reset()
        assert self.offloader.stats().num_used == 0

    @rule()
    def collect(self):
        for result in self.offloader.get_finished():
            assert result.success

    @invariant()
    def structures_hold(self):
        with self.offloader._lock:
            self.offloader._manager._check()


TestOffloaderMachine = OffloaderMachine.TestCase
TestOffloaderMachine.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
