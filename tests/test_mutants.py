"""Each rule of the worker side, taken away, is reported by the simulated device."""

from __future__ import annotations

from functools import cache

import mutant_table
import pytest
from mutants import MUTANTS, Catch, Scenario, catch

FEW_SEEDS = 3


@cache
def caught(name: str) -> Catch | None:
    return catch(MUTANTS[name])


@cache
def pass_unmutated(scenario: Scenario, seed: int) -> None:
    scenario(seed)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught_where_the_code_passes(name):
    found = caught(name)
    assert found is not None, "nothing reports it"
    for seed in range(max(found.seed + 1, FEW_SEEDS)):
        pass_unmutated(MUTANTS[name].scenario, seed)


def test_most_mutants_need_few_seeds():
    seeds = [found.seed + 1 for found in map(caught, MUTANTS) if found is not None]
    assert sum(count <= 5 for count in seeds) >= 0.8 * len(MUTANTS)


def test_the_table_names_every_mutant():
    assert mutant_table.names() == list(MUTANTS), "`make mutants` writes it anew"
