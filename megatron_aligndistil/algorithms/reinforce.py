"""REINFORCE on the contrastive DPO reward: the scalar comparators of AlignDistil's section 6.5 and appendix E."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from megatron_aligndistil.algorithms.base import Algorithm, Frozen, LossOutput, Need, sampled_rewards
from megatron_aligndistil.config import Section
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.ops.head import LMHead
from megatron_aligndistil.ops.logprobs import label_logprobs


class ReinforceConfig(Section):
    name: Literal["reinforce"] = "reinforce"
    """Policy gradient on sampled responses, with a scalar reward where AlignDistil has a distribution."""
    level: Literal["token", "sentence"] = "token"
    """`token`: each token earns its own reward (eq. 43); `sentence`: each earns that of the whole response (eq. 42)."""
    beta0: float = Field(0.1, gt=0)
    """β0, the β that the DPO models were trained with."""
    beta: float = Field(0.08, ge=0)
    """β, the weight of the KL from the DPO model."""


class Reinforce(Algorithm):
    name = "reinforce"
    Config = ReinforceConfig
    data = "prompts"
    config: ReinforceConfig

    @property
    def frozen(self) -> Mapping[str, Need]:
        return {"dpo": "logprobs", "reverse": "logprobs"}

    @property
    def best(self) -> str:
        return "highest eval/policy/reward_sampled"

    def loss(self, model: str, head: LMHead, responses: Responses, frozen: Mapping[str, Frozen]) -> LossOutput:
        """L = -mean over rows of (1/|y|) Σ_t A_t log π_θ(y_t), y sampled from π_θ; counted in rows.

        r_t = β0 (log π_dpo - log π_rev)(y_t) - β (log π_θ - log π_dpo)(y_t); A_t = r_t (AlignDistil, eq. 43), or
        Σ_s r_s on every token (eq. 42). Divided by |y| as eq. 18 is, so that the three compare. No gradient flows
        through A_t.

        Metrics: those of :func:`sampled_rewards` for the contrastive reward without the KL; `kl_dpo_sequence`, the
        sampled Σ_t log π_θ/π_dpo in nats a sequence; `entropy` of the policy in nats a token; and `length` in tokens.
        Collectives: those of :func:`label_logprobs`.
        """
        logprobs_T, entropy_T = label_logprobs(head, responses.targets_T)
        dpo_T, reverse_T = frozen["dpo"].logprobs_T, frozen["reverse"].logprobs_T
        assert dpo_T is not None and reverse_T is not None, "the engine gives what `frozen` asks for"
        kl_T = logprobs_T.detach() - dpo_T
        contrastive_T = self.config.beta0 * (dpo_T - reverse_T)
        advantage_T = contrastive_T - self.config.beta * kl_T
        if self.config.level == "sentence":
            advantage_T = responses.sum_rows(advantage_T)[responses.rows_T]
        num_rows, num_tokens = (responses.lengths_B > 0).sum(), responses.lengths_B.sum()
        metrics = sampled_rewards(responses, contrastive_T) | {
            "entropy": (entropy_T.sum(), num_tokens),
            "kl_dpo_sequence": (kl_T.sum(), num_rows),
            "length": (num_tokens, num_rows),
        }
        return LossOutput(-responses.mean_rows(advantage_T * logprobs_T).sum(), num_rows, metrics)
