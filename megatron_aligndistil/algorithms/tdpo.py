"""Token-level direct preference optimisation: DPO with the forward KL of each response (Zeng 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch.nn.functional import logsigmoid

from megatron_aligndistil.algorithms._pairs import margin_metrics, pair_loss
from megatron_aligndistil.algorithms.base import Algorithm, Frozen, LossOutput, Need
from megatron_aligndistil.config import Section
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.ops.forward_kl import forward_kl
from megatron_aligndistil.ops.head import LMHead


class TDPOConfig(Section):
    name: Literal["tdpo"] = "tdpo"
    """Token-level direct preference optimisation on pairs."""
    variant: Literal["tdpo1", "tdpo2"] = "tdpo2"
    """`tdpo1`: both responses' KL with gradient, and no α; `tdpo2`: α, and no gradient through the chosen one's KL."""
    beta: float = Field(0.1, gt=0)
    """β, the strength of the KL penalty."""
    alpha: float = Field(0.5, ge=0)
    """α of `tdpo2`, the weight of the difference in KL."""


class TDPO(Algorithm):
    name = "tdpo"
    Config = TDPOConfig
    data = "pairs"
    config: TDPOConfig

    @property
    def frozen(self) -> Mapping[str, Need]:
        return {"reference": "distribution"}

    def loss(self, model: str, head: LMHead, responses: Responses, frozen: Mapping[str, Frozen]) -> LossOutput:
        """L = -log σ(β [A(y_w) - A(y_l)] - β δ) with A(y) = log π_θ/π_ref (y), summed over tokens.

        With D(y) = Σ_t KL(π_ref ‖ π_θ) over the full vocabulary at the response's positions, δ = D(y_l) - D(y_w) for
        `tdpo1`, and δ = α [D(y_l) - sg(D(y_w))] for `tdpo2`, sg meaning without gradient.

        Counted in pairs; a pair with an empty response counts for nothing. Metrics, means over pairs: `accuracy` (share
        of pairs whose margin is above 0), `margin` and the rewards `reward_chosen`, `reward_rejected` (β A, as for
        DPO), the summed log-probabilities `logps_chosen`, `logps_rejected`, and D in nats a response, `kl_chosen` and
        `kl_rejected`. Collectives: those of :func:`forward_kl`.
        """
        reference = frozen["reference"].head
        assert reference is not None, "the engine gives what `frozen` asks for"
        found = forward_kl(head, reference, responses.targets_T)
        ratio_T = found.logprobs_T - found.reference_T
        chosen_P, rejected_P = (self.config.beta * responses.sum_rows(ratio_T)).chunk(2)
        logps_chosen_P, logps_rejected_P = responses.sum_rows(found.logprobs_T).chunk(2)
        kl_chosen_P, kl_rejected_P = responses.sum_rows(found.kl_T).chunk(2)
        if self.config.variant == "tdpo1":
            delta_P = kl_rejected_P - kl_chosen_P
        else:
            delta_P = self.config.alpha * (kl_rejected_P - kl_chosen_P.detach())
        metrics_P = margin_metrics(chosen_P, rejected_P) | {
            "logps_chosen": logps_chosen_P,
            "logps_rejected": logps_rejected_P,
            "kl_chosen": kl_chosen_P,
            "kl_rejected": kl_rejected_P,
        }
        return pair_loss(responses, -logsigmoid(chosen_P - rejected_P - self.config.beta * delta_P), metrics_P)
