"""AlignDistil's loss and gradient in the ways that the benchmark compares, all on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.composed import compose_teacher, expected_logprobs, reverse_kl
from megatron_aligndistil.ops.chunks import add_weight_gradient, chunks, hidden_gradient, logits_of
from megatron_aligndistil.ops.distil import TeacherForm, distil
from megatron_aligndistil.ops.head import LMHead

BETA0, RATE, OFFSET = 0.1, 10.0, 1e-3


@dataclass(frozen=True)
class Inputs:
    """Hidden states and output-layer shards of three models; the policy's require gradients."""

    policy: LMHead
    dpo: LMHead
    negative: LMHead
    targets_T: Tensor
    weights_T: Tensor


def fused(inputs: Inputs) -> Tensor:
    """The package's operation."""
    heads = inputs.policy, inputs.dpo, inputs.negative
    form = TeacherForm("dpo", RATE, OFFSET)
    return distil(*heads, inputs.targets_T, inputs.weights_T, form, BETA0).loss_sum


def composed(inputs: Inputs) -> Tensor:
    """The same mathematics, exact under tensor parallelism too, from whole logits; with the same metrics."""
    group = inputs.policy.shard.tp_group
    policy_Tv = inputs.policy.logits()
    with torch.no_grad():
        dpo_Tv, negative_Tv = inputs.dpo.logits(), inputs.negative.logits()
    teacher = compose_teacher(dpo_Tv, dpo_Tv, negative_Tv, rate=RATE, offset=OFFSET, tp_group=group)
    kl_T = reverse_kl(policy_Tv, teacher.logits_Tv, group)
    expected_logprobs(policy_Tv, [dpo_Tv, negative_Tv], group)
    return (inputs.weights_T * BETA0 / teacher.alpha_T * kl_T).sum()


def authors(inputs: Inputs) -> Tensor:
    """The formulas of the authors' published code, on one process: softmaxes and logarithms of whole tensors.

    Its coefficient has no ½ in the TVD, so half the rate gives the same loss.
    """
    policy_Tv = inputs.policy.logits().float()
    with torch.no_grad():
        dpo_Tv, negative_Tv = inputs.dpo.logits().float(), inputs.negative.logits().float()
        distance_T = (dpo_Tv.softmax(-1) - negative_Tv.softmax(-1)).abs().sum(-1)
        weight_T1 = (distance_T * RATE / 2 + OFFSET)[:, None]
        target_Tv = (dpo_Tv + weight_T1 * (dpo_Tv - negative_Tv)).softmax(-1)
    probs_Tv = policy_Tv.softmax(-1)
    divergence_T = (probs_Tv * (policy_Tv.log_softmax(-1) - target_Tv.clamp(min=1e-30).log())).sum(-1)
    return (inputs.weights_T * BETA0 / weight_T1[:, 0] * divergence_T).sum()


def liger(inputs: Inputs) -> Tensor:
    """Liger's fused linear reverse KL from the dpo model alone, the nearest that it offers.

    Two output layers of three, no TVD, no extrapolation, no metrics: less work than the others, and another loss. Its
    Triton kernel on a GPU; its chunked version in plain torch on a CPU.
    """
    hidden_TH, weight_vH = inputs.policy.hidden_TH, inputs.policy.weight_vH
    teacher = inputs.dpo.hidden_TH, inputs.dpo.weight_vH
    if hidden_TH.is_cuda:
        from liger_kernel.transformers import LigerFusedLinearJSD

        return LigerFusedLinearJSD(jsd_beta=1.0)(hidden_TH, weight_vH, *teacher)
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)
    return loss(hidden_TH, weight_vH, *teacher, inputs.targets_T)


def products(inputs: Inputs) -> Tensor:
    """Nothing but the five matrix products, in the fused operation's chunks: no version can be faster."""
    heads = inputs.policy, inputs.dpo, inputs.negative
    hidden_TH, weight_vH = inputs.policy.hidden_TH.detach(), inputs.policy.weight_vH.detach()
    weight_grad_vH = torch.zeros_like(weight_vH, dtype=torch.float32)
    with torch.no_grad():
        for rows in chunks(inputs.policy):
            grad_Cv, *_ = [logits_of(head, rows) for head in heads]
            grad_Cv = grad_Cv.to(weight_vH.dtype)
            hidden_gradient(grad_Cv, weight_vH)
            add_weight_gradient(weight_grad_vH, grad_Cv, hidden_TH[rows])
    return (0.0 * inputs.policy.hidden_TH[0, 0]).float()


VARIANTS: dict[str, Callable[[Inputs], Tensor]] = {
    "fused": fused,
    "composed": composed,
    "authors": authors,
    "liger": liger,
    "products": products,
}
SINGLE_PROCESS = ("authors", "liger")
