"""The divergence from the reference with both label log-probabilities: by hand, and against dense fp64 autograd."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.ops import collectives
from megatron_aligndistil.ops.forward_kl import forward_kl
from megatron_aligndistil.ops.head import LMHead, VocabShard
from tests.ops.test_distil import Case, _Largest, assert_equal_lists, make_case
from tests.shards import SIZES, VOCABULARIES, assert_same, this_shard
from tests.workers import Workers


def weights_of(case: Case) -> tuple[Tensor, Tensor]:
    """What each position's log-probability and divergence count for, both signs among them."""
    return case.weights_T - 0.4, torch.flip(case.weights_T, (0,)) - 0.2


def fused(case: Case, rows: int | None, padded: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Everything found at each position, and the gradients of a weighted sum; call it in a worker."""
    policy, reference, _ = case.heads(this_shard(len(case.weights[0]), padded), dtype)
    found = forward_kl(policy, reference, case.targets_T, rows)
    assert not found.reference_T.requires_grad
    by_logprob_T, by_kl_T = weights_of(case)
    (by_logprob_T * found.logprobs_T + by_kl_T * found.kl_T).sum().backward()
    assert policy.hidden_TH.grad is not None and policy.weight_vH.grad is not None
    values = [found.logprobs_T.detach(), found.reference_T, found.kl_T.detach()]
    return [*values, policy.hidden_TH.grad, policy.weight_vH.grad]


def dense(case: Case) -> list[Tensor]:
    """The same by plain autograd from whole logits in fp64."""
    hidden_TH, weight_VH = case.hidden[0].clone().requires_grad_(), case.weights[0].clone().requires_grad_()
    policy_TV = (hidden_TH @ weight_VH.T).log_softmax(1)
    reference_TV = (case.hidden[1] @ case.weights[1].T).log_softmax(1)
    kl_T = (reference_TV.exp() * (reference_TV - policy_TV)).sum(1)
    logprobs_T, reference_T = (each.gather(1, case.targets_T[:, None])[:, 0] for each in (policy_TV, reference_TV))
    by_logprob_T, by_kl_T = weights_of(case)
    (by_logprob_T * logprobs_T + by_kl_T * kl_T).sum().backward()
    assert hidden_TH.grad is not None and weight_VH.grad is not None
    return [logprobs_T.detach(), reference_T, kl_T.detach(), hidden_TH.grad, weight_VH.grad]


def test_by_hand() -> None:
    shard = VocabShard(0, 2, 2)
    one_TH = torch.ones(1, 1, dtype=torch.float64)
    weight_vH = torch.tensor([[0.0], [math.log(3.0)]], dtype=torch.float64, requires_grad=True)  # (1/4, 3/4)
    reference = LMHead(one_TH, torch.zeros(2, 1, dtype=torch.float64), shard)  # (1/2, 1/2)
    found = forward_kl(LMHead(one_TH, weight_vH, shard), reference, torch.tensor([0]))
    assert found.logprobs_T.item() == pytest.approx(math.log(1 / 4), rel=1e-14)
    assert found.reference_T.item() == pytest.approx(math.log(1 / 2), rel=1e-14)
    assert found.kl_T.item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-14)
    (found.logprobs_T + 2 * found.kl_T).sum().backward()
    # [v is the target] - p, and twice p - q.
    assert_same(weight_vH.grad, torch.tensor([[3 / 4 - 1 / 2], [-3 / 4 + 1 / 2]], dtype=torch.float64), 1e-14)


@pytest.mark.parametrize("scale", [3.0, 20.0])  # logits up to about 10 and 60
@pytest.mark.parametrize(("vocab", "padded"), VOCABULARIES)
@pytest.mark.parametrize("tp", SIZES)
def test_equals_dense(workers: Workers, tp: int, vocab: int, padded: int, scale: float) -> None:
    case = make_case(vocab, vocab, 5, scale=scale)
    case = replace(case, targets_T=torch.arange(vocab))  # each side of each shard boundary
    assert_equal_lists(workers.run(tp, fused, case, None, padded), dense(case), 1e-9)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_chunk_size_changes_nothing(workers: Workers, rows: int) -> None:
    case = make_case(7, 10, 5)
    assert_equal_lists(workers.run(2, fused, case, rows, 16), dense(case), 1e-9)


def test_fp32_is_accurate(workers: Workers) -> None:
    case = make_case(12, 200, 16, scale=15.0)
    case = replace(
        case,
        hidden=[each.float().double() for each in case.hidden],
        weights=[each.float().double() for each in case.weights],
    )
    assert_equal_lists(workers.run(2, fused, case, 5, 256, torch.float32), dense(case), 2e-5)


def test_equal_models_have_no_divergence_at_all() -> None:
    policy, _, _ = make_case(6, 11, 4).heads(VocabShard(0, 11, 11), torch.float32)
    reference = LMHead(policy.hidden_TH.detach(), policy.weight_vH.detach(), policy.shard)
    found = forward_kl(policy, reference, torch.arange(6))
    found.kl_T.sum().backward()
    assert not found.kl_T.any() and torch.equal(found.logprobs_T, found.reference_T)
    assert policy.weight_vH.grad is not None and not policy.weight_vH.grad.any()


def test_no_positions_at_all(workers: Workers) -> None:
    for found in workers.run(2, fused, make_case(0, 10, 4), None, 16, torch.float32):
        assert found[0].shape == found[1].shape == found[2].shape == (0,)
        assert found[-2].shape == (0, 4) and not found[-1].any()


def test_nothing_of_all_positions_by_vocabulary() -> None:
    case, rows = make_case(64, 96, 4), 8
    policy, reference, _ = case.heads(VocabShard(0, 96, 96), torch.float32)
    with _Largest() as largest:
        found = forward_kl(policy, reference, case.targets_T, rows)
        (found.logprobs_T + found.kl_T).sum().backward()
    assert largest.elements == rows * 96


def count_collectives(case: Case, rows: int) -> list[int]:
    """All-gathers and all-reduces of a forward and a backward pass; call it in a worker."""
    policy, reference, _ = case.heads(this_shard(96, 96), torch.float32)
    with (
        patch.object(collectives.dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor) as gathers,
        patch.object(collectives.dist, "all_reduce", wraps=dist.all_reduce) as reductions,
    ):
        found = forward_kl(policy, reference, case.targets_T, rows)
        forward = [gathers.call_count, reductions.call_count]
        (found.logprobs_T + found.kl_T).sum().backward()
        return [*forward, gathers.call_count, reductions.call_count]


def test_one_collective_a_chunk(workers: Workers) -> None:
    # And one all-reduce of the hidden states' gradient.
    assert workers.run(2, count_collectives, make_case(20, 96, 4), 5) == [[4, 0, 4, 1]] * 2


def test_gradients_reach_main_grad_unrounded() -> None:
    """bf16 weights with an fp32 buffer: it gets the gradient that fp32 arithmetic gives, and autograd gets zeros."""
    case = make_case(6, 20, 4)
    plain, reference, _ = case.heads(VocabShard(0, 20, 20), torch.bfloat16)
    buffer_vH = torch.full((20, 4), 2.0)
    head = replace(plain, weight_vH=plain.weight_vH.detach().clone().requires_grad_(), main_grad_vH=buffer_vH)
    for each in (plain, head):
        found = forward_kl(each, reference, case.targets_T, 4)
        (found.logprobs_T + found.kl_T).sum().backward()
    assert head.weight_vH.grad is not None and not head.weight_vH.grad.any()
    assert plain.weight_vH.grad is not None
    added_vH = buffer_vH - 2.0
    assert not torch.equal(added_vH, added_vH.bfloat16().float())
    torch.testing.assert_close(added_vH, plain.weight_vH.grad.float(), rtol=1e-2, atol=1e-4)
