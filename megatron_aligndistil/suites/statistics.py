"""Means with their uncertainty: standard errors, bootstrap over questions, paired bootstrap between models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 1000
_LEVEL = 0.95
Z = 1.959963984540054


@dataclass(frozen=True)
class Figure:
    """A measured value with what is known of its uncertainty.

    Attributes:
        low, high: ends of the 95 % interval.
        stderr: standard error.
        count: questions (or pairs) that it rests on.
    """

    value: float
    low: float | None = None
    high: float | None = None
    stderr: float | None = None
    count: int | None = None


def mean(values: Sequence[float] | NDArray[np.float64], scale: float = 1.0) -> Figure:
    """The mean with its standard error (n − 1) and normal interval, times `scale`."""
    array = np.asarray(values, dtype=np.float64) * scale
    value = float(array.mean()) if len(array) else math.nan
    if len(array) < 2:
        return Figure(value, count=len(array))
    stderr = float(array.std(ddof=1) / math.sqrt(len(array)))
    return Figure(value, value - Z * stderr, value + Z * stderr, stderr, len(array))


def proportion(share: float, count: int, scale: float = 100.0) -> Figure:
    """A share of `count` with Wilson's interval, times `scale`; good near 0 and 1 too, unlike the normal one."""
    if not count:
        return Figure(math.nan, count=0)
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    stderr = math.sqrt(share * (1 - share) / max(count - 1, 1))
    return Figure(share * scale, (middle - half) * scale, (middle + half) * scale, stderr * scale, count)


def draws(count: int, rounds: int = ROUNDS, seed: int = 0) -> NDArray[np.int64]:
    """[rounds, count]: how often each question is in each resample of `count` questions with replacement."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=rounds)


def ratio(sums: ArrayLike, weights: ArrayLike, scale: float = 100.0, seed: int = 0) -> Figure:
    """Σ sums / Σ weights over questions with a bootstrap interval over questions, times `scale`.

    Questions are what is resampled, not single verdicts: the verdicts on one question are not independent.
    """
    sums_Q, weights_Q = np.asarray(sums, np.float64), np.asarray(weights, np.float64)
    if not weights_Q.sum():
        return Figure(math.nan, count=0)
    found = _resampled(sums_Q, weights_Q, draws(len(sums_Q), seed=seed)) * scale
    low, high = interval(found)
    return Figure(float(sums_Q.sum() / weights_Q.sum()) * scale, low, high, float(found.std(ddof=1)), len(sums_Q))


def interval(resampled: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values."""
    low, high = np.quantile(resampled, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """How far one model's figure is above another's.

    Attributes:
        value, low, high: the difference with its 95 % interval.
        p: two-sided; twice the share of resamples on the other side of 0 (ties count half).
        count: questions that both have answered.
    """

    value: float
    low: float
    high: float
    p: float
    count: int


def paired(
    first: tuple[ArrayLike, ArrayLike], second: tuple[ArrayLike, ArrayLike], scale: float = 100.0, seed: int = 0
) -> Difference:
    """Second model's Σ sums / Σ weights minus the first's, over the same resampled questions (paired bootstrap)."""
    arrays = [tuple(np.asarray(each, np.float64) for each in model) for model in (first, second)]
    count = len(arrays[0][0])
    resamples = draws(count, seed=seed)
    old, new = (_resampled(sums, weights, resamples) for sums, weights in arrays)
    observed = float(arrays[1][0].sum() / arrays[1][1].sum() - arrays[0][0].sum() / arrays[0][1].sum())
    below = float(np.mean(new < old) + 0.5 * np.mean(new == old))
    low, high = interval((new - old) * scale)
    return Difference(observed * scale, low, high, min(1.0, 2 * min(below, 1 - below)), count)


def _resampled(sums: NDArray[np.float64], weights: NDArray[np.float64], resamples: NDArray) -> NDArray[np.float64]:
    return (resamples @ sums) / np.maximum(resamples @ weights, 1e-300)
