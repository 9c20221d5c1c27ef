"""REINFORCE with the contrastive DPO reward against a dense reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.algorithms.cases import Case, make_case
from tests.algorithms.checks import assert_cut_does_not_matter, assert_equals_dense
from tests.shards import SIZES
from tests.workers import Workers

LENGTHS = [3, 0, 1, 5]


def section(level: str) -> dict[str, object]:
    return {"name": "reinforce", "level": level, "beta0": 0.3, "beta": 0.2}


def dense(level: str, case: Case) -> tuple[Tensor, dict[str, tuple[float, int]]]:
    index_T = torch.arange(len(case.targets_T))
    policy, dpo, reverse = (
        case.logits(name).log_softmax(1)[index_T, case.targets_T] for name in ("policy", "dpo", "reverse")
    )
    contrastive = 0.3 * (dpo - reverse).detach()
    kl = (policy - dpo).detach()
    loss = torch.zeros((), dtype=torch.float64)
    for span, length in zip(case.spans, case.lengths, strict=True):
        if length:
            reward = contrastive[span] - 0.2 * kl[span]
            weight = reward.sum() if level == "sentence" else reward
            loss = loss - (weight * policy[span]).sum() / length
    p_TV = case.logits("policy").detach().softmax(1)
    return loss, {
        "reward_sampled": (float(contrastive.sum()), 3),
        "reward_token": (
            float(sum(contrastive[span].sum() / max(span.stop - span.start, 1) for span in case.spans)),
            3,
        ),
        "entropy": (-float((p_TV * p_TV.log()).sum()), 9),
        "kl_dpo_sequence": (float(kl.sum()), 3),
        "length": (9.0, 3),
    }


@pytest.mark.parametrize("level", ["token", "sentence"])
@pytest.mark.parametrize("tp", SIZES)
def test_equals_dense(workers: Workers, tp: int, level: str) -> None:
    assert_equals_dense(workers, tp, section(level), "policy", make_case(LENGTHS), partial(dense, level), count=3)


@pytest.mark.parametrize("level", ["token", "sentence"])
def test_cut_does_not_matter(workers: Workers, level: str) -> None:
    cuts = [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[1], [0, 2, 3]]]
    assert_cut_does_not_matter(workers, section(level), "policy", make_case(LENGTHS), cuts)
