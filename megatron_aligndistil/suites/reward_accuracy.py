"""Reward accuracy: how often each reward prefers the better response of held-out pairs (the paper's table 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_aligndistil.config import Section
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.suites import statistics
from megatron_aligndistil.suites.asks import Ask
from megatron_aligndistil.suites.base import Measurement, Replies, Result

_COLUMNS = {
    "reward_model": "reward model",
    "dpo_reward": "DPO reward",
    "contrastive_reward": "contrastive reward",
    "reverse_reward": "reverse DPO reward",
    "policy_reward": "policy's implicit reward",
}


class RewardAccuracyConfig(Section):
    data: str | None = None
    """Reward accuracy: preference pairs that no model was trained on."""


class RewardAccuracy:
    """Accuracies of the rewards that the given models make, with Wilson's intervals."""

    name = "reward_accuracy"

    def __init__(self, config: RewardAccuracyConfig, models: Sequence[str]) -> None:
        if not config.data:
            raise ConfigError("reward_accuracy needs --reward_accuracy.data, held-out preference pairs")
        given = set(models)
        if not ("reward" in given or {"dpo", "reverse"} <= given or {"reference", "dpo"} <= given):
            raise ConfigError(
                "reward_accuracy needs --models.reference and --models.dpo, --models.dpo and --models.reverse, or "
                "--models.reward"
            )
        self._data, self._models = config.data, tuple(models)

    def asks(self, answers: Replies) -> list[Ask]:
        return []

    def verdict_asks(self, answers: Replies) -> list[Ask]:
        return []

    def measurement(self, answers: Replies) -> Measurement:
        return Measurement("accuracy", self._models, data=self._data)

    def score(self, answers: Replies, verdicts: Replies, measured: Mapping[str, statistics.Figure]) -> Result:
        figures = {
            _COLUMNS[name]: statistics.proportion(found.value, found.count or 0)
            for name, found in measured.items()
            if name in _COLUMNS
        }
        figures = {column: figures[column] for column in _COLUMNS.values() if column in figures}
        main = next(iter(figures), "")
        pairs = figures[main].count or 0 if main else 0
        return Result("reward_accuracy", main, figures, counts={"pairs": pairs}, settings={"data": self._data})
