"""Kahneman-Tversky optimisation on single responses rated desirable or undesirable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from megatron_aligndistil.algorithms.base import Algorithm, Frozen, LossOutput, Need, Scored
from megatron_aligndistil.config import Section
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.ops.head import LMHead
from megatron_aligndistil.ops.logprobs import label_logprobs


class KTOConfig(Section):
    name: Literal["kto"] = "kto"
    """Kahneman-Tversky optimisation on single responses, each rated desirable or undesirable."""
    beta: float = Field(0.1, gt=0)
    """β, how soon a response's loss saturates as it leaves the reference."""
    desirable_weight: float = Field(1.0, ge=0)
    """λ_D, the weight of desirable responses."""
    undesirable_weight: float = Field(1.0, ge=0)
    """λ_U, the weight of undesirable responses."""


class KTO(Algorithm):
    name = "kto"
    Config = KTOConfig
    data = "unpaired"
    config: KTOConfig

    @property
    def frozen(self) -> Mapping[str, Need]:
        return {"reference": "logprobs"}

    @property
    def mismatched(self) -> Mapping[str, Need]:
        return {"policy": "logprobs", "reference": "logprobs"}

    def prepare(
        self, batches: Sequence[Scored], mismatched: Sequence[Scored], total: Callable[[Tensor], Tensor]
    ) -> Sequence[Mapping[str, Tensor]]:
        """`kl`: the mean of A = log π_θ/π_ref, summed over a response, over the mismatched rows of the global batch.

        A scalar, fp64, in nats, the same for every micro-batch, before the max with 0; 0 where there is no such row,
        as in a global batch of one row. The policy is that before the update. Collectives: one `total` of two numbers.
        """
        sums = [torch.stack([_log_ratios(each).sum(), (each.responses.lengths_B > 0).sum()]) for each in mismatched]
        summed, count = total(torch.stack(sums).sum(0))
        return [{"kl": summed / count.clamp(min=1)}] * len(batches)

    def loss(self, model: str, head: LMHead, responses: Responses, frozen: Mapping[str, Frozen]) -> LossOutput:
        """L = λ_D (1 - σ(β(A - z0))) for a desirable row, λ_U (1 - σ(β(z0 - A))) for an undesirable one.

        A = Σ_t log π_θ/π_ref (y_t), and z0 = max(0, `kl` of :meth:`prepare`) without gradient (KTO, Ethayarajh et al.
        2024, eq. 7). Counted in rows, rated 1 (desirable) or 0.

        Metrics: `kl` (z0) and `kl_estimate` (before the max), in nats; `accuracy`, the share of rows whose A is on the
        side of z0 that their rating asks for; and over the rows of either rating the means of the rewards
        `reward_desirable`, `reward_undesirable` (β A) and of the summed log-probabilities `logps_desirable`,
        `logps_undesirable`. Collectives: those of :func:`label_logprobs`.
        """
        reference_T = frozen["reference"].logprobs_T
        assert reference_T is not None and responses.ratings_B is not None, "the engine gives what is asked for"
        logprobs_T, _ = label_logprobs(head, responses.targets_T)
        ratio_B = responses.sum_rows(logprobs_T - reference_T.to(logprobs_T.dtype))
        estimate = responses.prepared["kl"].to(ratio_B.dtype)
        kl = estimate.clamp(min=0)
        full_B = responses.lengths_B > 0
        desirable_B = full_B & (responses.ratings_B > 0.5)
        undesirable_B = full_B & ~desirable_B
        weight_B = self.config.desirable_weight * desirable_B + self.config.undesirable_weight * undesirable_B
        gain_B = torch.where(desirable_B, ratio_B - kl, kl - ratio_B)
        # 1 - σ(x) = σ(-x), which keeps its digits where σ(x) is close to 1.
        loss_sum = (weight_B * torch.sigmoid(-self.config.beta * gain_B)).sum()
        count = full_B.sum()
        metrics = {
            "kl": (kl * count, count),
            "kl_estimate": (estimate * count, count),
            "accuracy": ((full_B & (gain_B > 0)).sum(), count),
        }
        logps_B, ratio_B = responses.sum_rows(logprobs_T.detach()), ratio_B.detach()
        for rating, rated_B in (("desirable", desirable_B), ("undesirable", undesirable_B)):
            metrics[f"reward_{rating}"] = ((self.config.beta * ratio_B * rated_B).sum(), rated_B.sum())
            metrics[f"logps_{rating}"] = ((logps_B * rated_B).sum(), rated_B.sum())
        return LossOutput(loss_sum, count, metrics)


def _log_ratios(scored: Scored) -> Tensor:
    """A = log π_θ/π_ref of each row, from the policy before the update, summed over its response: [B], fp64, in nats.

    A row without a response gives 0.
    """
    policy_T, reference_T = scored.frozen["policy"].logprobs_T, scored.frozen["reference"].logprobs_T
    assert policy_T is not None and reference_T is not None, "the engine gives what `mismatched` asks for"
    return scored.responses.sum_rows(policy_T.double() - reference_T.double())
