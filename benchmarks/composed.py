"""The same mathematics from whole logits [T, v]: what the fused operations are measured against.

Plain functions that compose: log-probabilities, the teacher, and the KL, each with its exact gradient under tensor
parallelism. Several [T, v] tensors are alive at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aligndistil.ops.collectives import gather_ranks, sum_ranks
from megatron_aligndistil.ops.head import VocabShard
from megatron_aligndistil.ops.vocab_parallel import Normaliser, columns, combine, combine_expected, in_loss_dtype


def shift(logits_Tv: Tensor) -> tuple[Tensor, Tensor]:
    """Logits relative to the largest of this rank, [T, v] <= 0, and that largest logit, [T].

    An empty shard's largest logit is the lowest finite number: its weight exp(max - global max) is then exactly 0.
    """
    logits_Tv = in_loss_dtype(logits_Tv)
    if logits_Tv.size(1) == 0:
        return logits_Tv, logits_Tv.new_full((logits_Tv.size(0),), torch.finfo(logits_Tv.dtype).min)
    max_T = logits_Tv.amax(dim=1)
    return logits_Tv - max_T[:, None], max_T


@torch.no_grad()
def expected_logprobs(
    policy_logits_Tv: Tensor, others: Sequence[Tensor], tp_group: dist.ProcessGroup | None
) -> tuple[Tensor, list[Normaliser]]:
    """E_p[log p] and E_p[log q] for each of `others`, p being the policy's distribution at each position.

    KL(p || q) is the first row less q's row; minus the first row is the policy's entropy. No gradient.

    Args:
        policy_logits_Tv: this rank's columns of the policy's logits.
        others: the same columns of other models' logits, each [T, v].

    Returns:
        Expectations [1 + len(others), T] in nats, the policy's own first, and the normalisers in the same order.
        Collectives: one all-gather of [1 + len(others), 3, T] over `tp_group`.
    """
    # With e = exp(z - m_r) of the policy on rank r, p is e times the rank's share exp(m_r - M) / Z; and with shifted
    # logits u = z' - m'_r of any model, its log-probability is u + (m'_r - M' - log Z'). Sums of e and e·u suffice.
    shifted_Tv, max_T = shift(policy_logits_Tv)
    weight_Tv = shifted_Tv.exp()
    local = [torch.stack([max_T, weight_Tv.sum(dim=1), (weight_Tv * shifted_Tv).sum(dim=1)])]
    for logits_Tv in others:
        shifted_Tv, max_T = shift(logits_Tv)
        local.append(torch.stack([max_T, shifted_Tv.exp().sum(dim=1), (weight_Tv * shifted_Tv).sum(dim=1)]))
    max_RKT, sum_RKT, weighted_RKT = gather_ranks(torch.stack(local), tp_group).unbind(dim=2)

    return combine_expected(max_RKT, sum_RKT, weighted_RKT)


@torch.no_grad()
def normalisers(logits: Sequence[Tensor], tp_group: dist.ProcessGroup | None) -> list[Normaliser]:
    """The normaliser of each of K models' logits [T, v]. No gradient.

    Collectives: one all-gather of [K, 2, T] over `tp_group`.
    """
    pairs = []
    for logits_Tv in logits:
        shifted_Tv, max_T = shift(logits_Tv)
        pairs.append(torch.stack([max_T, shifted_Tv.exp().sum(dim=1)]))
    pairs_RK2T = gather_ranks(torch.stack(pairs), tp_group)
    return [combine(pairs_RK2T[:, k, 0], pairs_RK2T[:, k, 1]) for k in range(len(pairs))]


class _LabelLogprobs(torch.autograd.Function):
    """d logprob / d z_v = [v is the target] - p_v; replicated output, so no collective in the backward."""

    @staticmethod
    def forward(ctx, logits_Tv: Tensor, targets_T: Tensor, shard: VocabShard) -> Tensor:
        shifted_Tv, max_T = shift(logits_Tv)
        column_T1, here_T = columns(targets_T, shard)
        target_T = torch.zeros_like(max_T)
        if shard.size:
            target_T = torch.where(here_T, in_loss_dtype(logits_Tv).gather(1, column_T1)[:, 0], target_T)
        parts_R3T = gather_ranks(torch.stack([max_T, shifted_Tv.exp().sum(dim=1), target_T]), shard.tp_group)
        normaliser = combine(parts_R3T[:, 0], parts_R3T[:, 1])
        if ctx.needs_input_grad[0]:
            grad_Tv = -normaliser.logprobs(logits_Tv).exp()
            if shard.size:
                grad_Tv.scatter_add_(1, column_T1, here_T[:, None].to(grad_Tv.dtype))
            ctx.save_for_backward(grad_Tv)
            ctx.dtype = logits_Tv.dtype
        return (parts_R3T[:, 2].sum(dim=0) - normaliser.max_T) - normaliser.logsum_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T: Tensor):
        (grad_Tv,) = ctx.saved_tensors
        return (grad_T[:, None] * grad_Tv).to(ctx.dtype), None, None


def label_logprobs(logits_Tv: Tensor, targets_T: Tensor, shard: VocabShard) -> Tensor:
    """Log-probability of each target token, [T], in nats, the same on every rank.

    Args:
        logits_Tv: this rank's columns, any floating dtype.
        targets_T: int64 token ids in 0..shard.vocab_size-1.
        shard: which columns these are.

    Gradient flows into this rank's logits, exactly. Collectives: forward one all-gather of [3, T] over
    ``shard.tp_group``; backward none.
    """
    return _LabelLogprobs.apply(logits_Tv, targets_T, shard)


class _ReverseKL(torch.autograd.Function):
    """dKL/dz_v = p_v (log p_v - log q_v - KL); replicated output, so no collective in the backward."""

    @staticmethod
    def forward(ctx, policy_logits_Tv: Tensor, teacher_logits_Tv: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
        expected_KT, (policy, teacher) = expected_logprobs(policy_logits_Tv, [teacher_logits_Tv], tp_group)
        kl_T = expected_KT[0] - expected_KT[1]
        if ctx.needs_input_grad[0]:
            logp_Tv = policy.logprobs(policy_logits_Tv)
            ctx.save_for_backward(logp_Tv.exp() * (logp_Tv - teacher.logprobs(teacher_logits_Tv) - kl_T[:, None]))
            ctx.dtype = policy_logits_Tv.dtype
        return kl_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T: Tensor):
        (grad_Tv,) = ctx.saved_tensors
        return (grad_T[:, None] * grad_Tv).to(ctx.dtype), None, None


def reverse_kl(policy_logits_Tv: Tensor, teacher_logits_Tv: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """KL(policy || teacher) over the whole vocabulary at each position, [T], in nats (inside eq. 18 and 19).

    Args:
        policy_logits_Tv: this rank's columns, any floating dtype.
        teacher_logits_Tv: the same columns of the teacher.

    Gradient flows into the policy's logits only: p (log p - log q - KL), exactly; it is formed in the forward pass, so
    one [T, v] tensor is kept. Collectives: forward one all-gather of [2, 3, T] over `tp_group`; backward none.
    """
    return _ReverseKL.apply(policy_logits_Tv, teacher_logits_Tv.detach(), tp_group)


@dataclass(frozen=True)
class Teacher:
    """The composed teacher π* at each position. Nothing here carries a gradient.

    Attributes:
        logits_Tv: z*, this rank's columns, in the dtype of loss arithmetic.
        alpha_T: the coefficient of the extrapolation.
        tvd_T: total variation distance between the two models, in [0, 1].
    """

    logits_Tv: Tensor
    alpha_T: Tensor
    tvd_T: Tensor


@torch.no_grad()
def compose_teacher(
    base_logits_Tv: Tensor,
    positive_logits_Tv: Tensor,
    negative_logits_Tv: Tensor,
    *,
    rate: float,
    offset: float,
    tp_group: dist.ProcessGroup | None,
) -> Teacher:
    """z* = base + α (positive - negative), with α_t = rate · TVD_t + offset (AlignDistil, eq. 11, 15, 16 and 17).

    ======================  ==========  ==============  =========
    teacher                 base        positive        negative
    ======================  ==========  ==============  =========
    vanilla (11)            reference   dpo             reference
    contrastive, 17         dpo         dpo             reverse
    ======================  ==========  ==============  =========

    A constant α is ``rate=0, offset=α``; the paper's adaptive one is ``rate=r, offset=ε`` (16). The authors' code
    leaves out the ½ of TVD_t = ½ Σ_v |p(v) - q(v)|: that is ``rate=2·r``.

    Args:
        base_logits_Tv, positive_logits_Tv, negative_logits_Tv: this rank's columns; may be the same tensor.

    Collectives over `tp_group`: one all-gather of [2, 2, T] and one all-reduce of [T]. No gradient.
    """
    positive, negative = normalisers([positive_logits_Tv, negative_logits_Tv], tp_group)
    difference_Tv = positive.logprobs(positive_logits_Tv).exp() - negative.logprobs(negative_logits_Tv).exp()
    tvd_T = 0.5 * sum_ranks(difference_Tv.abs().sum(dim=1), tp_group)
    alpha_T = rate * tvd_T + offset
    step_Tv = in_loss_dtype(positive_logits_Tv) - in_loss_dtype(negative_logits_Tv)
    return Teacher(in_loss_dtype(base_logits_Tv) + alpha_T[:, None] * step_Tv, alpha_T, tvd_T)
