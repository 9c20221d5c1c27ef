"""Direct preference optimisation, forward, reverse, or both at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_aligndistil.algorithms.base import Algorithm, Frozen, LossOutput, Need
from megatron_aligndistil.config import Section
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.ops.head import LMHead
from megatron_aligndistil.ops.logprobs import label_logprobs


class DPOConfig(Section):
    name: Literal["dpo"] = "dpo"
    """Direct preference optimisation on pairs."""
    beta: float = Field(0.1, gt=0)
    """β0, the strength of the implicit KL penalty."""
    direction: Literal["forward", "reverse", "both"] = "forward"
    """`reverse` swaps chosen and rejected; `both` trains both models on the same batches, the reference run once."""


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
        """L = -log σ(β0 [log π_θ/π_ref (y_w) - log π_θ/π_ref (y_l)]), log-probabilities summed (AlignDistil, eq. 4).

        For the model "reverse" the rejected response is y_w and the chosen one y_l, here and in every metric: what is
        called chosen is what this model learns to prefer. Counted in pairs; a pair with an empty response counts for
        nothing.

        Metrics, means over pairs: `accuracy` (share of pairs whose margin is above 0), `margin` and the rewards
        `reward_chosen`, `reward_rejected` (β0 log π_θ/π_ref), and the summed log-probabilities `logps_chosen`,
        `logps_rejected`. Collectives: those of :func:`label_logprobs`.
        """
        reference_T = frozen["reference"].logprobs_T
        assert reference_T is not None, "the engine gives what `frozen` asks for"
        logprobs_T, _ = label_logprobs(head, responses.targets_T)
        logps_chosen_P, logps_rejected_P = _winner_first(model, responses.sum_rows(logprobs_T))
        reward_chosen_P, reward_rejected_P = _winner_first(
            model, self.config.beta * responses.sum_rows(logprobs_T - reference_T.to(logprobs_T.dtype))
        )
        first_P, second_P = responses.lengths_B.chunk(2)
        full_P = (first_P > 0) & (second_P > 0)
        count = full_P.sum()
        margin_P = reward_chosen_P - reward_rejected_P
        metrics_P = {
            "accuracy": (margin_P > 0).to(margin_P.dtype),
            "margin": margin_P,
            "reward_chosen": reward_chosen_P,
            "reward_rejected": reward_rejected_P,
            "logps_chosen": logps_chosen_P,
            "logps_rejected": logps_rejected_P,
        }
        metrics = {name: ((value_P.detach() * full_P).sum(), count) for name, value_P in metrics_P.items()}
        return LossOutput(-(logsigmoid(margin_P) * full_P).sum(), count, metrics)


def _winner_first(model: str, values_B: Tensor) -> tuple[Tensor, Tensor]:
    chosen_P, rejected_P = values_B.chunk(2)
    return (rejected_P, chosen_P) if model == "reverse" else (chosen_P, rejected_P)
