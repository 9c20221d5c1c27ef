"""The teacher of AlignDistil: two models' logits extrapolated, by a constant or by how much the models disagree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.ops.collectives import sum_ranks
from megatron_aligndistil.ops.vocab_parallel import in_loss_dtype, normalisers


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
