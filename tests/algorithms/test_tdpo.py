"""TDPO1 and TDPO2 against a dense reference."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_aligndistil import algorithms
from tests.algorithms.cases import Case, make_case, run_sharded
from tests.algorithms.checks import assert_cut_does_not_matter, assert_equals_dense
from tests.algorithms.pairs import CUTS, FULL_PAIRS, LENGTHS, full_pairs, metrics_of
from tests.shards import SIZES, VOCABULARIES
from tests.workers import Workers

SECTION = {"name": "tdpo", "beta": 0.3, "alpha": 0.6}


def dense(case: Case, variant: str) -> tuple[Tensor, dict[str, tuple[float, int]]]:
    """The paper's u and δ, pair by pair."""
    pairs = full_pairs(case)
    loss = torch.zeros((), dtype=torch.float64)
    for winner, loser in pairs:
        u = 0.3 * winner.log_ratio - 0.3 * loser.log_ratio
        if variant == "tdpo1":
            margin = u - (0.3 * loser.kl.sum() - 0.3 * winner.kl.sum())
        else:
            margin = u - 0.6 * (0.3 * loser.kl.sum() - 0.3 * winner.kl.sum().detach())
        loss = loss + (1 + (-margin).exp()).log()
    metrics = metrics_of(pairs, lambda side: 0.3 * side.log_ratio)
    metrics["kl_chosen"] = (sum(float(winner.kl.detach().sum()) for winner, _ in pairs), len(pairs))
    metrics["kl_rejected"] = (sum(float(loser.kl.detach().sum()) for _, loser in pairs), len(pairs))
    return loss, metrics


@pytest.mark.parametrize(("vocab", "padded"), VOCABULARIES)
@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_equals_dense(workers: Workers, variant: str, tp: int, vocab: int, padded: int) -> None:
    case, section = make_case(LENGTHS, vocab=vocab, padded=padded), SECTION | {"variant": variant}
    assert_equals_dense(workers, tp, section, "policy", case, partial(dense, variant=variant), FULL_PAIRS)


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_identical_models_give_ln_2(workers: Workers, variant: str) -> None:
    case = make_case([3, 1, 2, 4], same=True)
    for result in workers.run(2, run_sharded, SECTION | {"variant": variant}, "policy", case):
        assert float(result.output.loss_sum) == pytest.approx(2 * math.log(2), rel=1e-14)
        assert float(result.output.metrics["kl_chosen"][0]) == float(result.output.metrics["kl_rejected"][0]) == 0.0


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_cut_does_not_matter(workers: Workers, variant: str) -> None:
    assert_cut_does_not_matter(workers, SECTION | {"variant": variant}, "policy", make_case(LENGTHS), CUTS)


def test_published_defaults() -> None:
    config = algorithms.build({"name": "tdpo"}).config
    assert (config.variant, config.beta, config.alpha) == ("tdpo2", 0.1, 0.5)
    assert algorithms.build({"name": "tdpo"}).frozen == {"reference": "distribution"}
