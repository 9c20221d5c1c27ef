"""Vocab-parallel log-probabilities and divergences: by hand, and against dense fp64 autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.composed import expected_logprobs, label_logprobs, normalisers, reverse_kl
from megatron_aligndistil.ops.head import VocabShard
from tests.shards import SIZES, VOCABULARIES, assert_same, columns, this_shard
from tests.workers import Workers


def logits_of(*shape: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- worked by hand -------------------------------------------------------------------------------------------------


def test_label_logprobs_by_hand() -> None:
    logits_Tv = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64, requires_grad=True)
    logprob_T = label_logprobs(logits_Tv, torch.tensor([0]), VocabShard(0, 2, 2))
    assert logprob_T.item() == pytest.approx(math.log(1 / 4), rel=1e-15)
    logprob_T.sum().backward()
    assert_same(logits_Tv.grad, torch.tensor([[3 / 4, -3 / 4]], dtype=torch.float64), 1e-15)


def test_reverse_kl_by_hand() -> None:
    policy_Tv = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)  # (1/2, 1/2)
    teacher_Tv = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64, requires_grad=True)  # (1/4, 3/4)
    kl_T = reverse_kl(policy_Tv, teacher_Tv, None)
    assert kl_T.item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-14)
    kl_T.sum().backward()
    expected_Tv = torch.tensor([[math.log(3) / 4, -math.log(3) / 4]], dtype=torch.float64)
    assert_same(policy_Tv.grad, expected_Tv, 1e-14)
    assert teacher_Tv.grad is None


# --- against dense autograd -----------------------------------------------------------------------------------------


def sharded_label_logprobs(full_TV: Tensor, targets_T: Tensor, weights_T: Tensor, padded: int) -> tuple[Tensor, Tensor]:
    shard = this_shard(full_TV.size(1), padded)
    logits_Tv = columns(full_TV, shard)
    logprobs_T = label_logprobs(logits_Tv, targets_T, shard)
    (weights_T * logprobs_T).sum().backward()
    return logprobs_T.detach(), logits_Tv.grad


@pytest.mark.parametrize("scale", [3.0, 300.0])
@pytest.mark.parametrize(("vocab", "padded"), VOCABULARIES)
@pytest.mark.parametrize("tp", SIZES)
def test_label_logprobs_equal_dense(workers: Workers, tp: int, vocab: int, padded: int, scale: float) -> None:
    # Every token is a target once, so each side of each shard boundary is.
    full_TV, targets_T, weights_T = logits_of(vocab, vocab, scale=scale), torch.arange(vocab), logits_of(vocab, seed=1)
    full_TV -= 10 * scale  # all negative: the largest logit of an empty shard must not count as 0
    results = workers.run(tp, sharded_label_logprobs, full_TV, targets_T, weights_T, padded)

    full_TV.requires_grad_()
    expected_T = full_TV.log_softmax(1)[torch.arange(vocab), targets_T]
    (weights_T * expected_T).sum().backward()
    for logprobs_T, _ in results:
        assert_same(logprobs_T, expected_T.detach())
    assert_same([grad for _, grad in results], full_TV.grad)


def sharded_divergences(
    policy_TV: Tensor, teacher_TV: Tensor, other_TV: Tensor, weights_T: Tensor, padded: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shard = this_shard(policy_TV.size(1), padded)
    policy_Tv, teacher_Tv, other_Tv = (columns(full_TV, shard) for full_TV in (policy_TV, teacher_TV, other_TV))
    kl_T = reverse_kl(policy_Tv, teacher_Tv, dist.group.WORLD)
    (weights_T * kl_T).sum().backward()
    assert teacher_Tv.grad is None
    expected_KT, found = expected_logprobs(policy_Tv, [teacher_Tv, other_Tv], dist.group.WORLD)
    assert not expected_KT.requires_grad
    logsumexp_KT = torch.stack([n.max_T + n.logsum_T for n in found])
    alone = normalisers([policy_Tv, teacher_Tv, other_Tv], dist.group.WORLD)
    assert torch.equal(logsumexp_KT, torch.stack([n.max_T + n.logsum_T for n in alone]))
    return kl_T.detach(), policy_Tv.grad, expected_KT, logsumexp_KT


@pytest.mark.parametrize("scale", [3.0, 300.0])
@pytest.mark.parametrize(("vocab", "padded"), VOCABULARIES)
@pytest.mark.parametrize("tp", SIZES)
def test_divergences_equal_dense(workers: Workers, tp: int, vocab: int, padded: int, scale: float) -> None:
    policy_TV, teacher_TV, other_TV = (logits_of(5, vocab, scale=scale, seed=seed) for seed in range(3))
    teacher_TV -= 10 * scale
    # Two likely tokens at any scale: were there one, the gradient would be 0 but for rounding.
    policy_TV[:, 0] = policy_TV[:, 1:].amax(1) - 0.5
    weights_T = logits_of(5, seed=3)
    results = workers.run(tp, sharded_divergences, policy_TV, teacher_TV, other_TV, weights_T, padded)

    policy_TV.requires_grad_()
    p_TV, logs = policy_TV.softmax(1), [z.log_softmax(1) for z in (policy_TV, teacher_TV, other_TV)]
    kl_T = (p_TV * (logs[0] - logs[1])).sum(1)
    (weights_T * kl_T).sum().backward()
    for actual_T, _, expected_KT, logsumexp_KT in results:
        assert_same(actual_T, kl_T.detach())
        assert_same(expected_KT, torch.stack([(p_TV * log).sum(1) for log in logs]).detach())
        assert_same(logsumexp_KT, torch.stack([z.logsumexp(1) for z in (policy_TV, teacher_TV, other_TV)]).detach())
    assert_same([grad for _, grad, _, _ in results], policy_TV.grad)


# --- precision and edges --------------------------------------------------------------------------------------------


def fp32_close_to_fp64(policy_TV: Tensor, teacher_TV: Tensor, padded: int) -> list[tuple[float, float]]:
    """(largest error, scale) of fp32 against fp64 on the very same numbers: KL, its gradient, label log-probability."""
    shard = this_shard(policy_TV.size(1), padded)
    targets_T = policy_TV.argmin(1)
    found: list[list[Tensor]] = []
    for dtype in (torch.float32, torch.float64):
        policy_Tv, teacher_Tv = (columns(z.to(dtype), shard) for z in (policy_TV, teacher_TV))
        kl_T = reverse_kl(policy_Tv, teacher_Tv, dist.group.WORLD)
        kl_T.sum().backward()
        grad_Tv = policy_Tv.grad
        logprobs_T = label_logprobs(policy_Tv, targets_T, shard)
        found.append([kl_T.detach(), grad_Tv, logprobs_T.detach()])
    return [
        (float((low.double() - high).abs().max()), float(high.abs().max())) for low, high in zip(*found, strict=True)
    ]


@pytest.mark.parametrize("scale", [20.0, 2000.0])  # |z| up to about 60 and 6,000
def test_fp32_is_accurate_for_large_logits(workers: Workers, scale: float) -> None:
    dpo_TV = logits_of(64, 512, scale=scale, seed=4).float()
    reverse_TV = logits_of(64, 512, scale=scale, seed=5).float()
    policy_TV = logits_of(64, 512, scale=scale, seed=6).float()
    teacher_TV = dpo_TV + 20 * (dpo_TV - reverse_TV)
    for result in workers.run(2, fp32_close_to_fp64, policy_TV, teacher_TV, 512):
        for error, size in result:
            assert error <= 2e-5 * size


def test_fp32_keeps_probabilities_exact_when_all_logits_are_large() -> None:
    # A log-sum-exp near 6,000 in one fp32 number would be off by 2e-4; kept in two parts it is not.
    shifts_Tv = logits_of(32, 64, scale=2.0, seed=7).float()
    logits_Tv = (6000.0 + shifts_Tv).requires_grad_()
    logprobs_T = label_logprobs(logits_Tv, torch.zeros(32, dtype=torch.int64), VocabShard(0, 64, 64))
    expected_T = logits_Tv.detach().double().log_softmax(1)[:, 0]
    assert float((logprobs_T.detach() - expected_T).abs().max()) < 2e-6


def test_bf16_logits_are_reduced_in_fp32() -> None:
    logits_Tv = logits_of(4, 32).bfloat16().requires_grad_()
    kl_T = reverse_kl(logits_Tv, logits_of(4, 32, seed=1).bfloat16(), None)
    kl_T.sum().backward()
    assert kl_T.dtype == torch.float32
    assert logits_Tv.grad is not None and logits_Tv.grad.dtype == torch.bfloat16


def test_equal_distributions_have_no_divergence() -> None:
    logits_Tv = logits_of(6, 11).requires_grad_()
    kl_T = reverse_kl(logits_Tv, logits_Tv.detach() + 5.0, None)
    kl_T.sum().backward()
    assert float(kl_T.detach().abs().max()) < 1e-14
    assert logits_Tv.grad is not None and float(logits_Tv.grad.abs().max()) < 1e-14


def no_positions(padded: int) -> tuple[Tensor, Tensor]:
    shard = this_shard(4, padded)
    logits_Tv = columns(torch.zeros(0, 4, dtype=torch.float64), shard)
    kl_T = reverse_kl(logits_Tv, logits_Tv.detach(), dist.group.WORLD)
    logprobs_T = label_logprobs(logits_Tv, torch.zeros(0, dtype=torch.int64), shard)
    (kl_T.sum() + logprobs_T.sum()).backward()
    assert logits_Tv.grad is not None and logits_Tv.grad.shape == logits_Tv.shape
    return kl_T.detach(), logprobs_T.detach()


@pytest.mark.parametrize("tp", [1, 2])
def test_no_position_at_all(workers: Workers, tp: int) -> None:
    for kl_T, logprobs_T in workers.run(tp, no_positions, 16):
        assert kl_T.shape == logprobs_T.shape == (0,)
