"""AlignDistil's loss from hidden states: teacher, KL and the gradient, chunk by chunk, over a split vocabulary.

Nothing of size [T, V] is alive beyond a chunk, and the backward pass recomputes nothing: the loss is a weighted sum
whose weights are known in the forward pass, so the gradient is formed there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aligndistil.ops.chunks import add_weight_gradient, chunks, hand_on, hidden_gradient, logits_of
from megatron_aligndistil.ops.collectives import gather_ranks, sum_ranks
from megatron_aligndistil.ops.head import LMHead
from megatron_aligndistil.ops.passes import Passes, make_passes
from megatron_aligndistil.ops.vocab_parallel import columns, combine, combine_expected


@dataclass(frozen=True)
class TeacherForm:
    """z* = base + α (dpo - negative) with α_t = rate · TVD_t + offset (AlignDistil, eq. 11, 15, 16 and 17).

    ======================  =========  =========
    teacher                 base       negative
    ======================  =========  =========
    vanilla (11)            negative   reference
    contrastive (15), 17    dpo        reverse
    ======================  =========  =========

    A constant α is ``rate=0, offset=α``; the paper's adaptive one is ``rate=r, offset=ε`` (16). The authors' code
    leaves out the ½ of TVD_t = ½ Σ_v |p_dpo(v) - p_negative(v)|: that is ``rate=2·r``.

    All distributions, the policy's too, are softmax(z / temperature).
    """

    base: Literal["dpo", "negative"]
    rate: float
    offset: float
    temperature: float = 1.0


@dataclass(frozen=True)
class Distilled:
    """What :func:`distil` finds, the same on every rank; nothing but `loss_sum` carries a gradient.

    Attributes:
        loss_sum: Σ_t w_t (β0/α_t) KL_t, scalar.
        kl_T: KL(π_θ ‖ π*) at each position, in nats.
        alpha_T, tvd_T: the coefficient and the total variation distance.
        expected_3T: E_{v∼π_θ}[log π(v)] for π of the policy, dpo and negative, in nats.
        sampled_2T: log π(y_t) for π of dpo and negative, in nats.
    """

    loss_sum: Tensor
    kl_T: Tensor
    alpha_T: Tensor
    tvd_T: Tensor
    expected_3T: Tensor
    sampled_2T: Tensor


def distil(
    policy: LMHead,
    dpo: LMHead,
    negative: LMHead,
    targets_T: Tensor,
    weights_T: Tensor,
    form: TeacherForm,
    beta0: float,
    rows: int | None = None,
) -> Distilled:
    """Σ_t w_t β_t KL(π_θ ‖ π*) with π* = softmax(z*) and β_t = β0/α_t (AlignDistil, eq. 18 and 19).

    Args:
        policy, dpo, negative: hidden states [T, H] with this rank's rows [v, H] of each output layer.
        targets_T: int64, the token of the response at each position.
        weights_T: w_t, 1/|y| at the positions of a response y.
        rows: positions in a chunk; chosen by device and vocabulary where None. Changes nothing but rounding.

    Gradient flows into the policy's hidden states and output layer, exactly:
    dL/dz_v = w_t β_t p_v (log p_v - log π*_v - KL_t); none through π*, α_t or β_t. Collectives over
    ``policy.shard.tp_group``, a chunk: one all-gather of [3, 3, C], one all-reduce of [3, C] and one all-gather of
    [3, C]; backward one all-reduce of [T, H].
    """
    wants_gradient = torch.is_grad_enabled() and (policy.hidden_TH.requires_grad or policy.weight_vH.requires_grad)
    pass_ = _Pass((policy, dpo, negative), targets_T, weights_T, form, beta0, rows, wants_gradient)
    return Distilled(*_Distil.apply(policy.hidden_TH, policy.weight_vH, pass_))


class _Distil(torch.autograd.Function):
    """Runs the chunks in the forward pass; the backward scales the gradients that they left."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_vH: Tensor, pass_: _Pass) -> tuple[Tensor, ...]:
        found = pass_.run()
        ctx.group, ctx.main_grad_vH = pass_.heads[0].shard.tp_group, pass_.heads[0].main_grad_vH
        if pass_.wants_gradient:
            ctx.save_for_backward(hidden_TH, weight_vH, pass_.hidden_grad_TH, pass_.weight_grad_vH)
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, None]:
        hidden_TH, weight_vH, hidden_grad_TH, weight_grad_vH = ctx.saved_tensors
        hidden_grad_TH = sum_ranks(hidden_grad_TH.mul_(grad), ctx.group).to(hidden_TH.dtype)
        return hidden_grad_TH, hand_on(weight_grad_vH.mul_(grad), weight_vH, ctx.main_grad_vH), None


@dataclass
class _Pass:
    """One walk over the positions. Suffixes beside the usual ones: K the three models, R the ranks of the group."""

    heads: tuple[LMHead, LMHead, LMHead]  # policy, dpo, negative
    targets_T: Tensor
    weights_T: Tensor
    form: TeacherForm
    beta0: float
    rows: int | None
    wants_gradient: bool

    def __post_init__(self) -> None:
        policy = self.heads[0]
        dtype = torch.promote_types(policy.hidden_TH.dtype, torch.float32)
        self.weights_T = self.weights_T.to(dtype)
        if self.wants_gradient:
            self.hidden_grad_TH = torch.empty_like(policy.hidden_TH, dtype=dtype)
            self.weight_grad_vH = torch.zeros_like(policy.weight_vH, dtype=dtype)

    def run(self) -> tuple[Tensor, ...]:
        """The fields of :class:`Distilled`."""
        parts = [self._chunk(rows) for rows in chunks(self.heads[0], self.rows)]
        if not parts:  # no response at all: every sum is empty
            empty = self.weights_T.new_zeros(0)
            return empty.sum(), empty, empty, empty, empty.new_zeros(3, 0), empty.new_zeros(2, 0)
        kl_T, alpha_T, tvd_T, expected_3T, sampled_2T = (torch.cat(each, dim=-1) for each in zip(*parts, strict=True))
        loss_sum = (self.weights_T * self.beta0 / alpha_T * kl_T).sum()
        return loss_sum, kl_T, alpha_T, tvd_T, expected_3T, sampled_2T

    def _chunk(self, rows: slice) -> tuple[Tensor, ...]:
        group = self.heads[0].shard.tp_group
        passes = make_passes(
            [logits_of(head, rows, self.form.temperature) for head in self.heads], self.heads[0].weight_vH.dtype
        )
        local_3KC = passes.statistics()
        peaks_RKC, sums_RKC, dots_RKC = gather_ranks(local_3KC, group).unbind(1)
        expected_KC, models = combine_expected(peaks_RKC, sums_RKC, dots_RKC)
        # What brings this rank's relative logits to log-probabilities.
        offsets_KC = torch.stack([local_3KC[0, k] - n.max_T - n.logsum_T for k, n in enumerate(models)])
        distance_C = passes.distance(offsets_KC)
        tvd_C, *sampled = sum_ranks(torch.cat([distance_C[None], self._sampled(passes, offsets_KC, rows)]), group)
        alpha_C = self.form.rate * tvd_C + self.form.offset

        # E_p[log π_θ - s], with s = log π* up to a number a position: the gradient is formed around it.
        base: Literal[1, 2] = 1 if self.form.base == "dpo" else 2
        mean_C = expected_KC[0] - expected_KC[base] - alpha_C * (expected_KC[1] - expected_KC[2])
        scale_C = None
        if self.wants_gradient:
            scale_C = self.weights_T[rows] * self.beta0 / alpha_C / self.form.temperature
        local_3C, grad_Cv = passes.teacher(base, alpha_C, offsets_KC, mean_C, scale_C)
        peak_RC, sum_RC, rest_RC = gather_ranks(local_3C, group).unbind(1)
        star = combine(peak_RC, sum_RC)
        if grad_Cv is not None:
            self.hidden_grad_TH[rows] = hidden_gradient(grad_Cv, self.heads[0].weight_vH.detach())
            add_weight_gradient(self.weight_grad_vH, grad_Cv, self.heads[0].hidden_TH.detach()[rows])
        # The mean again, from differences this time: its rounding error is put right.
        kl_C = mean_C + rest_RC.sum(dim=0) + star.max_T + star.logsum_T
        return kl_C, alpha_C, tvd_C, expected_KC, torch.stack(sampled)

    def _sampled(self, passes: Passes, offsets_KC: Tensor, rows: slice) -> Tensor:
        """Log-probability by dpo and negative of each target that this rank holds, and 0 elsewhere: [2, C]."""
        shard = self.heads[0].shard
        column_C1, here_C = columns(self.targets_T[rows], shard)
        if not shard.size:
            return torch.zeros_like(offsets_KC[1:])
        return torch.where(here_C, passes.relative(column_C1) + offsets_KC[1:], 0.0)
