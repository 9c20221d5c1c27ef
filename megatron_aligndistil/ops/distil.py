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
        hidden_grad_TH = sum_ranks(hidden_grad_TH * grad, ctx.group).to(hidden_TH.dtype)
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
        # Logits relative to each model's largest on this rank, and their exponentials.
        logits = [logits_of(head, rows, self.form.temperature) for head in self.heads]
        peaks_KC = torch.stack([_subtract_peak(logits_Cv) for logits_Cv in logits])
        exps = [logits_Cv.exp() for logits_Cv in logits]
        sums_KC = torch.stack([exp_Cv.sum(dim=1) for exp_Cv in exps])
        dots_KC = torch.stack([_dot(exps[0], logits_Cv) for logits_Cv in logits])
        peaks_RKC, sums_RKC, dots_RKC = gather_ranks(torch.stack([peaks_KC, sums_KC, dots_KC]), group).unbind(1)
        expected_KC, models = combine_expected(peaks_RKC, sums_RKC, dots_RKC)
        # What brings this rank's relative logits to log-probabilities, and the policy's exponentials to probabilities.
        offsets_KC = torch.stack([peaks_KC[k] - n.max_T - n.logsum_T for k, n in enumerate(models)])
        share_RC = (peaks_RKC[:, 0] - models[0].max_T - models[0].logsum_T).exp()
        sampled = [self._sampled(logits[k], offsets_KC[k], rows) for k in (1, 2)]
        distance_C = _distance(exps[1], exps[2], offsets_KC[1:].exp())
        tvd_C, *sampled = sum_ranks(torch.stack([distance_C, *sampled]), group).unbind()
        alpha_C = self.form.rate * tvd_C + self.form.offset

        # log π* up to a number a position: base + α (dpo - negative), of log-probabilities.
        base = 1 if self.form.base == "dpo" else 2
        star_Cv = torch.sub(logits[1], logits[2], out=exps[1]).mul_(alpha_C[:, None]).add_(logits[base])
        star_Cv += (offsets_KC[base] + alpha_C * (offsets_KC[1] - offsets_KC[2]))[:, None]
        # log π_θ - log π* up to a number a position; its mean is the KL but for that number.
        ratio_Cv = logits[0].sub_(star_Cv).add_(offsets_KC[0][:, None])
        peak_C = _subtract_peak(star_Cv)
        local_3C = torch.stack([peak_C, torch.exp(star_Cv, out=exps[2]).sum(dim=1), _dot(exps[0], ratio_Cv)])
        peak_RC, sum_RC, ratio_RC = gather_ranks(local_3C, group).unbind(1)
        star = combine(peak_RC, sum_RC)
        mean_C = (share_RC * ratio_RC).sum(dim=0)
        if self.wants_gradient:
            scale_C = self.weights_T[rows] * self.beta0 / alpha_C / self.form.temperature * offsets_KC[0].exp()
            grad_Cv = ratio_Cv.sub_(mean_C[:, None]).mul_(exps[0]).mul_(scale_C[:, None])
            self.hidden_grad_TH[rows] = hidden_gradient(grad_Cv, self.heads[0].weight_vH.detach())
            add_weight_gradient(self.weight_grad_vH, grad_Cv, self.heads[0].hidden_TH.detach()[rows])
        return mean_C + star.max_T + star.logsum_T, alpha_C, tvd_C, expected_KC, torch.stack(sampled)

    def _sampled(self, logits_Cv: Tensor, offset_C: Tensor, rows: slice) -> Tensor:
        """Log-probability of each target that this rank holds, and 0 elsewhere."""
        shard = self.heads[0].shard
        column_C1, here_C = columns(self.targets_T[rows], shard)
        if not shard.size:
            return torch.zeros_like(offset_C)
        return torch.where(here_C, logits_Cv.gather(1, column_C1)[:, 0] + offset_C, 0.0)


def _subtract_peak(logits_Cv: Tensor) -> Tensor:
    """Make logits relative to the largest of each row on this rank, in place; returns that largest, [C]."""
    if logits_Cv.size(1) == 0:
        return logits_Cv.new_full((logits_Cv.size(0),), torch.finfo(logits_Cv.dtype).min)
    peak_C = logits_Cv.amax(dim=1)
    logits_Cv.sub_(peak_C[:, None])
    return peak_C


def _dot(left_Cv: Tensor, right_Cv: Tensor) -> Tensor:
    """Sum of products along each row, [C], without a third tensor of that size."""
    return torch.bmm(left_Cv[:, None], right_Cv[:, :, None])[:, 0, 0]


def _distance(dpo_Cv: Tensor, negative_Cv: Tensor, shares_2C: Tensor) -> Tensor:
    """½ Σ_v |p_dpo - p_negative| over this rank's columns, [C]; both exponentials are used up."""
    dpo_Cv.mul_(shares_2C[0][:, None]).sub_(negative_Cv.mul_(shares_2C[1][:, None]))
    return 0.5 * dpo_Cv.abs_().sum(dim=1)
