"""What PPO and RTO share: the clipped policy loss, the critic's loss, and advantages from rewards and values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from megatron_aligndistil.algorithms.base import Algorithm, Frozen, HeadKind, LossOutput, Need, Scored
from megatron_aligndistil.config import Section
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.ops.advantages import gae, moments
from megatron_aligndistil.ops.head import LMHead, ScalarHead
from megatron_aligndistil.ops.logprobs import label_logprobs

_EPSILON = 1e-8  # under the root of the variance of advantages


class ActorCriticConfig(Section):
    name: str
    clip: float = Field(0.2, gt=0, lt=1)
    """How far the probability ratio of a token may leave 1 before its gradient ends."""
    gamma: float = Field(1.0, gt=0, le=1)
    """γ, the discount of later rewards."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """λ of generalised advantage estimation."""
    critic_lr: float = Field(9e-6, gt=0)
    """Peak learning rate of the critic; that of the policy is `optim.lr`."""


class ActorCritic(Algorithm):
    """A policy and a critic, trained on what the policy samples. Subclasses say what is rewarded."""

    data = "prompts"
    config: ActorCriticConfig

    @property
    def trained(self) -> tuple[str, ...]:
        return ("policy", "critic")

    @property
    def best(self) -> str:
        return "highest eval/policy/reward"

    def head(self, model: str) -> HeadKind:
        return "values" if model == "critic" else "lm"

    @property
    def learning_rates(self) -> Mapping[str, float]:
        return {"critic": self.config.critic_lr}

    @property
    def frozen(self) -> Mapping[str, Need]:
        return {"reference": "logprobs", "critic": "values"}

    @property
    @abstractmethod
    def kl_weight(self) -> float:
        """The weight of log π_old/π_ref (y_t), which is taken from every token's reward."""

    @abstractmethod
    def reward(self, scored: Scored) -> Tensor:
        """The reward of each token without the KL, [T]."""

    def prepare(
        self, batches: Sequence[Scored], mismatched: Sequence[Scored], total: Callable[[Tensor], Tensor]
    ) -> Sequence[Mapping[str, Tensor]]:
        """Rewards, advantages and returns with the values of the critic as it is before the update.

        r_t = reward_t - w (log π_old - log π_ref)(y_t), π_old being the policy that sampled, and w the `kl_weight`;
        advantages and returns as in :func:`gae`; advantages are then whitened (mean 0, variance 1) over all response
        tokens of the global batch, returns are not. A response that was cut at the limit earns what a whole one does,
        and nothing is assumed to follow it.

        Raises ConfigError, on all data parallel ranks alike, where a response was not sampled.
        """
        self._check(batches, total)
        found = []
        for scored in batches:
            reference_T, values_T = scored.frozen["reference"].logprobs_T, scored.frozen["critic"].values_T
            sampled_T = scored.responses.sampled_T
            assert reference_T is not None and values_T is not None and sampled_T is not None
            reward_T, kl_T = self.reward(scored), sampled_T - reference_T
            advantages_T, returns_T = gae(
                reward_T - self.kl_weight * kl_T,
                values_T,
                scored.responses.lengths_B,
                gamma=self.config.gamma,
                lam=self.config.gae_lambda,
            )
            found.append((advantages_T, returns_T, reward_T, kl_T))
        mean_2, variance_2 = moments([torch.stack(each[:2]) for each in found], total)
        scale = torch.rsqrt(variance_2[0] + _EPSILON)
        # A_t is what the critic leaves of R_t unexplained.
        explained = torch.where(variance_2[1] > 0, 1 - variance_2[0] / variance_2[1].clamp(min=_EPSILON**2), 0.0)
        return [
            {
                "advantages_T": ((advantages_T - mean_2[0]) * scale).to(advantages_T.dtype),
                "returns_T": returns_T,
                "rewards_T": reward_T,
                "kl_T": kl_T,
                "explained_variance": explained,
            }
            for advantages_T, returns_T, reward_T, kl_T in found
        ]

    def _check(self, batches: Sequence[Scored], total: Callable[[Tensor], Tensor]) -> None:
        """Collectives: one call of `total` on one number."""
        counts = []
        for scored in batches:
            assert scored.responses.sampled_T is not None, "batches of `prompts` have it"
            counts.append(scored.responses.sampled_T.isnan().sum())
        if total(torch.stack(counts).sum()):
            raise ConfigError(
                f"{self.name} learns on what the policy has sampled itself; set rollout.on_policy_fraction to 1"
            )

    def loss(self, model: str, head: Any, responses: Responses, frozen: Mapping[str, Frozen]) -> LossOutput:
        """The loss of the policy or of the critic, counted in response tokens."""
        return self._critic_loss(head, responses) if model == "critic" else self._policy_loss(head, responses)

    def _policy_loss(self, head: LMHead, responses: Responses) -> LossOutput:
        """L = -mean over tokens of min(ρ_t A_t, clip(ρ_t, 1 - ε, 1 + ε) A_t), ρ_t = π_θ/π_old (y_t) (PPO, eq. 7).

        Both probabilities are at temperature 1 and of the whole vocabulary, whatever the settings of sampling.

        Metrics, over tokens: `clip_share`, where clipping has ended the gradient; `approx_kl`, ρ - 1 - log ρ, an
        estimate of KL(π_old ‖ π_θ); `entropy`, both in nats. Over responses: `reward` without the KL;
        `kl_reference_sequence`, the sampled Σ_t log π_old/π_ref in nats; `length` in tokens. Collectives: those of
        :func:`label_logprobs`.
        """
        logprobs_T, entropy_T = label_logprobs(head, responses.targets_T)
        prepared, sampled_T = responses.prepared, responses.sampled_T
        assert sampled_T is not None, "`prepare` has seen to it"
        advantages_T = prepared["advantages_T"].to(logprobs_T.dtype)
        log_ratio_T = logprobs_T - sampled_T.to(logprobs_T.dtype)
        ratio_T = log_ratio_T.exp()
        free_T = ratio_T * advantages_T
        bound_T = ratio_T.clamp(1 - self.config.clip, 1 + self.config.clip) * advantages_T
        num_tokens, num_rows = responses.lengths_B.sum(), (responses.lengths_B > 0).sum()
        metrics = {
            "clip_share": ((bound_T < free_T).sum(), num_tokens),
            "approx_kl": ((ratio_T - 1 - log_ratio_T).detach().sum(), num_tokens),
            "entropy": (entropy_T.sum(), num_tokens),
            "reward": (prepared["rewards_T"].sum(), num_rows),
            "kl_reference_sequence": (prepared["kl_T"].sum(), num_rows),
            "length": (num_tokens, num_rows),
        }
        return LossOutput(-torch.minimum(free_T, bound_T).sum(), num_tokens, metrics)

    def _critic_loss(self, head: ScalarHead, responses: Responses) -> LossOutput:
        """L = mean over tokens of ½ (V_t - R_t)².

        Values are not clipped around the critic's earlier ones as in some versions of PPO: those are found anew before
        each update, so there is nothing to hold.

        Metrics, over tokens: `returns`, the mean of R_t; `value_error`, that of (V_t - R_t)²; `explained_variance`,
        1 - Var(R - V) / Var(R) over the global batch. No collectives.
        """
        values_T = head.values()
        returns_T = responses.prepared["returns_T"].to(values_T.dtype)
        error_T = (values_T - returns_T) ** 2
        num_tokens = responses.lengths_B.sum()
        metrics = {
            "returns": (returns_T.sum(), num_tokens),
            "value_error": (error_T.detach().sum(), num_tokens),
            "explained_variance": (responses.prepared["explained_variance"] * num_tokens, num_tokens),
        }
        return LossOutput(0.5 * error_T.sum(), num_tokens, metrics)


def log_ratio(scored: Scored, model: str, against: str) -> Tensor:
    """log π_model/π_against of each response token, [T]."""
    model_T, against_T = scored.frozen[model].logprobs_T, scored.frozen[against].logprobs_T
    assert model_T is not None and against_T is not None, "the engine gives what `frozen` asks for"
    return model_T - against_T


def score(scored: Scored, source: str) -> Tensor:
    """What the reward model ("model") or the reward function ("function") says of each response, [B]."""
    score_B = scored.frozen["reward"].score_B if source == "model" else scored.responses.ratings_B
    assert score_B is not None, "the engine gives what `frozen` asks for"
    return score_B


def at_last(responses: Responses, score_B: Tensor) -> Tensor:
    """A number a row on the row's last position and 0 elsewhere, [T]; a filler row's is left out."""
    full_B = responses.lengths_B > 0
    ends_B = responses.lengths_B.cumsum(0) - 1
    placed_T = score_B.new_zeros(responses.targets_T.numel())
    return placed_T.index_put((ends_B[full_B],), score_B[full_B])
