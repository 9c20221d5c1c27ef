"""Reward models: a number for a whole response, learned from preference pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch.nn.functional import logsigmoid

from megatron_aligndistil.algorithms._pairs import margin_metrics, pair_loss
from megatron_aligndistil.algorithms.base import Algorithm, Frozen, HeadKind, LossOutput
from megatron_aligndistil.config import Section
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.ops.head import ScalarHead


class RewardConfig(Section):
    name: Literal["reward"] = "reward"
    """Reward model on pairs; exported as a sequence classification model with one label."""
    center: float = Field(0.0, ge=0)
    """Weight of the mean of (r(chosen) + r(rejected))², which keeps rewards around 0; 0 leaves them free."""


class Reward(Algorithm):
    name = "reward"
    Config = RewardConfig
    data = "pairs"
    config: RewardConfig

    @property
    def trained(self) -> tuple[str, ...]:
        return ("reward",)

    def head(self, model: str) -> HeadKind:
        return "score"

    def loss(self, model: str, head: ScalarHead, responses: Responses, frozen: Mapping[str, Frozen]) -> LossOutput:
        """L = -log σ(r(x, y_w) - r(x, y_l)), r the number at a row's last token (AlignDistil, eq. 1).

        With `center` > 0, plus center (r(x, y_w) + r(x, y_l))² (Eisenstein et al. 2023). Counted in pairs; a pair with
        an empty response counts for nothing.

        Metrics, means over pairs: `accuracy` (share of pairs whose margin is above 0), `margin`, `reward_chosen`,
        `reward_rejected`. No collectives.
        """
        chosen_P, rejected_P = head.values().chunk(2)
        loss_P = -logsigmoid(chosen_P - rejected_P) + self.config.center * (chosen_P + rejected_P) ** 2
        return pair_loss(responses, loss_P, margin_metrics(chosen_P, rejected_P))
