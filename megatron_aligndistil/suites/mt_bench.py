"""MT-Bench: 80 questions of two turns, each answer graded from 1 to 10 by itself (Zheng et al. 2023; FastChat)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_aligndistil.config import Section
from megatron_aligndistil.data.records import Record, load_records
from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.suites import statistics
from megatron_aligndistil.suites.asks import Ask, Reply, assistant, user
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
from megatron_aligndistil.suites.judging import rating
from megatron_aligndistil.suites.prompts import JudgePrompt

# FastChat's settings: how freely each category is answered, and which are graded beside a reference answer.
_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
_WITH_REFERENCE = ("math", "reasoning", "coding")
_PROMPTS = ("single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn")
_MAX_TOKENS, _JUDGE_TOKENS = 1024, 2048


class MTBenchConfig(Section):
    questions: str | None = None
    """MT-Bench: FastChat's llm_judge/data/mt_bench/question.jsonl."""
    references: str | None = None
    """MT-Bench: reference answers for math, reasoning and coding (reference_answer/gpt-4.jsonl)."""
    prompts: str | None = None
    """MT-Bench: the judge's prompts (llm_judge/data/judge_prompts.jsonl)."""


class MTBench(JudgedSuite):
    """Two turns a question; each is graded, the second with the first in sight."""

    name = "mt_bench"

    def __init__(self, config: MTBenchConfig, sampling: Sampling, judging: Judging, limit: int | None) -> None:
        if not config.questions or not config.prompts:
            raise ConfigError(
                "mt_bench needs --mt_bench.questions and --mt_bench.prompts, FastChat's question.jsonl and "
                "judge_prompts.jsonl"
            )
        self._sampling, self._judging = sampling, judging
        records = read_questions(config.questions, ("question_id", "category", "turns"), "question_id")
        self._questions = [records[place] for place in spread(len(records), limit)]
        for record in self._questions:
            turns = record.values["turns"]
            if not (isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)):
                raise DataError(f"{record.where}: 'turns' is not a list of texts")
        self._references = _references(config.references, self._questions)
        self._prompts = _prompts(config.prompts)
        self._settings = {"questions": config.questions, "references": config.references, "prompts": config.prompts}

    def asks(self, answers: Replies) -> list[Ask]:
        asks = []
        for record in self._questions:
            category = record.values["category"]
            messages = []
            for turn, text in enumerate(record.values["turns"], 1):
                messages.append(user(text))
                asks.append(self._ask(f"{record.values['question_id']}/{turn}", category, tuple(messages)))
                reply = answers.get(asks[-1].id)
                if reply is None:
                    break
                messages.append(assistant(reply.text))
        return asks

    def _ask(self, name: str, category: str, messages: tuple) -> Ask:
        sampling = self._sampling
        own = _TEMPERATURES.get(category, 0.0)
        temperature = own if sampling.temperature is None else sampling.temperature
        max_tokens = sampling.max_tokens or _MAX_TOKENS
        return Ask(name, messages, temperature, max_tokens, top_p=sampling.top_p, seed=sampling.seed)

    def verdict_asks(self, answers: Replies) -> list[Ask]:
        asks = []
        for record in self._questions:
            name = str(record.values["question_id"])
            replies = [answers.get(f"{name}/{turn}") for turn in range(1, len(record.values["turns"]) + 1)]
            for turn in range(1, len(replies) + 1):
                given = [reply for reply in replies[:turn] if reply is not None]
                if len(given) == turn:
                    messages = self._prompt(name, turn).messages(self._values(record, given))
                    max_tokens = self._judging.max_tokens or _JUDGE_TOKENS
                    asks.append(Ask(f"{name}/{turn}", messages, self._judging.temperature, max_tokens))
        return asks

    def _prompt(self, name: str, turn: int) -> JudgePrompt:
        kind = "single-math-v1" if name in self._references else "single-v1"
        return self._prompts[kind if turn == 1 else f"{kind}-multi-turn"]

    def _values(self, record: Record, replies: Sequence[Reply]) -> dict[str, str]:
        """What the places of the prompts stand for; FastChat names the first turn's with and without a number."""
        values = {"question": record.values["turns"][0], "answer": replies[0].text}
        for turn, (question, reply) in enumerate(zip(record.values["turns"], replies, strict=False), 1):
            values[f"question_{turn}"], values[f"answer_{turn}"] = question, reply.text
        for turn, text in enumerate(self._references.get(str(record.values["question_id"]), []), 1):
            values[f"ref_answer_{turn}"] = text
        return values

    def score(self, answers: Replies, verdicts: Replies, measured: Mapping[str, statistics.Figure]) -> Result:
        ratings = {name: rating(reply.text) for name, reply in verdicts.items()}
        turns: list[list[float]] = [[], []]
        examples = []
        for index, record in enumerate(self._questions):
            name = str(record.values["question_id"])
            given = {turn: ratings.get(f"{name}/{turn}") for turn in range(1, len(record.values["turns"]) + 1)}
            found = {turn: value for turn, value in given.items() if value is not None}
            for turn, value in found.items():
                turns[min(turn, 2) - 1].append(value)
            if found:
                examples.append(self._example(record, index, found, answers))
        figures = {
            "MT-Bench 1st": statistics.mean(turns[0]),
            "MT-Bench 2nd": statistics.mean(turns[1]),
            "MT-Bench avg": _average(examples),
        }
        unread = [name for name, value in ratings.items() if value is None]
        wanted = sum(len(record.values["turns"]) for record in self._questions)
        bare = sum(
            record.values["category"] in _WITH_REFERENCE and str(record.values["question_id"]) not in self._references
            for record in self._questions
        )
        return Result(
            suite="mt_bench",
            main="MT-Bench avg",
            figures=figures,
            scale="points",
            categories=by_category(examples, _average),
            counts={"questions": len(self._questions), "answers wanted": wanted, "answers": len(answers)}
            | {"verdicts": len(verdicts), "unreadable verdicts": len(unread)},
            unread=unread,
            examples=examples,
            settings=self._settings,
            notes=[f"{bare} questions of {', '.join(_WITH_REFERENCE)} were graded without a reference"] if bare else [],
        )

    def _example(self, record: Record, index: int, found: Mapping[int, float], answers: Replies) -> Example:
        name = str(record.values["question_id"])
        texts = [answers[f"{name}/{turn}"].text for turn in found]
        return Example(
            id=name,
            category=str(record.values["category"]),
            question=excerpt("\n\n".join(record.values["turns"])),
            answer=excerpt("\n\n— second turn —\n\n".join(excerpt(text, 400) for text in texts), 900),
            score=sum(found.values()),
            weight=len(found),
            index=index,
            extra={"ratings": {str(turn): value for turn, value in found.items()}},
        )


def _average(examples: Sequence[Example]) -> statistics.Figure:
    return statistics.ratio([each.score for each in examples], [each.weight for each in examples], scale=1.0)


def _references(source: str | None, questions: Sequence[Record]) -> dict[str, list[str]]:
    """Reference answers, a text a turn, by question, for the categories that FastChat grades beside one.

    What questions themselves carry as `reference` are hints, some for one turn only, which FastChat does not show.
    """
    wanted = {str(each.values["question_id"]) for each in questions if each.values["category"] in _WITH_REFERENCE}
    found: dict[str, list[str]] = {}
    for record in load_records(source) if source else ():
        try:
            found[str(record.values["question_id"])] = list(record.values["choices"][0]["turns"])
        except (KeyError, LookupError, TypeError) as error:
            raise DataError(f"{record.where} is no reference answer: it needs question_id and choices") from error
    return {name: turns for name, turns in found.items() if name in wanted}


def _prompts(source: str) -> dict[str, JudgePrompt]:
    found = {}
    for record in load_records(source):
        values = record.values
        if {"name", "prompt_template"} <= values.keys():
            found[values["name"]] = JudgePrompt(
                values["name"], values["prompt_template"], values.get("system_prompt", "")
            )
    missing = [name for name in _PROMPTS if name not in found]
    if missing:
        raise DataError(f"{source} has no prompt {missing[0]}; give FastChat's judge_prompts.jsonl")
    return found
