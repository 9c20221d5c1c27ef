"""Supervised fine-tuning against a dense reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_aligndistil import algorithms
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.ops.head import LMHead, VocabShard
from tests.algorithms.cases import Case, make_case
from tests.algorithms.checks import assert_cut_does_not_matter, assert_equals_dense
from tests.shards import SIZES, VOCABULARIES
from tests.workers import Workers

SECTION = {"name": "sft"}


def dense(case: Case) -> tuple[Tensor, dict[str, tuple[float, int]]]:
    logp_TV = case.logits("policy").log_softmax(1)
    loss = -torch.stack([logp_TV[t, target] for t, target in enumerate(case.targets_T.tolist())]).sum()
    return loss, {}


def test_by_hand() -> None:
    # Two positions with probabilities 1/4 and 3/4 of their tokens.
    head = LMHead(
        torch.eye(2, dtype=torch.float64), torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]]).double().T,
        VocabShard(0, 2, 2),
    )  # fmt: skip
    responses = Responses(torch.tensor([0, 0]), torch.tensor([0, 0]), torch.tensor([2]))
    output = algorithms.build(SECTION).loss("policy", head, responses, {})
    assert float(output.loss_sum) == pytest.approx(math.log(4) + math.log(4 / 3), rel=1e-7)
    assert int(output.count) == 2


@pytest.mark.parametrize(("vocab", "padded"), VOCABULARIES)
@pytest.mark.parametrize("tp", SIZES)
def test_equals_dense(workers: Workers, tp: int, vocab: int, padded: int) -> None:
    case = make_case([3, 0, 1, 5], vocab=vocab, padded=padded)
    assert_equals_dense(workers, tp, SECTION, "policy", case, dense, count=9)


def test_cut_does_not_matter(workers: Workers) -> None:
    cuts = [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[1], [0, 2, 3]]]
    assert_cut_does_not_matter(workers, SECTION, "policy", make_case([3, 0, 1, 5]), cuts)
