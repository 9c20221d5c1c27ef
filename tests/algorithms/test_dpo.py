"""DPO, forward and reverse, against a dense reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_aligndistil import algorithms
from tests.algorithms.cases import Case, Result, make_case, run_sharded
from tests.algorithms.checks import assert_cut_does_not_matter, assert_equals_dense
from tests.shards import SIZES, VOCABULARIES, assert_same
from tests.workers import Workers

SECTION = {"name": "dpo", "beta": 0.3}
LENGTHS = [3, 1, 2, 4, 2, 0]  # three pairs: rows 0 and 3, 1 and 4, 2 and 5; the last has an empty rejected response
FULL_PAIRS = 2


def dense(case: Case, reverse: bool = False, beta: float = 0.3) -> tuple[Tensor, dict[str, tuple[float, int]]]:
    """(4), pair by pair."""
    logp_TV = {name: case.logits(name).log_softmax(1) for name in ("policy", "reference")}
    half = len(case.lengths) // 2
    loss = torch.zeros((), dtype=torch.float64)
    sums = dict.fromkeys(
        ["accuracy", "margin", "reward_chosen", "reward_rejected", "logps_chosen", "logps_rejected"], 0.0
    )
    pairs = 0
    for i in range(half):
        if case.lengths[i] == 0 or case.lengths[half + i] == 0:
            continue
        pairs += 1
        winner, loser = case.spans[i], case.spans[half + i]
        if reverse:
            winner, loser = loser, winner
        summed = {
            (name, which): sum(logp[t, case.targets_T[t]] for t in range(span.start, span.stop))
            for name, logp in logp_TV.items()
            for which, span in (("w", winner), ("l", loser))
        }
        reward_w = beta * (summed["policy", "w"] - summed["reference", "w"])
        reward_l = beta * (summed["policy", "l"] - summed["reference", "l"])
        loss = loss + (1 + (reward_l - reward_w).exp()).log()
        reward_w, reward_l = reward_w.detach(), reward_l.detach()
        sums["accuracy"] += float(reward_w > reward_l)
        sums["margin"] += float(reward_w - reward_l)
        sums["reward_chosen"] += float(reward_w)
        sums["reward_rejected"] += float(reward_l)
        sums["logps_chosen"] += float(summed["policy", "w"].detach())
        sums["logps_rejected"] += float(summed["policy", "l"].detach())
    return loss, {name: (total, pairs) for name, total in sums.items()}


@pytest.mark.parametrize(("vocab", "padded"), VOCABULARIES)
@pytest.mark.parametrize("tp", SIZES)
def test_equals_dense(workers: Workers, tp: int, vocab: int, padded: int) -> None:
    case = make_case(LENGTHS, vocab=vocab, padded=padded)
    assert_equals_dense(workers, tp, SECTION, "dpo", case, dense, FULL_PAIRS)


def test_reverse_equals_dense(workers: Workers) -> None:
    section = SECTION | {"direction": "reverse"}
    case = make_case(LENGTHS)
    assert_equals_dense(workers, 2, section, "reverse", case, lambda whole: dense(whole, reverse=True), FULL_PAIRS)


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


@pytest.mark.parametrize("model", ["dpo", "reverse"])
def test_cut_does_not_matter(workers: Workers, model: str) -> None:
    cuts = [[[0, 3], [1, 4], [2, 5]], [[0, 2, 3, 5], [1, 4]], [[2, 5], [1, 0, 4, 3]]]
    assert_cut_does_not_matter(workers, SECTION | {"direction": "both"}, model, make_case(LENGTHS), cuts)


@pytest.mark.parametrize(
    ("direction", "trained"), [("forward", ("dpo",)), ("reverse", ("reverse",)), ("both", ("dpo", "reverse"))]
)
def test_direction_says_what_is_trained(direction: str, trained: tuple[str, ...]) -> None:
    algorithm = algorithms.build({"name": "dpo", "direction": direction})
    assert algorithm.trained == trained
    assert algorithm.frozen == {"reference": "logprobs"}
    assert algorithm.data == "pairs"
