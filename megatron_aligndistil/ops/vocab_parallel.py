"""Normalisers and expectations over a vocabulary that is split across the tensor parallel group.

Every function takes this rank's columns of the logits, [T, v], without padding columns; v may be 0. Arithmetic is in
fp32, or in fp64 when given fp64. Suffixes beside the usual ones: K several models, R the ranks of the group.

A sum over the vocabulary travels as (max, sum) of each rank: the sum is taken relative to the rank's own largest logit,
so nothing overflows, and small numbers are never formed as the difference of large ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


def combine(max_RT: Tensor, sum_RT: Tensor) -> Normaliser:
    """The normaliser from each rank's largest logit and its sum of exp(logit - that), [R, T] both. No collectives."""
    max_T = max_RT.amax(dim=0)
    return Normaliser(max_T, (sum_RT * (max_RT - max_T).exp()).sum(dim=0).log())


def columns(targets_T: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The column of each target in this shard, [T, 1] (any where it is elsewhere), and whether it is here, [T]."""
    column_T = targets_T - shard.start
    return column_T.clamp(0, max(shard.size - 1, 0))[:, None], (column_T >= 0) & (column_T < shard.size)


def target_logits(logits_Tv: Tensor, targets_T: Tensor, shard: VocabShard) -> Tensor:
    """The logit of each target that this rank holds, and 0 elsewhere, [T]."""
    if not shard.size:
        return logits_Tv.new_zeros(len(logits_Tv))
    column_T1, here_T = columns(targets_T, shard)
    return torch.where(here_T, logits_Tv.gather(1, column_T1)[:, 0], 0.0)


def combine_expected(max_RKT: Tensor, sum_RKT: Tensor, weighted_RKT: Tensor) -> tuple[Tensor, list[Normaliser]]:
    """E_p[log q] in nats, [K, T], for each of K models, p being that of the first one; and their normalisers.

    KL(p || q) is the first row less q's row; minus the first row is p's entropy. From each rank's part, [R, K, T]: the
    largest logit, the sum of exp(logit - that), and Σ e·u, with e = exp(logit - largest) of the first model and u =
    logit - largest of each. No collectives.
    """
    found = [combine(max_RKT[:, k], sum_RKT[:, k]) for k in range(max_RKT.size(1))]
    policy_sum_RT = sum_RKT[:, 0]
    share_RT = (max_RKT[:, 0] - found[0].max_T - found[0].logsum_T).exp()
    expected = [
        (share_RT * (weighted_RKT[:, k] + policy_sum_RT * (max_RKT[:, k] - n.max_T - n.logsum_T))).sum(dim=0)
        for k, n in enumerate(found)
    ]
    return torch.stack(expected), found
