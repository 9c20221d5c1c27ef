"""AlignDistil's loss and gradient in the ways that the benchmark compares, all on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.composed import compose_teacher, reverse_kl
from megatron_aligndistil.ops.distil import TeacherForm, distil
from megatron_aligndistil.ops.head import LMHead
from megatron_aligndistil.ops.vocab_parallel import expected_logprobs

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


VARIANTS: dict[str, Callable[[Inputs], Tensor]] = {"fused": fused, "composed": composed, "authors": authors}
