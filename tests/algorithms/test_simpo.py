"""SimPO against a dense reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_aligndistil import algorithms
from tests.algorithms.cases import Case, make_case, run_sharded
from tests.algorithms.checks import assert_cut_does_not_matter, assert_equals_dense
from tests.algorithms.pairs import CUTS, FULL_PAIRS, LENGTHS, full_pairs, metrics_of
from tests.shards import SIZES
from tests.workers import Workers

SECTION = {"name": "simpo", "beta": 1.7, "gamma_beta_ratio": 0.4}


def dense(case: Case) -> tuple[Tensor, dict[str, tuple[float, int]]]:
    """-log σ(β (mean log π(y_w) - mean log π(y_l)) - γ), pair by pair."""
    pairs = full_pairs(case)
    margins = [1.7 * (winner.policy.mean() - loser.policy.mean()) - 0.4 * 1.7 for winner, loser in pairs]
    loss = torch.stack([(1 + (-margin).exp()).log() for margin in margins]).sum()
    return loss, metrics_of(pairs, lambda side: 1.7 * side.policy.mean())


@pytest.mark.parametrize("tp", SIZES)
def test_equals_dense(workers: Workers, tp: int) -> None:
    assert_equals_dense(workers, tp, SECTION, "policy", make_case(LENGTHS), dense, FULL_PAIRS)


def test_one_response_twice_by_hand(workers: Workers) -> None:
    """The margin is -γ, and the two gradients cancel."""
    (result,) = workers.run(1, run_sharded, SECTION, "policy", make_case([2]).rows([0, 0]))
    assert float(result.output.loss_sum) == pytest.approx(math.log(1 + math.exp(0.4 * 1.7)), rel=1e-14)
    assert float(result.weight_grad_Hv.abs().max()) < 1e-15


def test_cut_does_not_matter(workers: Workers) -> None:
    assert_cut_does_not_matter(workers, SECTION, "policy", make_case(LENGTHS), CUTS)


def test_published_defaults_and_no_reference() -> None:
    algorithm = algorithms.build({"name": "simpo"})
    assert (algorithm.config.beta, algorithm.config.gamma_beta_ratio) == (2.5, 0.5)
    assert algorithm.frozen == {} and algorithm.trained == ("policy",) and algorithm.data == "pairs"
