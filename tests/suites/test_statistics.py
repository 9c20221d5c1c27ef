"""Intervals and differences against figures worked out another way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_aligndistil.suites import statistics


@pytest.fixture(scope="module")
def battles() -> tuple[np.ndarray, np.ndarray]:
    """Weighted scores of 200 questions."""
    rng = np.random.default_rng(3)
    weights = rng.choice([2, 4, 6], 200).astype(float)
    return weights * rng.beta(2, 3, 200), weights


def resampled(rng_seed: int, count: int, figure) -> np.ndarray:
    """`figure` of 4,000 resamples, drawn question by question."""
    rng = np.random.default_rng(rng_seed)
    return np.array([figure(rng.integers(0, count, count)) for _ in range(4000)])


def test_the_bootstrap_agrees_with_one_drawn_question_by_question(battles) -> None:
    sums, weights = battles
    found = statistics.ratio(sums, weights)
    other = resampled(5, 200, lambda drawn: 100 * sums[drawn].sum() / weights[drawn].sum())
    assert found.value == pytest.approx(100 * sums.sum() / weights.sum(), abs=1e-12)
    assert found.stderr == pytest.approx(other.std(ddof=1), rel=0.08)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(other, [0.025, 0.975])), abs=0.3)
    residuals = sums - found.value / 100 * weights  # the delta method
    assert found.stderr == pytest.approx(100 * math.sqrt((residuals**2).sum()) / weights.sum(), rel=0.08)


def test_a_paired_difference_is_more_certain_than_two_figures(battles) -> None:
    sums, weights = battles
    better = np.minimum(sums + 0.05 * weights, weights)
    found = statistics.paired((sums, weights), (better, weights))
    other = resampled(6, 200, lambda drawn: 100 * (better - sums)[drawn].sum() / weights[drawn].sum())
    assert found.value == pytest.approx(100 * (better.sum() - sums.sum()) / weights.sum(), abs=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(other, [0.025, 0.975])), abs=0.02)
    assert found.p < 0.002 and found.high - found.low < 1 < statistics.ratio(sums, weights).stderr * 2
    back = statistics.paired((better, weights), (sums, weights))
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_no_difference_is_no_evidence(battles) -> None:
    sums, weights = battles
    same = statistics.paired((sums, weights), (sums, weights))
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    rng = np.random.default_rng(0)
    noise = [
        statistics.paired((rng.normal(size=60), np.ones(60)), (rng.normal(size=60), np.ones(60))).p for _ in range(60)
    ]
    assert np.mean(np.array(noise) < 0.1) < 0.25 and np.mean(noise) == pytest.approx(0.5, abs=0.12)


def test_mean_and_proportion() -> None:
    found = statistics.mean([1.0, 2.0, 4.0])
    assert found.value == pytest.approx(7 / 3)
    assert found.stderr == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2 / 3))
    # Wilson's interval of 81 of 263 (Newcombe 1998): 0.2553 to 0.3662.
    found = statistics.proportion(81 / 263, 263)
    assert (found.low, found.high) == pytest.approx((25.53, 36.62), abs=0.005)
    assert statistics.proportion(1.0, 10).high == pytest.approx(100) and statistics.proportion(1.0, 10).low < 75
    assert math.isnan(statistics.mean([]).value) and math.isnan(statistics.ratio([], []).value)
    assert statistics.mean([3.0]).stderr is None
