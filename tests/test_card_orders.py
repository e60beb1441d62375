"""Random programs on the imitated driver: those whose conflicts are ordered end in one way,
whatever the seed; those that miss a wait do not."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
from card import build
from card_calls import LEGACY, NEWEST, NOT_READY, Driver, read

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.NO_COMPILER)

CELLS = 4
STEPS = 25
PROGRAMS = 150


@dataclass
class Program:
    """Fills of cells and copies among them, on several streams, as `rng` has it. The same program
    runs on any card; `waits`: whether a stream waits for what touched a cell before."""

    driver: Driver
    rng: random.Random
    waits: bool

    def __post_init__(self) -> None:
        driver = self.driver
        # One that is in step with the legacy stream, and those that are not.
        self.streams = [driver.stream(0), driver.stream(), driver.stream(), LEGACY]
        self.cells = [driver.device(1, 0) for _ in range(CELLS)]
        self.touched = [driver.event() for _ in range(CELLS)]

    def run(self) -> list[int]:
        """What the cells hold in the end if all runs in the order of the calls."""
        expected = [0] * CELLS
        for step in range(1, STEPS + 1):
            stream, to, source = self.rng.choice(self.streams), *self.rng.sample(range(CELLS), 2)
            copies = self.rng.random() < 0.6
            cells = [to, source] if copies else [to]
            for cell in cells if self.waits else []:
                assert self.driver.cuStreamWaitEvent(stream, self.touched[cell], 0) == 0
            if copies:
                self.driver.copy(self.cells[to], self.cells[source], 1, stream)
                expected[to] = expected[source]
            else:
                assert self.driver.cuMemsetD8Async(self.cells[to], step, 1, stream) == 0
                expected[to] = step
            for cell in cells:
                assert self.driver.cuEventRecord(self.touched[cell], stream) == 0
            self.ask()
        assert self.driver.cuCtxSynchronize() == 0
        return expected

    def ask(self) -> None:
        """What a host may do at any time."""
        stream, event = self.rng.choice(self.streams), self.rng.choice(self.touched)
        what = self.rng.random()
        if what < 0.2:
            assert self.driver.cuStreamQuery(stream) in (0, NOT_READY)
        elif what < 0.4:
            assert self.driver.cuEventQuery(event) in (0, NOT_READY)
        elif what < 0.45:
            assert self.driver.cuStreamSynchronize(stream) == 0
        elif what < 0.5:
            assert self.driver.cuEventSynchronize(event) == 0

    def found(self) -> list[int]:
        return [read(cell, 1)[0] for cell in self.cells]


def test_whose_conflicts_are_ordered_ends_as_the_calls_were_made():
    for seed in range(PROGRAMS):
        driver = Driver(replace(NEWEST, seed=seed)).begin()
        program = Program(driver, random.Random(seed), waits=True)
        assert program.run() == program.found(), seed


def test_those_that_wait_for_nothing_end_in_other_ways():
    wrong = 0
    for seed in range(PROGRAMS):
        driver = Driver(replace(NEWEST, seed=seed)).begin()
        program = Program(driver, random.Random(seed), waits=False)
        wrong += program.run() != program.found()
    assert wrong > PROGRAMS // 2
