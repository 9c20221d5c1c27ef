"""Arena-Hard v0.1 and v2.0: the model beside a baseline on hard prompts, in both orders (Li et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_aligndistil.config import Section
from megatron_aligndistil.data.records import Record, load_records
from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.suites import pairwise, statistics, style
from megatron_aligndistil.suites.asks import Ask, user
from megatron_aligndistil.suites.base import (
    Example,
    JudgedSuite,
    Judging,
    Replies,
    Result,
    Sampling,
    by_category,
    excerpt,
    read_questions,
    spread,
)
from megatron_aligndistil.suites.judging import label
from megatron_aligndistil.suites.pairwise import Contest, Verdict
from megatron_aligndistil.suites.prompts import PAIRWISE, arena_hard_prompt

_V01 = "arena-hard-v0.1"  # the category of every question of that version
_BASELINES = {_V01: "gpt-4-0314", "creative_writing": "gemini-2.0-flash-001"}
_BASELINE = "o3-mini-2025-01-31"  # of every other category
_ANSWER_TOKENS = {"v0.1": 4096, "v2.0": 16_000}


class ArenaHardConfig(Section):
    questions: str | None = None
    """Arena-Hard: question.jsonl of v0.1 or v2.0."""
    baseline: str | list[str] | None = None
    """Arena-Hard: the baseline's answers (model_answer/NAME.jsonl), several files where categories have their own
    baseline; or the answers.jsonl of another evaluation."""
    prompts: str | None = None
    """Arena-Hard: arena-hard-auto's utils/judge_utils.py, which holds the judge's prompts; a short one of ours when not
    given."""


class ArenaHard(JudgedSuite):
    """Win rate against the baseline; `>>` counts three times; raw and with style controlled."""

    name = "arena_hard"

    def __init__(self, config: ArenaHardConfig, sampling: Sampling, judging: Judging, limit: int | None) -> None:
        if not config.questions or not config.baseline:
            raise ConfigError(
                "arena_hard needs --arena_hard.questions and --arena_hard.baseline, question.jsonl and the baseline's "
                "model_answer/NAME.jsonl of arena-hard-auto"
            )
        self._sampling, self._judging = sampling, judging
        records = read_questions(config.questions, ("uid", "category", "prompt"), "uid")
        self.version = "v0.1" if records[0].values["category"] == _V01 else "v2.0"
        self._places = spread(len(records), limit)
        self._questions = [records[place] for place in self._places]
        files = [config.baseline] if isinstance(config.baseline, str) else config.baseline
        self._baselines = _baselines(files, self._questions)
        self._prompt = arena_hard_prompt(config.prompts) if config.prompts else PAIRWISE
        self._settings: dict[str, Any] = {"version": self.version, "questions": config.questions}
        self._settings |= {"baseline": ", ".join(files), "judge prompt": self._prompt.name}

    def asks(self, answers: Replies) -> list[Ask]:
        sampling = self._sampling
        max_tokens = sampling.max_tokens or _ANSWER_TOKENS[self.version]
        return [
            Ask(
                str(record.values["uid"]),
                (user(record.values["prompt"]),),
                sampling.temperature or 0.0,
                max_tokens,
                top_p=sampling.top_p,
                seed=sampling.seed,
            )
            for record in self._questions
        ]

    def _contests(self, answers: Replies) -> list[Contest]:
        return [
            Contest(name, str(values["category"]), values["prompt"], self._baselines[name], answers[name].text, place)
            for place, values in (
                (place, record.values) for place, record in zip(self._places, self._questions, strict=True)
            )
            if (name := str(values["uid"])) in answers
        ]

    def verdict_asks(self, answers: Replies) -> list[Ask]:
        judging = self._judging
        max_tokens = judging.max_tokens or _ANSWER_TOKENS[self.version]
        return pairwise.verdict_asks(self._contests(answers), "both", self._prompt, judging.temperature, max_tokens)

    def score(self, answers: Replies, verdicts: Replies, measured: Mapping[str, statistics.Figure]) -> Result:
        contests = self._contests(answers)
        read = {name: _read(name, reply.text) for name, reply in verdicts.items()}
        whole, unread = pairwise.read_all(contests, "both", verdicts, read)
        examples = [self._example(contest, whole[contest.id]) for contest in contests if contest.id in whole]
        column = f"Arena-Hard {self.version}"
        return Result(
            suite=f"arena_hard {self.version}",
            main=f"{column} WR",
            figures={f"{column} WR": _win_rate(examples)},
            categories=by_category(examples, _win_rate),
            position=pairwise.position(whole),
            counts={"questions": len(self._questions), "answers": len(contests), "verdicts": len(verdicts)}
            | {"unreadable verdicts": len(unread), "questions scored": len(whole)},
            unread=unread,
            examples=examples,
            settings=self._settings,
            notes=[
                "Win rates count >> three times; intervals resample questions. A question counts when both its "
                "verdicts can be read."
            ],
        )

    def _example(self, contest: Contest, verdicts: Sequence[Verdict]) -> Example:
        return Example(
            id=contest.id,
            category=contest.category,
            question=excerpt(contest.question),
            answer=excerpt(contest.answer),
            score=sum(each.score * each.weight for each in verdicts),
            weight=sum(each.weight for each in verdicts),
            index=contest.index,
            extra={"style": style.features(contest.answer, contest.baseline)},
        )


def style_controlled(models: Mapping[str, Sequence[Example]]) -> tuple[dict[str, dict[str, statistics.Figure]], dict]:
    """Style-controlled win rates in percent by model, and the coefficients of style by feature.

    "SC" is arena-hard-auto's: all models together, features z-scored. "WR at baseline's style" has the baseline's own
    style as its point of reference. All battles of one question share its features, so they are one row.
    """
    flat = [(number, example) for number, examples in enumerate(models.values()) for example in examples]
    questions = {name: number for number, name in enumerate(sorted({example.id for _, example in flat}))}
    weights = np.array([example.weight for _, example in flat])
    battles = style.Battles(
        owner_N=np.array([number for number, _ in flat]),
        question_N=np.array([questions[example.id] for _, example in flat]),
        features_NF=np.array([example.extra["style"] for _, example in flat]),
        outcome_N=np.array([example.score for _, example in flat]) / weights,
        weights_N=weights,
    )
    controlled, coefficients = style.controlled_rates(battles, centred=True)
    at_baseline, _ = style.controlled_rates(battles, centred=False)
    figures = {
        name: {"SC": controlled[number], "WR at baseline's style": at_baseline[number]}
        for number, name in enumerate(models)
    }
    return figures, dict(zip(style.FEATURES, coefficients.tolist(), strict=True))


def _win_rate(examples: Sequence[Example]) -> statistics.Figure:
    return statistics.ratio([each.score for each in examples], [each.weight for each in examples])


def _read(name: str, text: str) -> Verdict | None:
    found = label(text)
    if found is None:
        return None
    model_first = name.endswith("/model-first")
    score, weight = found
    return Verdict(model_first, score if model_first else 1 - score, weight)


def _baselines(files: Sequence[str], questions: Sequence[Record]) -> dict[str, str]:
    """The baseline's answer to each question: with several files, that of the model that is its category's baseline."""
    by_model: dict[str, dict[str, str]] = {}
    for file in files:
        for record in load_records(file):
            name, model, text = _baseline_answer(record)
            by_model.setdefault(model if len(files) > 1 else "", {})[name] = text
    found = {}
    for record in questions:
        name, category = str(record.values["uid"]), record.values["category"]
        model = _BASELINES.get(category, _BASELINE) if len(files) > 1 else ""
        if name not in by_model.get(model, {}):
            whose = f" by {model}" if model else ""
            raise DataError(f"{record.where}: {', '.join(files)} has no baseline answer{whose} to question {name}")
        found[name] = by_model[model][name]
    return found


def _baseline_answer(record: Record) -> tuple[str, str, str]:
    """(question, model, text) of a line of arena-hard-auto's model_answer, or of answers stored by us."""
    values = record.values
    try:
        if "reply" in values:
            return str(values["id"]), str(values["model"]), values["reply"]["text"]
        content = values["messages"][-1]["content"]
        return str(values["uid"]), str(values["model"]), content if isinstance(content, str) else content["answer"]
    except (KeyError, LookupError, TypeError) as error:
        raise DataError(f"{record.where} is no answer: it needs uid, model and messages") from error
