"""Style control: what a win rate would be if style did not decide, by a Bradley-Terry model with style features.

Facts are those of arena-hard-auto (lmarena): which marks count, how features are made and scaled, and the model.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_aligndistil.suites.statistics import Figure, draws, interval

FEATURES = ("length", "headers", "lists", "bold")
_CODE = re.compile(r"```[^`]*```")
_HEADERS = re.compile(r"^#{1,6}\s", re.MULTILINE)
_LISTS = re.compile(r"^\s*(?:\d+\.|[-*+])\s", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")
_TOKENS = re.compile(r"\w+|[^\w\s]")
_RIDGE = 1e-6
_UNBOUNDED = 12.0  # logits; a fit beyond has nothing that bounds it
_ROUNDS = 200


def counts(text: str) -> tuple[int, int, int, int]:
    """(length, headers, lists, bold): words and punctuation marks, then Markdown marks outside code blocks.

    arena-hard-auto counts the tokens of GPT-4o for the length. Only a relative difference of lengths is used, in which
    the kind of token all but cancels, and this one needs no download.
    """
    prose = _CODE.sub("", text)
    marks = (len(pattern.findall(prose)) for pattern in (_HEADERS, _LISTS, _BOLD))
    headers, lists, bold = marks
    return len(_TOKENS.findall(text)), headers, lists, bold


def features(model: str, baseline: str) -> list[float]:
    """How the model's answer differs in style from the baseline's, in the order of `FEATURES`.

    Length: (a − b) / (a + b). Marks are densities, count / (length + 1): (a − b) / (a + b + 1).
    """
    length_a, *marks_a = counts(model)
    length_b, *marks_b = counts(baseline)
    found = [(length_a - length_b) / max(length_a + length_b, 1)]
    for mark_a, mark_b in zip(marks_a, marks_b, strict=True):
        density_a, density_b = mark_a / (length_a + 1), mark_b / (length_b + 1)
        found.append((density_a - density_b) / (density_a + density_b + 1))
    return found


def scaled(features_NF: NDArray, weights_N: NDArray, centred: bool) -> NDArray:
    """Features over their standard deviation among battles (n − 1); with `centred`, less their mean: z-scores.

    A feature that does not vary becomes 0.
    """
    total = weights_N.sum()
    mean_F = weights_N @ features_NF / total
    deviation_F = np.sqrt(weights_N @ (features_NF - mean_F) ** 2 / max(total - 1, 1))
    varies = deviation_F > 1e-12
    shift_F = mean_F if centred else np.zeros_like(mean_F)
    return np.where(varies, (features_NF - shift_F) / np.where(varies, deviation_F, 1), 0.0)


def bradley_terry(design_NK: NDArray, outcome_N: NDArray, weights_N: NDArray, steps: int = 50) -> NDArray:
    """The coefficients [K] that maximise Σ w (y log σ(xβ) + (1 − y) log σ(−xβ)), by Newton's method.

    A tiny ridge (1e-6) keeps them finite where a model has won, or lost, all. `outcome_N` is in [0, 1].
    """
    coefficients = np.zeros(design_NK.shape[1])
    ridge = _RIDGE * np.eye(design_NK.shape[1])

    def loss(beta: NDArray) -> float:
        logits = design_NK @ beta
        likelihood = weights_N @ (outcome_N * logits - np.logaddexp(0, logits))
        return float(-likelihood + _RIDGE / 2 * beta @ beta)

    current = loss(coefficients)
    for _ in range(steps):
        probability_N = 0.5 * (1 + np.tanh(design_NK @ coefficients / 2))
        gradient = design_NK.T @ (weights_N * (probability_N - outcome_N)) + _RIDGE * coefficients
        curvature_N = weights_N * probability_N * (1 - probability_N)
        step = np.linalg.solve(design_NK.T @ (curvature_N[:, None] * design_NK) + ridge, gradient)
        size = 1.0
        while size > 1e-6 and loss(coefficients - size * step) > current:
            size /= 2
        coefficients = coefficients - size * step
        previous, current = current, loss(coefficients)
        if abs(previous - current) <= 1e-12 * max(1.0, abs(current)):
            break
    return coefficients


@dataclass(frozen=True)
class Battles:
    """The battles of M models against a baseline, one row a model and question.

    Attributes:
        owner_N: whose battle it is, from 0 to M − 1.
        question_N: number of the question, from 0.
        features_NF: differences of style.
        outcome_N: the model's mean score, in [0, 1].
        weights_N: how much the row counts.
    """

    owner_N: NDArray
    question_N: NDArray
    features_NF: NDArray
    outcome_N: NDArray
    weights_N: NDArray

    @property
    def num_models(self) -> int:
        return int(self.owner_N.max()) + 1


def fit(battles: Battles, *, centred: bool) -> tuple[NDArray, NDArray]:
    """The models' strengths [M] with style controlled, and the features' coefficients [F], in logits.

    One fit to all battles together: logit = strength of the owner + features · coefficients. With `centred` the
    features are z-scores, as in arena-hard-auto: a strength is that at the average style of all these battles, so with
    a single model little is controlled. Without, it is that at the baseline's own style.
    """
    features = scaled(battles.features_NF, battles.weights_N, centred)
    one_hot = (battles.owner_N[:, None] == np.arange(battles.num_models)).astype(np.float64)
    coefficients = bradley_terry(np.hstack([one_hot, features]), battles.outcome_N, battles.weights_N)
    return coefficients[: battles.num_models], coefficients[battles.num_models :]


def controlled_rates(battles: Battles, *, centred: bool) -> tuple[list[Figure], NDArray]:
    """Each model's win rate in percent with style controlled, by :func:`fit`, and the features' coefficients.

    Intervals resample questions. Where style, or one model, tells wins from losses without fail, nothing bounds the
    fit: the rates are NaN.
    """
    strengths, coefficients = fit(battles, centred=centred)
    counts = [int((battles.owner_N == model).sum()) for model in range(battles.num_models)]
    if max(np.abs(strengths).max(), np.abs(coefficients).max()) > _UNBOUNDED:
        return [Figure(math.nan, count=count) for count in counts], coefficients
    resampled = []
    for times in draws(int(battles.question_N.max()) + 1, _ROUNDS):
        sample = replace(battles, weights_N=battles.weights_N * times[battles.question_N])
        resampled.append(_rate(fit(sample, centred=centred)[0]))
    rates, spread_RM = _rate(strengths), np.array(resampled)
    return [
        Figure(float(rates[model]), *interval(spread_RM[:, model]), float(spread_RM[:, model].std(ddof=1)), count)
        for model, count in enumerate(counts)
    ], coefficients


def _rate(strengths: NDArray) -> NDArray:
    return 50 * (1 + np.tanh(strengths / 2))
