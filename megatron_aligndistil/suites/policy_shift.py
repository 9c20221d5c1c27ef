"""Policy shift: how far a policy has moved from where it began, and whether its text has become poorer (table 3)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from megatron_aligndistil.config import Section
from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.suites import statistics
from megatron_aligndistil.suites.asks import Ask, user
from megatron_aligndistil.suites.base import (
    Example,
    Measurement,
    Replies,
    Result,
    Sampling,
    excerpt,
    read_questions,
    responses_of,
    spread,
)

_MAX_TOKENS = 1024
_WORDS = re.compile(r"\w+|[^\w\s]")
_SIZES = (1, 2, 3, 4)
_COLUMNS = {
    "kl_reference": "KL from initial",
    "kl_dpo": "KL from DPO",
    "kl_reverse": "KL from reverse DPO",
    "entropy": "entropy",
    "length": "length (tokens)",
}


class PolicyShiftConfig(Section):
    prompts: str | None = None
    """Policy shift: records with a `prompt` (text or messages) that the policy answers."""


class PolicyShift:
    """KL, entropy (nats a token), length, and distinct n-grams of the policy's own samples."""

    name = "policy_shift"

    def __init__(self, config: PolicyShiftConfig, sampling: Sampling, limit: int | None, models: Sequence[str]) -> None:
        if not config.prompts:
            raise ConfigError("policy_shift needs --policy_shift.prompts, records with a `prompt` each")
        records = read_questions(config.prompts, ("prompt",))
        for record in records:
            prompt = record.values["prompt"]
            whole = isinstance(prompt, list) and all(isinstance(each, dict) and "content" in each for each in prompt)
            if not (isinstance(prompt, str) or whole):
                raise DataError(f"{record.where}: 'prompt' is neither text nor messages")
        self._prompts = {place: records[place].values["prompt"] for place in spread(len(records), limit)}
        self._source, self._sampling = config.prompts, sampling
        # Distances from models that are not given cannot be measured; without any, the engine has nothing to do.
        self._models = tuple(name for name in models if name in ("reference", "dpo", "reverse"))

    def asks(self, answers: Replies) -> list[Ask]:
        sampling = self._sampling
        temperature = 1.0 if sampling.temperature is None else sampling.temperature
        return [
            Ask(
                str(place),
                (user(prompt),) if isinstance(prompt, str) else tuple(prompt),
                temperature,
                sampling.max_tokens or _MAX_TOKENS,
                top_p=sampling.top_p,
                seed=sampling.seed,
            )
            for place, prompt in self._prompts.items()
        ]

    def verdict_asks(self, answers: Replies) -> list[Ask]:
        return []

    def measurement(self, answers: Replies) -> Measurement | None:
        if not self._models:
            return None
        return Measurement("kl", self._models, responses=responses_of(self.asks({}), answers))

    def score(self, answers: Replies, verdicts: Replies, measured: Mapping[str, statistics.Figure]) -> Result:
        figures = {column: measured[name] for name, column in _COLUMNS.items() if name in measured}
        texts = [_WORDS.findall(reply.text.lower()) for reply in answers.values()]
        figures["length (words)"] = statistics.mean([len(words) for words in texts])
        for size in _SIZES:
            shares = [share for words in texts if not math.isnan(share := distinct(words, size))]
            figures[f"distinct-{size}"] = statistics.mean(shares, scale=100.0)
        examples = [
            Example(ask.id, "", excerpt(ask.messages[-1]["content"]), excerpt(reply.text), share, 1.0, int(ask.id))
            for ask in self.asks({})
            if (reply := answers.get(ask.id))
            and not math.isnan(share := distinct(_WORDS.findall(reply.text.lower()), 2))
        ]
        return Result(
            suite="policy_shift",
            main="distinct-2",
            figures=figures,
            counts={"prompts": len(self._prompts), "answers": len(answers)},
            examples=examples,
            settings={"prompts": self._source},
            notes=["KL is summed over a response, in nats. distinct-n: n-grams of a response that differ, in percent."],
        )


def distinct(words: Sequence[str], size: int) -> float:
    """Different n-grams over all n-grams of a text; NaN where it is too short for any."""
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
