"""Proximal policy optimisation with a critic: the reward arrives at the end of the response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from megatron_aligndistil.algorithms._actor_critic import ActorCritic, ActorCriticConfig, at_last, log_ratio, score
from megatron_aligndistil.algorithms.base import Need, Scored


class PPOConfig(ActorCriticConfig):
    name: Literal["ppo"] = "ppo"
    """Proximal policy optimisation on sampled responses, with a critic."""
    reward: Literal["model", "function", "dpo", "contrastive"] = "model"
    """What rewards a response: a reward model, a function (rollout.reward), or what DPO models have learned."""
    kl: float = Field(0.01, ge=0)
    """Weight of the KL from the reference, taken from the reward of every token."""
    beta0: float = Field(0.1, gt=0)
    """β0, the β that the DPO models were trained with (rewards `dpo` and `contrastive`)."""


class PPO(ActorCritic):
    """Schulman et al. (2017), for language models as in Ouyang et al. (2022)."""

    name = "ppo"
    Config = PPOConfig
    config: PPOConfig

    @property
    def frozen(self) -> Mapping[str, Need]:
        needs: dict[str, dict[str, Need]] = {
            "model": {"reward": "score"},
            "function": {},
            "dpo": {"dpo": "logprobs"},
            "contrastive": {"dpo": "logprobs", "reverse": "logprobs"},
        }
        return {**super().frozen, **needs[self.config.reward]}

    @property
    def kl_weight(self) -> float:
        return self.config.kl

    @property
    def rated(self) -> bool:
        return self.config.reward == "function"

    def reward(self, scored: Scored) -> Tensor:
        """r(x, y) on the last token, 0 elsewhere: [T].

        The reward model's score; the function's number; β0 Σ_t log π_dpo/π_ref (y_t) (AlignDistil, eq. 5); or
        β0 Σ_t log π_dpo/π_rev (y_t) (eq. 12).
        """
        source = self.config.reward
        if source in ("dpo", "contrastive"):
            against = "reference" if source == "dpo" else "reverse"
            score_B = self.config.beta0 * scored.responses.sum_rows(log_ratio(scored, "dpo", against))
        else:
            score_B = score(scored, source)
        return at_last(scored.responses, score_B)
