"""Label log-probabilities of two models and the divergence between them, chunk by chunk, over a split vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aligndistil.ops.chunks import chunks, gradients, logits_of
from megatron_aligndistil.ops.collectives import gather_ranks
from megatron_aligndistil.ops.head import LMHead
from megatron_aligndistil.ops.passes import Normalised, label_gradient, statistics
from megatron_aligndistil.ops.vocab_parallel import Normaliser, combine_expected, in_loss_dtype, target_logits


@dataclass(frozen=True)
class ForwardKL:
    """What :func:`forward_kl` finds at each position, [T] and in nats, the same on every rank.

    Attributes:
        logprobs_T: log π_θ(y_t), with gradient.
        reference_T: log π_ref(y_t), without.
        kl_T: KL(π_ref ‖ π_θ) over the full vocabulary, with gradient.
    """

    logprobs_T: Tensor
    reference_T: Tensor
    kl_T: Tensor


def forward_kl(policy: LMHead, reference: LMHead, targets_T: Tensor, rows: int | None = None) -> ForwardKL:
    """Log-probabilities of the targets under both models, and KL(π_ref ‖ π_θ) = Σ_v π_ref (log π_ref - log π_θ).

    Args:
        policy, reference: hidden states [T, H] with this rank's rows [v, H] of each output layer.
        targets_T: int64 token ids in 0..shard.vocab_size-1.
        rows: positions in a chunk; chosen by device and vocabulary where None. Changes nothing but rounding.

    Gradient flows into the policy's hidden states and output layer only, exactly: with upstream gradients g of the
    log-probability and h of the divergence, g ([v is the target] - π_θ(v)) + h (π_θ(v) - π_ref(v)) into the policy's
    logits. It needs these at each position first, so both models' logits are formed once more in the backward.
    Collectives over ``policy.shard.tp_group``: one all-gather of [4, 2, C] a chunk forward; backward one all-reduce of
    [T, H].
    """
    return ForwardKL(*_ForwardKL.apply(policy.hidden_TH, policy.weight_vH, policy, reference, targets_T, rows))


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_vH: Tensor,
        policy: LMHead,
        reference: LMHead,
        targets_T: Tensor,
        rows: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = [_forward_chunk(policy, reference, targets_T, each) for each in chunks(policy, rows)]
        found_7T = torch.cat(parts, dim=1) if parts else in_loss_dtype(hidden_TH.new_zeros(7, 0))
        logprobs_T, reference_T, kl_T, *normalisers = found_7T.unbind()
        ctx.save_for_backward(hidden_TH, weight_vH, reference.hidden_TH, reference.weight_vH, targets_T, *normalisers)
        ctx.shard, ctx.rows, ctx.main_grad_vH = policy.shard, rows, policy.main_grad_vH
        ctx.mark_non_differentiable(reference_T)
        return logprobs_T, reference_T, kl_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_T: Tensor, _: Tensor, kl_grad_T: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden_TH, weight_vH, reference_TH, reference_vH, targets_T, *normalisers = ctx.saved_tensors
        policy = LMHead(hidden_TH, weight_vH, ctx.shard, ctx.main_grad_vH)
        reference = LMHead(reference_TH, reference_vH, ctx.shard)

        def of_logits(rows: slice) -> Tensor:
            own = Normalised(logits_of(policy, rows), Normaliser(*(part_T[rows] for part_T in normalisers[:2])))
            other = Normalised(logits_of(reference, rows), Normaliser(*(part_T[rows] for part_T in normalisers[2:])))
            columns_C = targets_T[rows] - policy.shard.start
            return label_gradient(own, columns_C, grad_T[rows], other, kl_grad_T[rows])

        return *gradients(policy, ctx.rows, of_logits), None, None, None, None


def _forward_chunk(policy: LMHead, reference: LMHead, targets_T: Tensor, rows: slice) -> Tensor:
    """At each position of a chunk, [7, C]: the three results, then the two parts of each model's normaliser."""
    logits = [logits_of(head, rows) for head in (reference, policy)]
    targets_2C = torch.stack([target_logits(logits_Cv, targets_T[rows], policy.shard) for logits_Cv in logits])
    local_42C = torch.cat([statistics(logits), targets_2C[None]])
    max_RKC, sum_RKC, weighted_RKC, target_RKC = gather_ranks(local_42C, policy.shard.tp_group).unbind(1)
    # The expectations are the reference's: it is the first of the two models here.
    (expected_other_C, expected_own_C), found = combine_expected(max_RKC, sum_RKC, weighted_RKC)
    other_logprob_C, own_logprob_C = (
        (target_C - n.max_T) - n.logsum_T for target_C, n in zip(target_RKC.sum(dim=0), found, strict=True)
    )
    normalisers = [part for n in reversed(found) for part in (n.max_T, n.logsum_T)]
    return torch.stack([own_logprob_C, other_logprob_C, expected_other_C - expected_own_C, *normalisers])
