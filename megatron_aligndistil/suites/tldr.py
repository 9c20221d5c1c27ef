"""TL;DR: summaries of forum posts beside a baseline's, and what a reward model says of them (the paper's table 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_aligndistil.config import Section
from megatron_aligndistil.data.records import load_records
from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.suites import pairwise, statistics
from megatron_aligndistil.suites.asks import Ask, user
from megatron_aligndistil.suites.base import (
    Example,
    Judging,
    Measurement,
    Replies,
    Result,
    Sampling,
    excerpt,
    read_questions,
    responses_of,
    spread,
)
from megatron_aligndistil.suites.judging import choice
from megatron_aligndistil.suites.pairwise import Contest, Orders, Verdict
from megatron_aligndistil.suites.prompts import SUMMARIES

_MAX_TOKENS, _JUDGE_TOKENS = 128, 512


class TldrConfig(Section):
    questions: str | None = None
    """TL;DR: records with `prompt`, the post as the model is to see it."""
    baseline: str | None = None
    """TL;DR: the baseline's summaries in the order of the questions, as `response` (what `aligndistil generate` writes)
    or `completion`; the questions' own `completion` when not given."""
    orders: Orders = "both"
    """TL;DR: judge each pair in `both` orders, or in one drawn from its text (`random`)."""


class Tldr:
    """Win rate against the baseline's summaries; mean reward where a reward model is given."""

    name = "tldr"

    def __init__(
        self, config: TldrConfig, sampling: Sampling, judging: Judging, limit: int | None, rewarded: bool
    ) -> None:
        if not config.questions:
            raise ConfigError("tldr needs --tldr.questions, records with a `prompt` each")
        self._config, self._sampling, self._judging, self._rewarded = config, sampling, judging, rewarded
        records = read_questions(config.questions, ("prompt",) if config.baseline else ("prompt", "completion"))
        wrong = next((record.where for record in records if not isinstance(record.values["prompt"], str)), None)
        if wrong:
            raise DataError(f"{wrong}: 'prompt' is not text")
        self._places = spread(len(records), limit)
        self._prompts = [records[place].values["prompt"] for place in self._places]
        self._baselines = _baselines(config.baseline or config.questions, len(records))

    def asks(self, answers: Replies) -> list[Ask]:
        sampling = self._sampling
        temperature = 0.0 if sampling.temperature is None else sampling.temperature
        return [
            Ask(
                str(place),
                (user(prompt),),
                temperature,
                sampling.max_tokens or _MAX_TOKENS,
                0,
                sampling.top_p,
                sampling.seed,
            )
            for place, prompt in zip(self._places, self._prompts, strict=True)
        ]

    def _contests(self, answers: Replies) -> list[Contest]:
        return [
            Contest(str(place), "", prompt, self._baselines[place].strip(), answers[str(place)].text.strip(), place)
            for place, prompt in zip(self._places, self._prompts, strict=True)
            if str(place) in answers
        ]

    def verdict_asks(self, answers: Replies) -> list[Ask]:
        judging = self._judging
        max_tokens = judging.max_tokens or _JUDGE_TOKENS
        contests = self._contests(answers)
        return pairwise.verdict_asks(contests, self._config.orders, SUMMARIES, judging.temperature, max_tokens)

    def measurement(self, answers: Replies) -> Measurement | None:
        if not self._rewarded:
            return None
        return Measurement("score", ("reward",), responses=responses_of(self.asks({}), answers))

    def score(self, answers: Replies, verdicts: Replies, measured: Mapping[str, statistics.Figure]) -> Result:
        contests = self._contests(answers)
        read = {name: _read(name, reply.text) for name, reply in verdicts.items()}
        whole, unread = pairwise.read_all(contests, self._config.orders, verdicts, read)
        examples = [
            Example(
                contest.id,
                "",
                excerpt(contest.question),
                excerpt(contest.answer),
                score=sum(each.score for each in whole[contest.id]) / len(whole[contest.id]),
                weight=1.0,
                index=contest.index,
            )
            for contest in contests
            if contest.id in whole
        ]
        figures = {"TL;DR WR": statistics.ratio([each.score for each in examples], [1.0] * len(examples))}
        if "reward_score" in measured:
            figures["TL;DR reward"] = measured["reward_score"]
        return Result(
            suite="tldr",
            main="TL;DR WR",
            figures=figures,
            position=pairwise.position(whole),
            counts={"questions": len(self._prompts), "answers": len(contests), "verdicts": len(verdicts)}
            | {"unreadable verdicts": len(unread), "questions scored": len(examples)},
            unread=unread,
            examples=examples,
            settings={
                "questions": self._config.questions,
                "baseline": self._config.baseline or "the questions' own",
                "judge prompt": SUMMARIES.name,
                "orders": self._config.orders,
            },
        )


def _read(name: str, text: str) -> Verdict | None:
    score = choice(text)
    if score is None:
        return None
    model_first = name.endswith("/model-first")
    return Verdict(model_first, score if model_first else 1 - score)


def _baselines(source: str, count: int) -> Sequence[str]:
    found = []
    for record in load_records(source):
        text = record.values.get("response", record.values.get("completion"))
        if not isinstance(text, str):
            raise DataError(f"{record.where} has no summary as text, under `response` or `completion`")
        found.append(text)
    if len(found) != count:
        raise DataError(f"{source} has {len(found)} summaries for {count} questions; they have to be in the same order")
    return found
