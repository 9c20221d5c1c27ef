"""AlignDistil with its four teachers against a dense reference, and against the authors' formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_aligndistil import algorithms
from tests.algorithms.cases import Case, Result, dense_gradients, make_case, run_sharded, with_gradient
from tests.algorithms.checks import assert_cut_does_not_matter, assert_equals_dense
from tests.shards import SIZES, VOCABULARIES, assert_same
from tests.workers import Workers

TEACHERS = ["adaptive", "contrastive", "vanilla", "vanilla_adaptive"]
LENGTHS = [3, 0, 1, 5]
SETTINGS = {"beta0": 0.1, "beta": 0.08, "r": 4.0, "eps": 1e-3}


def section(teacher: str, **changes: Any) -> dict[str, Any]:
    return {"name": "aligndistil", "teacher": teacher} | SETTINGS | changes


def dense(case: Case, teacher: str) -> tuple[Tensor, dict[str, tuple[float, int]]]:
    """(11), (15), (16), (17) and (19), row by row."""
    beta0, beta, r, eps = SETTINGS.values()
    other = "reference" if teacher.startswith("vanilla") else "reverse"
    z_dpo, z_other = case.logits("dpo"), case.logits(other)
    tvd_T = 0.5 * (z_dpo.softmax(1) - z_other.softmax(1)).abs().sum(1)
    alpha_T = r * tvd_T + eps if "adaptive" in teacher else torch.full_like(tvd_T, beta0 / beta)
    if teacher.startswith("vanilla"):
        z_star = alpha_T[:, None] * z_dpo + (1 - alpha_T[:, None]) * z_other
    else:
        z_star = z_dpo + alpha_T[:, None] * (z_dpo - z_other)
    logp_TV = case.logits("policy").log_softmax(1)
    p_TV = logp_TV.exp()

    def kl(z: Tensor) -> Tensor:
        return (p_TV * (logp_TV - z.log_softmax(1))).sum(1)

    rows = [span for span, length in zip(case.spans, case.lengths, strict=True) if length]
    loss = sum((beta0 / alpha_T * kl(z_star))[span].mean() for span in rows)
    assert isinstance(loss, Tensor)
    p_TV, logp_TV = p_TV.detach(), logp_TV.detach()  # for metrics
    reward_T = beta0 * (p_TV * (z_dpo.log_softmax(1) - z_other.log_softmax(1))).sum(1)
    tokens = len(case.targets_T)
    step_TV = z_dpo.log_softmax(1) - z_other.log_softmax(1)
    sampled_T = beta0 * step_TV.gather(1, case.targets_T[:, None])[:, 0]
    return loss, {
        "reward_sampled": (float(sampled_T.sum()), len(rows)),
        "reward_token": (float(sum(sampled_T[span].mean() for span in rows)), len(rows)),
        "entropy": (-float((p_TV * logp_TV).sum()), tokens),
        "reward": (float(reward_T.sum()), len(rows)),
        "kl_teacher": (float(kl(z_star).sum()), tokens),
        "kl_dpo_token": (float(kl(z_dpo).sum()), tokens),
        "kl_dpo_sequence": (float(kl(z_dpo).sum()), len(rows)),
        f"kl_{other}_token": (float(kl(z_other).sum()), tokens),
        f"kl_{other}_sequence": (float(kl(z_other).sum()), len(rows)),
        "alpha": (float(alpha_T.sum()), tokens),
        "tvd": (float(tvd_T.sum()), tokens),
        "length": (tokens, len(rows)),
    }


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize(("vocab", "padded"), VOCABULARIES)
@pytest.mark.parametrize("tp", SIZES)
def test_equals_dense(workers: Workers, tp: int, vocab: int, padded: int, teacher: str) -> None:
    case = make_case(LENGTHS, vocab=vocab, padded=padded)
    assert_equals_dense(workers, tp, section(teacher), "policy", case, lambda whole: dense(whole, teacher), count=3)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_logits_x_100_equal_dense(workers: Workers, teacher: str) -> None:
    case = make_case(LENGTHS, scale=100.0)
    assert_equals_dense(workers, 4, section(teacher), "policy", case, lambda whole: dense(whole, teacher), count=3)


@pytest.mark.parametrize("teacher", ["adaptive", "contrastive"])
def test_cut_does_not_matter(workers: Workers, teacher: str) -> None:
    cuts = [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[1], [3, 0, 2]]]
    assert_cut_does_not_matter(workers, section(teacher), "policy", make_case(LENGTHS), cuts)


def authors(case: Case, beta: float, beta2: float) -> Tensor:
    """Off-policy loss as the authors' code computes it, summed over sequences (it then averages over the batch)."""
    z_dpo, z_rev = case.logits("dpo"), case.logits("reverse")
    weight = ((z_dpo.softmax(-1) - z_rev.softmax(-1)).abs().sum(-1) * beta2 + 1e-3).unsqueeze(-1)
    target = (z_dpo + weight * (z_dpo - z_rev)).softmax(-1)
    logp = case.logits("policy").log_softmax(-1)
    divergence = (logp.exp() * (logp - target.log())).sum(-1) * (beta / weight).squeeze(-1)
    total = sum(divergence[span].sum() / (span.stop - span.start) for span in case.spans)
    assert isinstance(total, Tensor)
    return total


def test_official_compat_is_the_authors_loss(workers: Workers) -> None:
    case = make_case([3, 1, 5])
    compat = section("adaptive", r=10.0, official_compat=True)
    results: list[Result] = workers.run(2, run_sharded, compat, "policy", case)
    whole = with_gradient(case)
    loss = authors(whole, beta=0.1, beta2=10.0)
    hidden_TH, weight_HV = dense_gradients(loss, whole)
    assert_same(results[0].output.loss_sum, loss.detach())
    assert_same(results[0].hidden_grad_TH, hidden_TH)
    assert_same([result.weight_grad_Hv for result in results], weight_HV)

    # Without the ½, a coefficient of r/2 gives the paper's loss at r; the metric tvd keeps its ½.
    paper: Result = workers.run(2, run_sharded, section("adaptive", r=20.0), "policy", case)[0]
    for name, (total, _) in results[0].output.metrics.items():
        assert_same(total.double(), paper.output.metrics[name][0].double(), 1e-13)
    # The late mask's last position predicts no token of the response, so nothing is said of sampled tokens.
    assert paper.output.metrics.keys() - results[0].output.metrics.keys() == {"reward_sampled", "reward_token"}
    assert algorithms.build(compat).shifted_mask
    assert not algorithms.build(section("adaptive")).shifted_mask


def test_identical_models(workers: Workers) -> None:
    case = make_case(LENGTHS, same=True)
    for result in workers.run(2, run_sharded, section("adaptive"), "policy", case):
        metrics = {name: float(total / count) for name, (total, count) in result.output.metrics.items()}
        assert metrics["alpha"] == pytest.approx(SETTINGS["eps"], rel=1e-12)
        assert metrics["tvd"] == metrics["reward"] == 0.0
        assert abs(float(result.output.loss_sum)) < 1e-11
        assert float(result.hidden_grad_TH.abs().max()) < 1e-11


def test_constant_teacher_is_the_adaptive_one_without_its_rate(workers: Workers) -> None:
    # α_t = 0·TVD_t + ε with ε = β0/β is the constant coefficient.
    case = make_case(LENGTHS)
    for constant, adaptive in (("contrastive", "adaptive"), ("vanilla", "vanilla_adaptive")):
        one: Result = workers.run(2, run_sharded, section(constant, beta=0.05), "policy", case)[0]
        two: Result = workers.run(2, run_sharded, section(adaptive, r=0.0, eps=2.0), "policy", case)[0]
        assert_same(one.output.loss_sum, two.output.loss_sum, 1e-15)
        assert_same(one.hidden_grad_TH, two.hidden_grad_TH, 1e-15)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_what_is_needed(teacher: str) -> None:
    algorithm = algorithms.build({"name": "aligndistil", "teacher": teacher})
    other = "reference" if teacher.startswith("vanilla") else "reverse"
    assert dict(algorithm.frozen) == {"dpo": "distribution", other: "distribution"}
    assert algorithm.trained == ("policy",)
    assert algorithm.data == "responses"
