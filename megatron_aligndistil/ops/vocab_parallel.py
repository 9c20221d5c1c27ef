"""Normalisers and expectations over a vocabulary that is split across the tensor parallel group.

Every function takes this rank's columns of the logits, [T, v], without padding columns; v may be 0. Arithmetic is in
fp32, or in fp64 when given fp64. Suffixes beside the usual ones: K several models, R the ranks of the group.

A sum over the vocabulary travels as (max, sum) of each rank: the sum is taken relative to the rank's own largest logit,
so nothing overflows, and small numbers are never formed as the difference of large ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.ops.collectives import gather_ranks
from megatron_aligndistil.ops.head import VocabShard


@dataclass(frozen=True)
class Normaliser:
    """The log-sum-exp of one model's logits over the whole vocabulary, the same on every rank, kept in two parts.

    Their sum would round: logits of 6,000 in fp32 leave an error of 2e-4 in it, and so in every log-probability.

    Attributes:
        max_T: the largest logit.
        logsum_T: log of the sum of exp(logit - max), between 0 and log V.
    """

    max_T: Tensor
    logsum_T: Tensor

    def logprobs(self, logits_Tv: Tensor) -> Tensor:
        """Log-probabilities of this rank's columns, [T, v], in nats. No collectives."""
        return (in_loss_dtype(logits_Tv) - self.max_T[:, None]) - self.logsum_T[:, None]


def in_loss_dtype(logits_Tv: Tensor) -> Tensor:
    """`logits_Tv` in the dtype of loss arithmetic: fp32, or fp64 when it is fp64."""
    return logits_Tv.to(torch.promote_types(logits_Tv.dtype, torch.float32))


def shift(logits_Tv: Tensor) -> tuple[Tensor, Tensor]:
    """Logits relative to the largest of this rank, [T, v] <= 0, and that largest logit, [T].

    An empty shard's largest logit is the lowest finite number: its weight exp(max - global max) is then exactly 0.
    """
    logits_Tv = in_loss_dtype(logits_Tv)
    if logits_Tv.size(1) == 0:
        return logits_Tv, logits_Tv.new_full((logits_Tv.size(0),), torch.finfo(logits_Tv.dtype).min)
    max_T = logits_Tv.amax(dim=1)
    return logits_Tv - max_T[:, None], max_T


def combine(max_RT: Tensor, sum_RT: Tensor) -> Normaliser:
    """The normaliser from each rank's largest logit and its sum of exp(logit - that), [R, T] both. No collectives."""
    max_T = max_RT.amax(dim=0)
    return Normaliser(max_T, (sum_RT * (max_RT - max_T).exp()).sum(dim=0).log())


def columns(targets_T: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The column of each target in this shard, [T, 1] (any where it is elsewhere), and whether it is here, [T]."""
    column_T = targets_T - shard.start
    return column_T.clamp(0, max(shard.size - 1, 0))[:, None], (column_T >= 0) & (column_T < shard.size)


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


def combine_expected(max_RKT: Tensor, sum_RKT: Tensor, weighted_RKT: Tensor) -> tuple[Tensor, list[Normaliser]]:
    """What :func:`expected_logprobs` returns, from each rank's part of it; the policy is the first of the K models.

    Of each rank and model, [R, K, T]: the largest logit, the sum of exp(logit - that), and Σ e·u, with e = exp(logit -
    largest) of the policy and u = logit - largest of the model. No collectives.
    """
    found = [combine(max_RKT[:, k], sum_RKT[:, k]) for k in range(max_RKT.size(1))]
    policy_sum_RT = sum_RKT[:, 0]
    share_RT = (max_RKT[:, 0] - found[0].max_T - found[0].logsum_T).exp()
    expected = [
        (share_RT * (weighted_RKT[:, k] + policy_sum_RT * (max_RKT[:, k] - n.max_T - n.logsum_T))).sum(dim=0)
        for k, n in enumerate(found)
    ]
    return torch.stack(expected), found
