"""Direct preference optimisation, forward, reverse, or both at once; also cDPO, IPO, and an SFT term beside each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_aligndistil.algorithms._pairs import margin_metrics, pair_loss
from megatron_aligndistil.algorithms.base import Algorithm, Frozen, LossOutput, Need
from megatron_aligndistil.config import Section
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.ops.head import LMHead
from megatron_aligndistil.ops.logprobs import label_logprobs


class DPOConfig(Section):
    name: Literal["dpo"] = "dpo"
    """Direct preference optimisation on pairs."""
    beta: float = Field(0.1, gt=0)
    """β0, the strength of the implicit KL penalty (IPO's τ)."""
    direction: Literal["forward", "reverse", "both"] = "forward"
    """`reverse` swaps chosen and rejected; `both` trains both models on the same batches, the reference run once."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """`sigmoid`: DPO; `ipo`: identity preference optimisation, on log-ratios averaged over a response's tokens."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs whose labels are taken to be swapped (cDPO); for `sigmoid` only."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of an SFT loss on the preferred response, the mean over its tokens (iterative RPO's α)."""

    @model_validator(mode="after")
    def _smoothing_is_of_the_sigmoid(self) -> DPOConfig:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("ipo takes no label_smoothing; set label_smoothing to 0, or loss to sigmoid")
        return self


class DPO(Algorithm):
    name = "dpo"
    Config = DPOConfig
    data = "pairs"
    config: DPOConfig

    @property
    def trained(self) -> tuple[str, ...]:
        return {"forward": ("dpo",), "reverse": ("reverse",), "both": ("dpo", "reverse")}[self.config.direction]

    @property
    def frozen(self) -> Mapping[str, Need]:
        return {"reference": "logprobs"}

    def loss(self, model: str, head: LMHead, responses: Responses, frozen: Mapping[str, Frozen]) -> LossOutput:
        """A loss of A(y) = log π_θ/π_ref (y), summed over tokens (AlignDistil, eq. 4), counted in pairs.

        With `loss`, ε = `label_smoothing` and w = `sft_weight`:

        - `sigmoid`: -(1 - ε) log σ(h) - ε log σ(-h) with h = β0 [A(y_w) - A(y_l)]: DPO, and with ε > 0 cDPO (Mitchell
          2023).
        - `ipo`: (A(y_w)/|y_w| - A(y_l)/|y_l| - 1/(2 β0))² (Azar 2023, eq. 17). The averages are not in the paper; TRL
          has them on its authors' word.
        - either plus -(w/|y_w|) log π_θ(y_w) (Pang 2024): a mean for each pair, so that cutting a batch changes
          nothing, where TRL's `sft` takes the mean over all chosen tokens of a micro-batch.

        For the model "reverse" the rejected response is y_w and the chosen one y_l, here and in every metric: what is
        called chosen is what this model learns to prefer. A pair with an empty response counts for nothing.

        Metrics, means over pairs: `accuracy` (share of pairs whose margin is above 0), `margin` and the rewards
        `reward_chosen`, `reward_rejected` (β0 A), the summed log-probabilities `logps_chosen`, `logps_rejected`, and
        with an SFT term its `sft` in nats a token. Collectives: those of :func:`label_logprobs`.
        """
        reference_T = frozen["reference"].logprobs_T
        assert reference_T is not None, "the engine gives what `frozen` asks for"
        logprobs_T, _ = label_logprobs(head, responses.targets_T)
        ratio_T = logprobs_T - reference_T.to(logprobs_T.dtype)
        logps_chosen_P, logps_rejected_P = _winner_first(model, responses.sum_rows(logprobs_T))
        chosen_P, rejected_P = _winner_first(model, self.config.beta * responses.sum_rows(ratio_T))
        metrics_P = margin_metrics(chosen_P, rejected_P) | {
            "logps_chosen": logps_chosen_P,
            "logps_rejected": logps_rejected_P,
        }
        if self.config.loss == "ipo":
            mean_chosen_P, mean_rejected_P = _winner_first(model, responses.mean_rows(ratio_T))
            loss_P = (mean_chosen_P - mean_rejected_P - 1 / (2 * self.config.beta)) ** 2
        else:
            loss_P = _smoothed(chosen_P - rejected_P, self.config.label_smoothing)
        if self.config.sft_weight:
            mean_chosen_P, _ = _winner_first(model, responses.mean_rows(logprobs_T))
            metrics_P["sft"] = -mean_chosen_P
            loss_P = loss_P - self.config.sft_weight * mean_chosen_P
        return pair_loss(responses, loss_P, metrics_P)


def _smoothed(margin_P: Tensor, epsilon: float) -> Tensor:
    if epsilon == 0:
        return -logsigmoid(margin_P)
    return -(1 - epsilon) * logsigmoid(margin_P) - epsilon * logsigmoid(-margin_P)


def _winner_first(model: str, values_B: Tensor) -> tuple[Tensor, Tensor]:
    chosen_P, rejected_P = values_B.chunk(2)
    return (rejected_P, chosen_P) if model == "reverse" else (chosen_P, rejected_P)
