"""Style control against a fit by other means, on battles taken one by one as arena-hard-auto does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_aligndistil.suites import style

MARKED = """# Title
##no header
### Third

- one
* two
  3. three
-no list
**bold** and __bold__ and **not
bold**
```
# not a header
- no list **no bold**
```
"""


def test_counts() -> None:
    assert style.counts(MARKED)[1:] == (2, 3, 2)
    assert style.counts("Two words, one comma.") == (6, 0, 0, 0)
    assert style.counts("") == (0, 0, 0, 0)


def test_features() -> None:
    model, baseline = "# a b c", "a - **b**"  # lengths 4 and 7 in words and marks
    assert (style.counts(model), style.counts(baseline)) == ((4, 1, 0, 0), (7, 0, 0, 1))
    density_headers, density_bold = 1 / 5, 1 / 8
    expected = [(4 - 7) / 11, density_headers / (density_headers + 1), 0, -density_bold / (density_bold + 1)]
    assert style.features(model, baseline) == pytest.approx(expected)
    assert style.features(model, model) == [0, 0, 0, 0]
    assert style.features("", "") == [0, 0, 0, 0]


@pytest.fixture(scope="module")
def games() -> dict[str, np.ndarray]:
    """Games of two models on 150 questions, decided by strength and length."""
    rng = np.random.default_rng(1)
    rows: dict[str, list] = {"owner": [], "question": [], "features": [], "score": [], "weight": []}
    for owner, strength in ((0, 0.2), (1, -0.4)):
        for question in range(150):
            features = rng.normal([0.3 + 0.2 * owner, 0.05, 0.1, 0.0], 0.2)
            for _ in range(2):
                chance = 1 / (1 + math.exp(-strength - 2.5 * features[0]))
                rows["owner"].append(owner)
                rows["question"].append(question)
                rows["features"].append(features)
                rows["score"].append(rng.choice([1.0, 0.0, 0.5], p=[0.9 * chance, 0.9 * (1 - chance), 0.1]))
                rows["weight"].append(rng.choice([1, 3]))
    return {name: np.array(values) for name, values in rows.items()}


def folded(games: dict[str, np.ndarray]) -> style.Battles:
    """The games with those of one model and question as one row."""
    keys = sorted(set(zip(games["owner"].tolist(), games["question"].tolist(), strict=True)))
    rows = [(games["owner"] == owner) & (games["question"] == question) for owner, question in keys]
    weights = np.array([games["weight"][row].sum() for row in rows], dtype=float)
    return style.Battles(
        owner_N=np.array([owner for owner, _ in keys]),
        question_N=np.array([question for _, question in keys]),
        features_NF=np.array([games["features"][row][0] for row in rows]),
        outcome_N=np.array([(games["score"] * games["weight"])[row].sum() for row in rows]) / weights,
        weights_N=weights,
    )


@pytest.mark.parametrize("centred", [True, False])
def test_the_fit_agrees_with_torch_on_single_battles(games: dict[str, np.ndarray], centred: bool) -> None:
    """Every verdict repeated by its weight, features scaled by torch, and the loss minimised by torch's LBFGS."""
    repeats = torch.tensor(games["weight"])
    owner, score = (torch.tensor(games[name]).repeat_interleave(repeats) for name in ("owner", "score"))
    features = torch.tensor(games["features"]).repeat_interleave(repeats, 0)
    features = (features - (features.mean(0) if centred else 0)) / features.std(0)
    design = torch.cat([torch.nn.functional.one_hot(owner).double(), features], 1)
    beta = torch.full((design.shape[1],), 0.5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [beta], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(design @ beta, score, reduction="sum")
        value.backward()
        return value

    optimiser.step(loss)
    expected = beta.detach().numpy()
    strengths, coefficients = style.fit(folded(games), centred=centred)
    np.testing.assert_allclose(np.concatenate([strengths, coefficients]), expected, atol=1e-5)
    rates, _ = style.controlled_rates(folded(games), centred=centred)
    for rate, strength in zip(rates, expected[:2], strict=True):
        assert rate.value == pytest.approx(100 / (1 + math.exp(-strength)), abs=1e-3)
        assert rate.low < rate.value < rate.high and rate.count == 150


def test_what_control_is_for(games: dict[str, np.ndarray]) -> None:
    """At the baseline's style both models win less than they do with their longer answers."""
    battles = folded(games)
    raw = [np.average(battles.outcome_N[battles.owner_N == model]) * 100 for model in (0, 1)]
    rates, coefficients = style.controlled_rates(battles, centred=False)
    assert all(rate.value < win_rate - 8 for rate, win_rate in zip(rates, raw, strict=True))
    assert coefficients[0] > 0.3 and np.abs(coefficients[1:]).max() < 0.25


def test_the_interval_is_that_of_resampled_questions(games: dict[str, np.ndarray]) -> None:
    battles = folded(games)
    rng = np.random.default_rng(9)
    found = []
    for _ in range(100):
        drawn = rng.integers(0, 150, 150)
        places = np.concatenate([drawn, drawn + 150])
        sample = style.Battles(*(each[places] for each in vars(battles).values()))
        found.append(50 * (1 + np.tanh(style.fit(sample, centred=False)[0] / 2)))
    rates, _ = style.controlled_rates(battles, centred=False)
    for rate, other in zip(rates, np.array(found).T, strict=True):
        assert rate.stderr == pytest.approx(other.std(ddof=1), rel=0.25)


def test_no_figure_where_nothing_bounds_the_fit(games: dict[str, np.ndarray]) -> None:
    battles = folded(games)
    won = style.Battles(**{**vars(battles), "outcome_N": np.ones(300)})
    rates, _ = style.controlled_rates(won, centred=False)
    assert all(math.isnan(rate.value) for rate in rates)
