"""The passes over one chunk's logits that losses make, in plain torch; `triton_passes` has them for GPUs.

Suffixes beside the usual ones: K several models; C the positions of a chunk. A *relative* logit is one less the largest
of its row on this rank, `peak`; an *offset* brings it to a log-probability. No pass has collectives or gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_aligndistil.ops.vocab_parallel import Normaliser

_LOG2_E = 1 / math.log(2)


class Passes(Protocol):
    """What AlignDistil asks of one chunk's logits, [C, v] of policy, dpo and negative, in this order."""

    def statistics(self) -> Tensor:
        """Of each model: the peak, Σ e_k and Σ e_0·u_k, with u relative logits and e = exp(u): [3, K, C]."""
        ...

    def relative(self, column_C1: Tensor) -> Tensor:
        """Relative logits of dpo and negative at one column of each row, [2, C]."""
        ...

    def distance(self, offsets_KC: Tensor) -> Tensor:
        """½ Σ_v |p_dpo - p_negative| over these columns, [C]."""
        ...

    def teacher(
        self, base: Literal[1, 2], alpha_C: Tensor, offsets_KC: Tensor, mean_C: Tensor, scale_C: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The teacher's normaliser, the rest of the KL, and the gradient of the policy's logits.

        With s = log p_base + α (log p_dpo - log p_negative) and d = log p_policy - s: the largest s, the sum of
        exp(s - that), and Σ p_policy (d - mean), together [3, C]; and the gradient scale · p_policy (d - mean), [C, v],
        if `scale_C` is given.
        """
        ...


class TorchPasses:
    """Each pass by torch's operations, in place where it can be; what one pass leaves the next one uses."""

    def __init__(self, logits: Sequence[Tensor]) -> None:
        self._relative = list(logits)  # relative once statistics has run
        self._exps: list[Tensor] = []

    def statistics(self) -> Tensor:
        found_3KC, self._exps = _statistics(self._relative)
        return found_3KC

    def relative(self, column_C1: Tensor) -> Tensor:
        return torch.stack([relative_Cv.gather(1, column_C1)[:, 0] for relative_Cv in self._relative[1:]])

    def distance(self, offsets_KC: Tensor) -> Tensor:
        _, dpo_Cv, negative_Cv = self._exps
        shares_KC1 = offsets_KC.exp()[:, :, None]
        # Two products and a difference, not one fused operation: identical models are to have a distance of 0.
        dpo_Cv.mul_(shares_KC1[1]).sub_(negative_Cv.mul_(shares_KC1[2]))
        return 0.5 * dpo_Cv.abs_().sum(dim=1)

    def teacher(
        self, base: Literal[1, 2], alpha_C: Tensor, offsets_KC: Tensor, mean_C: Tensor, scale_C: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        policy_Cv, dpo_Cv, negative_Cv = self._relative
        exp_Cv, spare_Cv, other_Cv = self._exps
        alpha_C1 = alpha_C[:, None]
        # s less a number a position, which is put back into the peak and taken from the mean.
        star_Cv = torch.sub(dpo_Cv, negative_Cv, out=spare_Cv).mul_(alpha_C1).add_(self._relative[base])
        constant_C = offsets_KC[base] + alpha_C * (offsets_KC[1] - offsets_KC[2])
        rest_Cv = policy_Cv.sub_(star_Cv).sub_((mean_C + constant_C - offsets_KC[0])[:, None])
        peak_C = _subtract_peak(star_Cv)
        share_C = offsets_KC[0].exp()
        sum_C = _exp(star_Cv, other_Cv).sum(dim=1)
        found_3C = torch.stack([peak_C + constant_C, sum_C, share_C * _dot(exp_Cv, rest_Cv)])
        if scale_C is None:
            return found_3C, None
        return found_3C, rest_Cv.mul_(exp_Cv).mul_((scale_C * share_C)[:, None])


def _statistics(logits: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Makes logits relative, in place; what :func:`statistics` finds, and the exponentials."""
    peaks_KC = torch.stack([_subtract_peak(logits_Cv) for logits_Cv in logits])
    exps = [_exp(relative_Cv, torch.empty_like(relative_Cv)) for relative_Cv in logits]
    sums_KC = torch.stack([exp_Cv.sum(dim=1) for exp_Cv in exps])
    dots_KC = torch.stack([_dot(exps[0], relative_Cv) for relative_Cv in logits])
    return torch.stack([peaks_KC, sums_KC, dots_KC]), exps


def _exp(relative_Cv: Tensor, out_Cv: Tensor) -> Tensor:
    """e to the power of relative logits, in `out_Cv`.

    By powers of two in fp32: torch's exp takes twice as long on some CPUs. The product's rounding grows with the
    exponent's size, and the power falls faster: no term of a sum is off by more than the rounding of the largest.
    """
    if relative_Cv.dtype == torch.float64:
        return torch.exp(relative_Cv, out=out_Cv)
    return torch.mul(relative_Cv, _LOG2_E, out=out_Cv).exp2_()


def _subtract_peak(logits_Cv: Tensor) -> Tensor:
    """Make logits relative, in place; returns the peaks, [C]. An empty shard's is the lowest finite number."""
    if logits_Cv.size(1) == 0:
        return logits_Cv.new_full((logits_Cv.size(0),), torch.finfo(logits_Cv.dtype).min)
    peak_C = logits_Cv.amax(dim=1)
    logits_Cv.sub_(peak_C[:, None])
    return peak_C


def _dot(left_Cv: Tensor, right_Cv: Tensor) -> Tensor:
    """Sum of products along each row, [C], without a third tensor of that size."""
    return torch.bmm(left_Cv[:, None], right_Cv[:, :, None])[:, 0, 0]


def _on_kernels(logits_Cv: Tensor) -> bool:
    """Triton's kernels make the passes on a GPU; plain torch elsewhere, and for an empty shard."""
    return not logits_Cv.is_cpu and logits_Cv.size(1) > 0 and find_spec("triton") is not None


def make_passes(logits: Sequence[Tensor], grad_dtype: torch.dtype) -> Passes:
    """AlignDistil's passes over one chunk's logits of policy, dpo and negative, [C, v] each, which are used up.

    Kernels leave the gradient in `grad_dtype`, plain torch in that of the logits.
    """
    if _on_kernels(logits[0]):
        from megatron_aligndistil.ops.triton_passes import TritonPasses

        return TritonPasses(logits, grad_dtype)
    return TorchPasses(logits)


def statistics(logits: Sequence[Tensor]) -> Tensor:
    """Of K models' logits, [C, v] each and used up: the peak, Σ e_k and Σ e_0·u_k, [3, K, C].

    u are relative logits and e = exp(u); the sums are over these columns.
    """
    if _on_kernels(logits[0]) and len(logits) <= 3:
        from megatron_aligndistil.ops import triton_passes

        return triton_passes.statistics(logits)
    return _statistics(logits)[0]


@dataclass(frozen=True)
class Normalised:
    """One model's logits of a chunk, [C, v], with their normaliser over the whole vocabulary, of [C]."""

    logits_Cv: Tensor
    normaliser: Normaliser

    def probabilities(self) -> Tensor:
        """In the place of the logits."""
        normaliser = self.normaliser
        return self.logits_Cv.sub_(normaliser.max_T[:, None]).sub_(normaliser.logsum_T[:, None]).exp_()


def label_gradient(
    own: Normalised,
    columns_C: Tensor,
    grad_C: Tensor,
    other: Normalised | None = None,
    kl_grad_C: Tensor | None = None,
) -> Tensor:
    """g ([v is the target] - p) + h (p - q), [C, v], in the place of the model's logits; h only with another model q.

    That is the gradient of g log p(target) + h KL(q || p) with respect to the logits of p.

    Args:
        columns_C: the target's column here; outside 0..v-1 where another rank has it.
        grad_C, kl_grad_C: g and h.
    """
    if _on_kernels(own.logits_Cv):
        from megatron_aligndistil.ops import triton_passes

        return triton_passes.label_gradient(own, columns_C, grad_C, other, kl_grad_C)
    grad_Cv = own.probabilities()
    kl_part_Cv = None
    if other is not None and kl_grad_C is not None:
        other_Cv = other.probabilities()
        kl_part_Cv = torch.sub(grad_Cv, other_Cv, out=other_Cv).mul_(kl_grad_C[:, None])
    grad_Cv.mul_(-grad_C[:, None])
    num_columns = grad_Cv.size(1)
    if num_columns:
        here_C = (columns_C >= 0) & (columns_C < num_columns)
        grad_Cv.scatter_add_(1, columns_C.clamp(0, num_columns - 1)[:, None], (grad_C * here_C)[:, None])
    return grad_Cv if kl_part_Cv is None else grad_Cv.add_(kl_part_Cv)
