"""What sums cost a card, by the model, and that the kernels are what the model takes them for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import triton
from compiled import compiled, compiler, key_of, keys, read
from hardware import GB300, H100_SXM, ISSUES_PER_SECOND, PREDICTED, Card
from model import (
    SMALL_SECONDS,
    STAGED_KERNEL,
    ZERO_COPY_KERNEL,
    gather_seconds,
    staged_seconds,
    zero_copy_seconds,
)
from units import GIB, KIB, MIB
from verifying import cost, kernel_of

from triton_offload.specs import Direction

STORE, LOAD = Direction.STORE, Direction.LOAD
POWERS = ["staged, pages of 64 KiB", "zero copy, pages of 64 KiB", "zero copy, pages of 4 KiB"]
FIRST = ("zero copy, pages of 4 KiB", "staged, pages of 64 KiB")
KERNELS = [
    pytest.param(*key, marks=[pytest.mark.deep] * (key[0] not in FIRST or key[1] == "gather"))
    for key in keys()
]


@pytest.mark.skipif(triton.__version__ != compiler(), reason="compiled.json is of another triton")
@pytest.mark.parametrize(("name", "direction", "sums"), KERNELS)
def test_what_is_told_of_a_kernel_is_what_it_compiles_to(
    name: str, direction: str, sums: bool
) -> None:
    assert compiled(name, direction, sums=sums) == read()[key_of(name, direction, sums)], (
        "write it anew: make performance"
    )


def test_no_kernel_with_sums_has_a_stack_or_less_in_flight() -> None:
    code = read()
    assert code.keys() == {key_of(*key) for key in keys()}
    for name, direction, _ in keys():
        plain, summed = (code[key_of(name, direction, sums)] for sums in (False, True))
        assert summed.stack_bytes == plain.stack_bytes == 0
        assert summed.flight_bytes == plain.flight_bytes
        assert summed.registers * summed.threads <= 65536


@pytest.mark.parametrize("card", PREDICTED, ids=lambda card: card.name)
@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
@pytest.mark.parametrize("name", POWERS)
def test_sums_cost_less_than_two_percent(card: Card, direction: Direction, name: str) -> None:
    assert 0 <= cost(card, name, direction, 256 * MIB) < 0.02
    if card is not GB300:  # whose link moves 16 MiB in 83 us
        assert cost(card, name, direction, 16 * MIB) < 0.02


def test_what_is_added_lengthens_a_gather_and_lowers_what_is_in_flight() -> None:
    card = H100_SXM
    staged = replace(STAGED_KERNEL, added=10)
    assert staged.added_seconds == pytest.approx(32 * KIB / 16 / 32 * 10 / ISSUES_PER_SECOND)
    longer = 1 + staged.added_seconds / card.memory_seconds
    assert gather_seconds(card, GIB, staged) == pytest.approx(longer * gather_seconds(card, GIB))

    def seconds(added: float, flight_bytes: int) -> float:
        kernel = replace(ZERO_COPY_KERNEL, added=added, flight_bytes=flight_bytes)
        return zero_copy_seconds(card, LOAD, GIB, kernel) - card.start_seconds

    assert seconds(10, 128 * KIB) == seconds(0, 128 * KIB)  # beyond the knee as before
    kernel = replace(ZERO_COPY_KERNEL, added=10, flight_bytes=64 * KIB)
    longer = 1 + kernel.added_seconds / card.link.read_seconds
    assert seconds(10, 64 * KIB) == pytest.approx(longer * seconds(0, 64 * KIB))


def test_a_segment_clears_its_sums_and_brings_them() -> None:
    card, segments = H100_SXM, [16 * MIB] * 3
    for direction, many in ((STORE, 1 + len(segments)), (LOAD, 2)):
        plain, summed = (staged_seconds(card, direction, segments, sums=s) for s in (False, True))
        assert summed - plain == pytest.approx(many * SMALL_SECONDS)


def test_a_kernel_is_the_paths_own_with_what_sums_add() -> None:
    plain, summed = (
        kernel_of("zero copy, pages of 512 bytes", LOAD, sums=s) for s in (False, True)
    )
    assert plain.added == 0.0 < summed.added < 10
    assert (plain.ctas, summed.threads) == (ZERO_COPY_KERNEL.ctas, plain.threads // 2)
    assert kernel_of("staged, pages of 64 KiB", STORE, sums=True).ctas == STAGED_KERNEL.ctas
