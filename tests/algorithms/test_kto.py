"""KTO against a dense reference, and its KL over mismatched rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_aligndistil import algorithms
from megatron_aligndistil.algorithms.base import Frozen, Scored
from megatron_aligndistil.data.batch import Responses
from tests.algorithms.cases import Case, make_case, run_sharded
from tests.algorithms.checks import assert_cut_does_not_matter, assert_equals_dense
from tests.shards import assert_same
from tests.workers import Workers

SECTION = {"name": "kto", "beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.75}
LENGTHS = [3, 1, 0, 4, 2]
RATINGS = (1.0, 0.0, math.nan, 0.0, 1.0)


def case_of(kl: float, **options) -> Case:
    kl_estimate = torch.tensor(kl, dtype=torch.float64)
    return replace(make_case(LENGTHS, **options), ratings=RATINGS, prepared={"kl": kl_estimate})


def dense(case: Case) -> tuple[Tensor, dict[str, tuple[float, int]]]:
    """Row by row, z0 a plain number."""
    index_T = torch.arange(len(case.targets_T))
    policy_T, reference_T = (
        case.logits(name).log_softmax(1)[index_T, case.targets_T] for name in ("policy", "reference")
    )
    z0 = max(0.0, float(case.prepared["kl"]))
    loss = torch.zeros((), dtype=torch.float64)
    sums = {"accuracy": 0.0} | {f"{key}_{side}desirable": 0.0 for key in ("reward", "logps") for side in ("", "un")}
    counts = {"": 0, "un": 0}
    for span, rating in zip(case.spans, case.ratings, strict=True):
        if span.stop == span.start:
            continue
        ratio = (policy_T[span] - reference_T[span]).sum()
        side = "" if rating == 1 else "un"
        if rating == 1:
            loss = loss + 1.5 * (1 - 1 / (1 + (-0.3 * (ratio - z0)).exp()))
        else:
            loss = loss + 0.75 * (1 - 1 / (1 + (-0.3 * (z0 - ratio)).exp()))
        counts[side] += 1
        sums["accuracy"] += float(ratio > z0 if rating == 1 else ratio < z0)
        sums[f"reward_{side}desirable"] += 0.3 * float(ratio.detach())
        sums[f"logps_{side}desirable"] += float(policy_T[span].detach().sum())
    metrics = {name: (total, counts["un" if "_un" in name else ""]) for name, total in sums.items()}
    metrics["accuracy"] = (sums["accuracy"], 4)
    metrics |= {"kl": (4 * z0, 4), "kl_estimate": (4 * float(case.prepared["kl"]), 4)}
    return loss, metrics


@pytest.mark.parametrize(("tp", "vocab", "padded"), [(1, 10, 16), (2, 10, 16), (4, 9, 12)])
@pytest.mark.parametrize("kl", [0.7, -0.4])
def test_equals_dense(workers: Workers, tp: int, vocab: int, padded: int, kl: float) -> None:
    case = case_of(kl, vocab=vocab, padded=padded)
    assert_equals_dense(workers, tp, SECTION, "policy", case, dense, count=4)


def test_large_logits(workers: Workers) -> None:
    assert_equals_dense(workers, 2, SECTION, "policy", case_of(0.7, scale=100.0), dense, count=4)


def test_identical_models_lose_half_of_each_weight(workers: Workers) -> None:
    for result in workers.run(2, run_sharded, SECTION, "policy", case_of(0.0, same=True)):
        assert float(result.output.loss_sum) == pytest.approx((2 * 1.5 + 2 * 0.75) / 2, rel=1e-14)
        assert float(result.output.metrics["accuracy"][0]) == 0
        assert float(result.hidden_grad_TH.abs().max()) > 1e-3


def test_cut_does_not_matter(workers: Workers) -> None:
    cuts = [[[0], [1], [2], [3], [4]], [[4, 0], [1, 2, 3]], [[1, 3], [0, 2, 4]]]  # rows of one rating, then of both
    assert_cut_does_not_matter(workers, SECTION, "policy", case_of(0.7), cuts)


def scored(rows: list[list[float]]) -> Scored:
    """A micro-batch of rows with these log-probabilities; the reference's are -1 each."""
    policy_T = torch.tensor([value for row in rows for value in row])
    lengths_B = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    rows_T = torch.arange(len(rows)).repeat_interleave(lengths_B)
    frozen = {"policy": Frozen(logprobs_T=policy_T), "reference": Frozen(logprobs_T=-torch.ones_like(policy_T))}
    return Scored(Responses(torch.zeros_like(rows_T), rows_T, lengths_B), frozen)


def test_the_kl_is_the_mean_over_rows_of_the_global_batch() -> None:
    """Five rows of log-ratios 2.5, -0.5, 1, 0.25 and 3, and a filler, over micro-batches and two ranks."""
    algorithm = algorithms.build(SECTION)
    ranks = [
        [scored([[0.5, 0.0], [-1.5]]), scored([[0.0], []])],
        [scored([[-1.0, -0.75], [2.0]]), scored([[], []])],
    ]
    sums: list[Tensor] = []
    for mismatched in ranks:
        algorithm.prepare([], mismatched, lambda part: sums.append(part) or part)
    for mismatched in ranks:
        prepared = algorithm.prepare([scored([])] * 3, mismatched, lambda part: sums[0] + sums[1])
        assert len(prepared) == 3
        for each in prepared:
            assert_same(each["kl"], torch.tensor((2.5 - 0.5 + 1 + 0.25 + 3) / 5, dtype=torch.float64), 1e-14)


def test_no_mismatched_row_gives_no_kl() -> None:
    (prepared,) = algorithms.build(SECTION).prepare([scored([])], [scored([[]])], lambda part: part)
    assert float(prepared["kl"]) == 0.0
