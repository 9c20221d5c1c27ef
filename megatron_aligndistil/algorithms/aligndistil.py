"""AlignDistil: a policy distilled, token by token, from the extrapolation of a DPO model (arXiv 2503.02832)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from megatron_aligndistil.algorithms.base import Algorithm, Frozen, LossOutput, Need, sampled_rewards
from megatron_aligndistil.config import Section
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.ops.distil import Distilled, TeacherForm, distil
from megatron_aligndistil.ops.head import LMHead


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
    temperature: float = Field(1.0, gt=0)
    """Temperature at which all distributions are taken: policy, teacher, and those that TVD compares."""
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
    def frozen(self) -> Mapping[str, Need]:
        return {"dpo": "distribution", self.negative: "distribution"}

    @property
    def shifted_mask(self) -> bool:
        return self.config.official_compat

    def loss(self, model: str, head: LMHead, responses: Responses, frozen: Mapping[str, Frozen]) -> LossOutput:
        """L = mean over rows of (1/|y|) Σ_t β_t KL(π_θ || π*) with β_t = β0/α_t (AlignDistil, eq. 18 and 19).

        Counted in rows; an empty row counts for nothing. Gradient flows through π_θ only, not through π*, α_t or β_t.
        Metrics, in nats: see :meth:`_metrics`. Collectives: those of :func:`distil`.
        """
        dpo, negative = frozen["dpo"].head, frozen[self.negative].head
        assert dpo is not None and negative is not None, "the engine gives what `frozen` asks for"
        weights_T = responses.lengths_B[responses.rows_T].double().reciprocal()
        found = distil(head, dpo, negative, responses.targets_T, weights_T, self.form, self.config.beta0)
        return LossOutput(found.loss_sum, (responses.lengths_B > 0).sum(), self._metrics(responses, found))

    @property
    def form(self) -> TeacherForm:
        """How the teacher is composed."""
        base: Literal["dpo", "negative"] = "dpo" if self.negative == "reverse" else "negative"
        if self.config.teacher in ("vanilla", "contrastive"):
            rate, offset = 0.0, self.config.beta0 / self.config.beta
        else:
            rate, offset = (2 if self.config.official_compat else 1) * self.config.r, self.config.eps
        return TeacherForm(base, rate, offset, self.config.temperature)

    def _metrics(self, responses: Responses, found: Distilled) -> dict[str, tuple[Tensor, Tensor]]:
        """The paper's metrics.

        Per token: `alpha`, `tvd`, `entropy` of the policy, `kl_teacher`, `kl_dpo_token` and `kl_reverse_token` (or
        `kl_reference_token`), the divergences of the policy from those models. Per sequence: `reward`, the policy's
        expected reward β0 Σ_t E_{v∼π_θ}[log π_dpo(v) - log π_neg(v)] (eq. 12, or 6), `kl_dpo_sequence`,
        `kl_reverse_sequence` (or `kl_reference_sequence`), and `length` in tokens. Beside these, those of
        :func:`sampled_rewards`.
        """
        policy_T, dpo_T, negative_T = found.expected_3T
        num_tokens, num_rows = responses.lengths_B.sum(), (responses.lengths_B > 0).sum()
        kl_dpo, kl_negative = (policy_T - dpo_T).sum(), (policy_T - negative_T).sum()
        metrics = {
            "reward": (self.config.beta0 * (dpo_T - negative_T).sum(), num_rows),
            "entropy": (-policy_T.sum(), num_tokens),
            "kl_teacher": (found.kl_T.sum(), num_tokens),
            "kl_dpo_token": (kl_dpo, num_tokens),
            "kl_dpo_sequence": (kl_dpo, num_rows),
            f"kl_{self.negative}_token": (kl_negative, num_tokens),
            f"kl_{self.negative}_sequence": (kl_negative, num_rows),
            "alpha": (found.alpha_T.sum(), num_tokens),
            "tvd": (found.tvd_T.sum(), num_tokens),
            "length": (num_tokens, num_rows),
        }
        if not self.shifted_mask:  # whose last position predicts no token of the response
            sampled_dpo_T, sampled_negative_T = found.sampled_2T
            metrics |= sampled_rewards(responses, self.config.beta0 * (sampled_dpo_T - sampled_negative_T))
        return metrics
