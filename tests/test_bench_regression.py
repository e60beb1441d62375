"""What counts as slower, on made-up samples: nothing here is timed."""

from __future__ import annotations

import json
import random

import pytest
import regression
from chosen import CHOSEN
from regression import BASELINE, FLOOR, Sample, judge


def rounds(median: float, deviation: float, count: int = 9, seed: int = 0) -> Sample:
    rng = random.Random(seed)
    return Sample.of([median * (1 + rng.gauss(0, deviation)) for _ in range(count)])


def test_a_sample_is_the_median_and_the_deviation_from_it():
    assert Sample.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Sample(3.0, 1.0, 5)


def test_twice_as_slow_fails():
    verdict = judge(rounds(10.0, 0.05, seed=1), rounds(20.0, 0.05, 45, seed=2))
    assert verdict.slower
    assert verdict.change == pytest.approx(-0.5, abs=0.1)


def test_the_same_speed_passes_however_noisy():
    for seed in range(200):
        noise = 0.01 * (seed % 20)
        assert not judge(rounds(5.0, noise, seed=seed), rounds(5.0, noise, 45, seed + 1000)).slower


def test_faster_passes():
    assert not judge(rounds(30.0, 0.05, seed=1), rounds(5.0, 0.05, seed=2)).slower


def test_a_slowdown_within_the_floor_passes_and_beyond_it_fails():
    baseline = Sample(10.0, 0.0, 45)
    assert not judge(Sample(10.0 * (1 - FLOOR) + 0.01, 0.0, 9), baseline).slower
    assert judge(Sample(10.0 * (1 - FLOOR) - 0.01, 0.0, 9), baseline).slower


def test_the_noise_of_either_side_widens_what_is_allowed():
    quiet, noisy = Sample(10.0, 0.1, 9), Sample(10.0, 4.0, 9)
    allowed = judge(quiet, quiet).allowed
    assert allowed == FLOOR
    assert judge(noisy, quiet).allowed > allowed
    assert judge(quiet, noisy).allowed > allowed


def test_half_the_speed_fails_whatever_the_noise():
    assert judge(Sample(5.0, 4.0, 9), Sample(10.0, 9.0, 9)).slower


def test_every_chosen_benchmark_has_a_baseline():
    assert list(json.loads(BASELINE.read_text())) == list(CHOSEN)


@pytest.mark.parametrize(("again", "slower"), [(10.0, False), (5.0, True)])
def test_what_looks_slower_is_measured_again_with_more_rounds(monkeypatch, again, slower):
    asked = []

    def measure(name: str, count: int) -> Sample:
        asked.append(count)
        return Sample(5.0 if count == regression.ROUNDS else again, 0.1, count)

    monkeypatch.setattr(regression, "measure", measure)
    monkeypatch.setattr(regression, "CHOSEN", {"one": None})
    ((_, verdict),) = regression.check({"one": Sample(10.0, 0.1, 45)}).values()
    retries = regression.RETRIES if slower else 1
    assert asked == [regression.ROUNDS, *[regression.RETRY_ROUNDS] * retries]
    assert verdict.slower is slower
