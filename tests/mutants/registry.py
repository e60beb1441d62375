"""Mutants: the worker side with one rule taken away each, and what reports them.

A mutant is a patch of real classes that stays while a scenario runs. `catch` runs the scenario by
one seed after another until something is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from schedules import CONFIGURATIONS, run_schedule

from triton_offload.testing import Stuck

MOST_SEEDS = 50

Scenario = Callable[[int], object]
Patch = AbstractContextManager[Any]


@dataclass(frozen=True, slots=True)
class Mutant:
    """`rule`: what is taken away, by its number in `transfer/pipeline.py` or in words."""

    name: str
    rule: str
    scenario: Scenario
    patch: Callable[[], Patch]


@dataclass(frozen=True, slots=True)
class Catch:
    """The first seed of the scenario that reports the mutant, what it is reported as, and the
    report itself."""

    seed: int
    how: str
    report: str


MUTANTS: dict[str, Mutant] = {}


def catch(mutant: Mutant, most: int = MOST_SEEDS) -> Catch | None:
    """None where no seed reports anything. What is no report (a TypeError, say) is raised."""
    for seed in range(most):
        try:
            with mutant.patch():
                mutant.scenario(seed)
        except (AssertionError, Stuck) as error:
            report = "\n".join([str(error), *getattr(error, "__notes__", [])])
            return Catch(seed, _kind(error, report), report)
    return None


def _kind(error: BaseException, report: str) -> str:
    kinds = []
    if "race on " in report:
        kinds.append("race")
    if "wrong bytes" in report or "expected other bytes" in report:
        kinds.append("bytes")
    if isinstance(error, Stuck):
        kinds.append("stuck")
    return ", ".join(kinds) or "count"


_serving: dict[str, Scenario] = {}


def serving(name: str) -> Scenario:
    """The random schedules of a configuration; the same function for the same name."""
    return _serving.setdefault(name, lambda seed: run_schedule(CONFIGURATIONS[name], seed))


def mutant(rule: str, scenario: Scenario) -> Callable[[Callable[[], Patch]], Callable[[], Patch]]:
    """Register a function that returns the patch, under its own name in words."""

    def register(made: Callable[[], Patch]) -> Callable[[], Patch]:
        name = made.__name__.replace("_", " ")
        MUTANTS[name] = Mutant(name, rule, scenario, made)
        return made

    return register


def instead(cls: type, name: str, make: Callable[[Any], Any]) -> Patch:
    """`make(original)` in place of a method of `cls`."""
    return patch.object(cls, name, make(getattr(cls, name)))


@contextmanager
def together(*patches: Patch) -> Iterator[None]:
    with ExitStack() as stack:
        for part in patches:
            stack.enter_context(part)
        yield
