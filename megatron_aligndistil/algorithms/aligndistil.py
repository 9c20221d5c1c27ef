"""AlignDistil: a policy distilled, token by token, from the extrapolation of a DPO model (arXiv 2503.02832)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from megatron_aligndistil.algorithms.base import Algorithm, Frozen, LossOutput, sampled_rewards
from megatron_aligndistil.config import Section
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.ops.head import LMHead
from megatron_aligndistil.ops.teacher import Teacher, compose_teacher
from megatron_aligndistil.ops.vocab_parallel import expected_logprobs, label_logprobs_given, reverse_kl


class AlignDistilConfig(Section):
    name: Literal["aligndistil"] = "aligndistil"
    """Token-level distillation from a DPO model and a reverse DPO model (or the reference)."""
    teacher: Literal["adaptive", "contrastive", "vanilla", "vanilla_adaptive"] = "adaptive"
    """`adaptive`: the method; `contrastive`: its constant form; `vanilla...`: reference in reverse's place."""
    beta0: float = Field(0.1, gt=0)
    """β0, the β that the DPO models were trained with."""
    beta: float = Field(0.08, gt=0)
    """β of the constant teachers (`contrastive`, `vanilla`): they extrapolate by β0/β."""
    r: float = Field(10.0, ge=0)
    """Bound of the adaptive coefficient α_t = r·TVD_t + ε; with `official_compat`, the authors' `beta2` (half of r)."""
    eps: float = Field(1e-3, gt=0)
    """ε, the adaptive coefficient where the two models agree."""
    on_policy: bool = False
    """Sample responses from the policy (eq. 18) to the prompts of data.train, not learn on given ones (eq. 19)."""
    official_compat: bool = False
    """As the authors' code does: TVD without its ½, and the response mask one position late."""


class AlignDistil(Algorithm):
    name = "aligndistil"
    Config = AlignDistilConfig
    config: AlignDistilConfig

    @property
    def data(self) -> Literal["responses", "prompts"]:  # type: ignore[override]
        return "prompts" if self.config.on_policy else "responses"

    @property
    def negative(self) -> str:
        """The model that the teacher moves away from."""
        return "reference" if self.config.teacher.startswith("vanilla") else "reverse"

    @property
    def frozen(self) -> Mapping[str, Literal["logprobs", "distribution"]]:
        return {"dpo": "distribution", self.negative: "distribution"}

    @property
    def shifted_mask(self) -> bool:
        return self.config.official_compat

    def loss(self, model: str, head: LMHead, responses: Responses, frozen: Mapping[str, Frozen]) -> LossOutput:
        """L = mean over rows of (1/|y|) Σ_t β_t KL(π_θ || π*) with β_t = β0/α_t (AlignDistil, eq. 19).

        Counted in rows; an empty row counts for nothing. Gradient flows through π_θ only, not through π*, α_t or β_t.
        Metrics, in nats: see :meth:`_metrics`. Collectives over the tensor parallel group: three all-gathers and two
        all-reduces forward, of at most 9 numbers a position; backward those of ``head.logits``.
        """
        policy_logits_Tv = head.logits()
        with torch.no_grad():
            dpo_logits_Tv = _logits(frozen["dpo"])
            negative_logits_Tv = _logits(frozen[self.negative])
        rate, offset = self._coefficient()
        teacher = compose_teacher(
            negative_logits_Tv if self.negative == "reference" else dpo_logits_Tv,
            dpo_logits_Tv,
            negative_logits_Tv,
            rate=rate,
            offset=offset,
            tp_group=head.shard.tp_group,
        )
        kl_T = reverse_kl(policy_logits_Tv, teacher.logits_Tv, head.shard.tp_group)
        loss_sum = responses.mean_rows(self.config.beta0 / teacher.alpha_T * kl_T).sum()
        others = [dpo_logits_Tv, negative_logits_Tv]
        expected_KT, (_, *found) = expected_logprobs(policy_logits_Tv, others, head.shard.tp_group)
        metrics = self._metrics(responses, teacher, kl_T.detach(), expected_KT)
        if not self.shifted_mask:  # whose last position predicts no token of the response
            dpo_T, negative_T = label_logprobs_given(others, found, responses.targets_T, head.shard)
            metrics |= sampled_rewards(responses, self.config.beta0 * (dpo_T - negative_T))
        return LossOutput(loss_sum, (responses.lengths_B > 0).sum(), metrics)

    def _coefficient(self) -> tuple[float, float]:
        """(rate, offset) of α_t = rate · TVD_t + offset."""
        if self.config.teacher in ("vanilla", "contrastive"):
            return 0.0, self.config.beta0 / self.config.beta
        return (2 if self.config.official_compat else 1) * self.config.r, self.config.eps

    def _metrics(
        self, responses: Responses, teacher: Teacher, kl_T: Tensor, expected_KT: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The paper's metrics.

        Per token: `alpha`, `tvd`, `entropy` of the policy, `kl_teacher`, `kl_dpo_token` and `kl_reverse_token` (or
        `kl_reference_token`), the divergences of the policy from those models. Per sequence: `reward`, the policy's
        expected reward β0 Σ_t E_{v∼π_θ}[log π_dpo(v) - log π_neg(v)] (eq. 12, or 6), `kl_dpo_sequence`,
        `kl_reverse_sequence` (or `kl_reference_sequence`), and `length` in tokens. Beside these, those of
        :func:`sampled_rewards`.
        """
        policy_T, dpo_T, negative_T = expected_KT
        num_tokens, num_rows = responses.lengths_B.sum(), (responses.lengths_B > 0).sum()
        kl_dpo, kl_negative = (policy_T - dpo_T).sum(), (policy_T - negative_T).sum()
        return {
            "reward": (self.config.beta0 * (dpo_T - negative_T).sum(), num_rows),
            "entropy": (-policy_T.sum(), num_tokens),
            "kl_teacher": (kl_T.sum(), num_tokens),
            "kl_dpo_token": (kl_dpo, num_tokens),
            "kl_dpo_sequence": (kl_dpo, num_rows),
            f"kl_{self.negative}_token": (kl_negative, num_tokens),
            f"kl_{self.negative}_sequence": (kl_negative, num_rows),
            "alpha": (teacher.alpha_T.sum(), num_tokens),
            "tvd": (teacher.tvd_T.sum(), num_tokens),
            "length": (num_tokens, num_rows),
        }


def _logits(model: Frozen) -> Tensor:
    assert model.head is not None, "the engine gives what `frozen` asks for"
    return model.head.logits()
