"""Reinforced token optimisation: PPO in which a DPO model rewards every token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from megatron_aligndistil.algorithms._actor_critic import ActorCritic, ActorCriticConfig, at_last, log_ratio, score
from megatron_aligndistil.algorithms.base import Need, Scored


class RTOConfig(ActorCriticConfig):
    name: Literal["rto"] = "rto"
    """Reinforced token optimisation: PPO with the DPO reward on every token."""
    beta1: float = Field(0.1, gt=0)
    """β1, the weight of log π_dpo/π_ref on every token (TL;DR: 0.1)."""
    beta2: float = Field(0.01, ge=0)
    """β2, the weight of the KL from the reference (UltraFeedback: 0.01; TL;DR: 0.07)."""
    terminal: Literal["none", "model", "function"] = "none"
    """What is added on the last token: a reward model's score, or what a function (rollout.reward) says."""


class RTO(ActorCritic):
    """Zhong et al. (2024), with the terminal reward of its third version where one is asked for."""

    name = "rto"
    Config = RTOConfig
    config: RTOConfig

    @property
    def frozen(self) -> Mapping[str, Need]:
        terminal: dict[str, Need] = {"reward": "score"} if self.config.terminal == "model" else {}
        return {**super().frozen, "dpo": "logprobs", **terminal}

    @property
    def kl_weight(self) -> float:
        return self.config.beta2

    @property
    def rated(self) -> bool:
        return self.config.terminal == "function"

    def reward(self, scored: Scored) -> Tensor:
        """β1 log π_dpo/π_ref (y_t), on the last token with the terminal reward added: [T]."""
        reward_T = self.config.beta1 * log_ratio(scored, "dpo", "reference")
        if self.config.terminal == "none":
            return reward_T
        return reward_T + at_last(scored.responses, score(scored, self.config.terminal))
