"""DPO, forward and reverse, and its options, against a dense reference."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_aligndistil import algorithms
from megatron_aligndistil.errors import ConfigError
from tests.algorithms.cases import Case, Result, make_case, run_sharded
from tests.algorithms.checks import assert_cut_does_not_matter, assert_equals_dense
from tests.algorithms.pairs import CUTS, FULL_PAIRS, LENGTHS, full_pairs, metrics_of
from tests.shards import SIZES, VOCABULARIES, assert_same
from tests.workers import Workers

SECTION = {"name": "dpo", "beta": 0.3}
OPTIONS: dict[str, dict[str, Any]] = {
    "cdpo": {"label_smoothing": 0.2},
    "ipo": {"loss": "ipo"},
    "sft": {"sft_weight": 0.7},
    "ipo with sft": {"loss": "ipo", "sft_weight": 0.7},
}


def dense(
    case: Case,
    reverse: bool = False,
    beta: float = 0.3,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> tuple[Tensor, dict[str, tuple[float, int]]]:
    """(4) and its relatives, pair by pair."""
    pairs = full_pairs(case, reverse)
    total = torch.zeros((), dtype=torch.float64)
    for winner, loser in pairs:
        if loss == "ipo":
            difference = winner.log_ratio / len(winner.policy) - loser.log_ratio / len(loser.policy)
            total = total + (difference - 1 / (2 * beta)) ** 2
        else:
            h = beta * (winner.log_ratio - loser.log_ratio)
            total = total + (1 - label_smoothing) * (1 + (-h).exp()).log() + label_smoothing * (1 + h.exp()).log()
        total = total - sft_weight * winner.policy.mean()
    metrics = metrics_of(pairs, lambda side: beta * side.log_ratio)
    if sft_weight:
        metrics["sft"] = (-sum(float(winner.policy.detach().mean()) for winner, _ in pairs), len(pairs))
    return total, metrics


@pytest.mark.parametrize(("vocab", "padded"), VOCABULARIES)
@pytest.mark.parametrize("tp", SIZES)
def test_equals_dense(workers: Workers, tp: int, vocab: int, padded: int) -> None:
    case = make_case(LENGTHS, vocab=vocab, padded=padded)
    assert_equals_dense(workers, tp, SECTION, "dpo", case, dense, FULL_PAIRS)


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_equal_dense(workers: Workers, option: str, tp: int) -> None:
    reference = partial(dense, **OPTIONS[option])
    assert_equals_dense(workers, tp, SECTION | OPTIONS[option], "dpo", make_case(LENGTHS), reference, FULL_PAIRS)


@pytest.mark.parametrize("option", [{}, *OPTIONS.values()])
def test_reverse_equals_dense(workers: Workers, option: dict[str, Any]) -> None:
    section = SECTION | {"direction": "reverse"} | option
    reference = partial(dense, reverse=True, **option)
    assert_equals_dense(workers, 2, section, "reverse", make_case(LENGTHS), reference, FULL_PAIRS)


def test_ipo_by_hand(workers: Workers) -> None:
    """Identical models leave (0 - 1/(2β))² a pair."""
    (result,) = workers.run(1, run_sharded, SECTION | {"loss": "ipo"}, "dpo", make_case([3, 2], same=True))
    assert float(result.output.loss_sum) == pytest.approx((1 / 0.6) ** 2, rel=1e-14)


def test_smoothing_is_refused_for_ipo() -> None:
    with pytest.raises(ConfigError, match=r"algorithm.*ipo takes no label_smoothing; set label_smoothing to 0"):
        algorithms.build(SECTION | {"loss": "ipo", "label_smoothing": 0.1})


@pytest.mark.parametrize("tp", SIZES)
def test_identical_models_give_ln_2(workers: Workers, tp: int) -> None:
    # Here the loss is ln 2 a pair and its gradient -β/2 of the difference of summed log-probabilities.
    for result in workers.run(tp, run_sharded, SECTION, "dpo", make_case([3, 1, 2, 4], same=True)):
        assert float(result.output.loss_sum) == pytest.approx(2 * math.log(2), rel=1e-14)
        assert float(result.output.metrics["margin"][0]) == 0.0
        assert float(result.output.metrics["accuracy"][0]) == 0.0
        assert float(result.hidden_grad_TH.abs().max()) > 1e-3


def test_reverse_is_forward_on_swapped_pairs(workers: Workers) -> None:
    case = make_case(LENGTHS)
    section = SECTION | {"direction": "both"}
    reverse: Result = workers.run(1, run_sharded, section, "reverse", case)[0]
    swapped: Result = workers.run(1, run_sharded, section, "dpo", case.rows([3, 4, 5, 0, 1, 2]))[0]
    assert_same(reverse.output.loss_sum, swapped.output.loss_sum, 1e-14)
    assert_same(reverse.weight_grad_Hv, swapped.weight_grad_Hv, 1e-13)
    assert reverse.output.metrics.keys() == swapped.output.metrics.keys()
    for name, (total, count) in swapped.output.metrics.items():
        assert_same(reverse.output.metrics[name][0], total, 1e-13)
        assert int(reverse.output.metrics[name][1]) == int(count)


@pytest.mark.parametrize("option", [{}, OPTIONS["cdpo"], OPTIONS["ipo with sft"]])
@pytest.mark.parametrize("model", ["dpo", "reverse"])
def test_cut_does_not_matter(workers: Workers, model: str, option: dict[str, Any]) -> None:
    section = SECTION | {"direction": "both"} | option
    assert_cut_does_not_matter(workers, section, model, make_case(LENGTHS), CUTS)


@pytest.mark.parametrize(
    ("direction", "trained"), [("forward", ("dpo",)), ("reverse", ("reverse",)), ("both", ("dpo", "reverse"))]
)
def test_direction_says_what_is_trained(direction: str, trained: tuple[str, ...]) -> None:
    algorithm = algorithms.build({"name": "dpo", "direction": direction})
    assert algorithm.trained == trained
    assert algorithm.frozen == {"reference": "logprobs"}
    assert algorithm.data == "pairs"
