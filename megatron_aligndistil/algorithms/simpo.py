"""SimPO: preference optimisation by the mean log-probability of a response, without a reference (Meng 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch.nn.functional import logsigmoid

from megatron_aligndistil.algorithms._pairs import margin_metrics, pair_loss
from megatron_aligndistil.algorithms.base import Algorithm, Frozen, LossOutput
from megatron_aligndistil.config import Section
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.ops.head import LMHead
from megatron_aligndistil.ops.logprobs import label_logprobs


class SimPOConfig(Section):
    name: Literal["simpo"] = "simpo"
    """SimPO on preference pairs; it needs no reference model."""
    beta: float = Field(2.5, gt=0)
    """β, the scale of the reward, which is β times the mean log-probability of a response's tokens."""
    gamma_beta_ratio: float = Field(0.5, ge=0)
    """γ/β: the mean log-probability by which the chosen response is to lead."""


class SimPO(Algorithm):
    name = "simpo"
    Config = SimPOConfig
    data = "pairs"
    config: SimPOConfig

    def loss(self, model: str, head: LMHead, responses: Responses, frozen: Mapping[str, Frozen]) -> LossOutput:
        """L = -log σ(β [mean log π_θ(y_w) - mean log π_θ(y_l)] - γ), means over a response's tokens (SimPO, eq. 6).

        Counted in pairs; a pair with an empty response counts for nothing. Metrics, means over pairs: `accuracy` (share
        of pairs whose margin is above 0, γ left out), `margin` and the rewards `reward_chosen`, `reward_rejected` (β
        times the mean), and the summed log-probabilities `logps_chosen`, `logps_rejected`. Collectives: those of
        :func:`label_logprobs`.
        """
        logprobs_T, _ = label_logprobs(head, responses.targets_T)
        chosen_P, rejected_P = (self.config.beta * responses.mean_rows(logprobs_T)).chunk(2)
        logps_chosen_P, logps_rejected_P = responses.sum_rows(logprobs_T).chunk(2)
        metrics_P = margin_metrics(chosen_P, rejected_P) | {
            "logps_chosen": logps_chosen_P,
            "logps_rejected": logps_rejected_P,
        }
        gamma = self.config.gamma_beta_ratio * self.config.beta
        return pair_loss(responses, -logsigmoid(chosen_P - rejected_P - gamma), metrics_P)
