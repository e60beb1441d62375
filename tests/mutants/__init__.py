"""The worker side with one rule taken away each: what the simulated device must report."""

from mutants import (
    compute,
    contents,
    layers,
    manager,
    order,
    reports,
    staging,
    submission,
    sums,
)
from mutants.registry import MUTANTS, Catch, Mutant, Scenario, catch

__all__ = ["MUTANTS", "TOPICS", "Catch", "Mutant", "Scenario", "catch"]

#: each registers its mutants when it is imported
TOPICS = (compute, contents, layers, manager, order, reports, staging, submission, sums)
