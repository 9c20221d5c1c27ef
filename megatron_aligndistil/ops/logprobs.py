"""Log-probabilities of given tokens from hidden states, chunk by chunk, over a split vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aligndistil.ops.chunks import chunks, gradients, logits_of
from megatron_aligndistil.ops.collectives import gather_ranks
from megatron_aligndistil.ops.head import LMHead
from megatron_aligndistil.ops.passes import Normalised, label_gradient, statistics
from megatron_aligndistil.ops.vocab_parallel import Normaliser, combine_expected, in_loss_dtype, target_logits


class _LabelLogprobs(torch.autograd.Function):
    """d logprob / d z_v = [v is the target] - p_v, from logits that are formed once more in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_vH: Tensor, head: LMHead, targets_T: Tensor, rows: int | None
    ) -> tuple[Tensor, Tensor]:
        parts = [_forward_chunk(head, targets_T, each) for each in chunks(head, rows)]
        if not parts:
            empty = in_loss_dtype(hidden_TH.new_zeros(0))
            parts = [(empty, empty, empty, empty)]
        logprobs_T, entropy_T, max_T, logsum_T = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.save_for_backward(hidden_TH, weight_vH, targets_T, max_T, logsum_T)
        ctx.shard, ctx.rows, ctx.main_grad_vH = head.shard, rows, head.main_grad_vH
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_TH, weight_vH, targets_T, max_T, logsum_T = ctx.saved_tensors
        head = LMHead(hidden_TH, weight_vH, ctx.shard, ctx.main_grad_vH)

        def of_logits(rows: slice) -> Tensor:
            own = Normalised(logits_of(head, rows), Normaliser(max_T[rows], logsum_T[rows]))
            return label_gradient(own, targets_T[rows] - head.shard.start, grad_T[rows])

        return *gradients(head, ctx.rows, of_logits), None, None, None


def _forward_chunk(head: LMHead, targets_T: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of the target, entropy, and the two parts of the normaliser at each position of a chunk."""
    logits_Cv = logits_of(head, rows)
    target_C = target_logits(logits_Cv, targets_T[rows], head.shard)
    local_4C = torch.cat([statistics([logits_Cv])[:, 0], target_C[None]])
    max_RC, sum_RC, weighted_RC, target_RC = gather_ranks(local_4C, head.shard.tp_group).unbind(1)
    (expected_C,), (normaliser,) = combine_expected(max_RC[:, None], sum_RC[:, None], weighted_RC[:, None])
    logprob_C = (target_RC.sum(dim=0) - normaliser.max_T) - normaliser.logsum_T
    return logprob_C, -expected_C, normaliser.max_T, normaliser.logsum_T


def label_logprobs(head: LMHead, targets_T: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and entropy of each position's distribution, [T] both, in nats.

    Args:
        head: hidden states [T, H] with this rank's rows [v, H] of the output layer.
        targets_T: int64 token ids in 0..shard.vocab_size-1.
        rows: positions in a chunk; chosen by device and vocabulary where None.

    Gradient flows from the log-probabilities into hidden states and output layer, exactly; none from the entropy. It
    needs the upstream gradient of each position first, so logits are formed once more in the backward. Collectives over
    ``head.shard.tp_group``: one all-gather of [4, C] a chunk forward; backward one all-reduce of [T, H].
    """
    return _LabelLogprobs.apply(head.hidden_TH, head.weight_vH, head, targets_T, rows)


@torch.no_grad()
def expectations(policy: LMHead, others: Sequence[LMHead], rows: int | None = None) -> Tensor:
    """E_p[log p] and E_p[log q] for each of `others`, p being the policy's distribution: [1 + K, T], in nats.

    Collectives over ``policy.shard.tp_group``: one all-gather of [3, 1 + K, C] a chunk. No gradient.
    """
    parts = []
    for each in chunks(policy, rows):
        local_3KC = statistics([logits_of(head, each) for head in (policy, *others)])
        parts.append(combine_expected(*gather_ranks(local_3KC, policy.shard.tp_group).unbind(1))[0])
    if not parts:
        return in_loss_dtype(policy.hidden_TH.new_zeros(1 + len(others), 0))
    return torch.cat(parts, dim=1)
