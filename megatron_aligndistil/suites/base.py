"""What a suite is: the requests it makes, the verdicts it asks for, and the figures that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from megatron_aligndistil.data.records import Record, load_records
from megatron_aligndistil.errors import DataError
from megatron_aligndistil.suites.asks import Ask, Reply
from megatron_aligndistil.suites.statistics import Figure

Replies = Mapping[str, Reply]  # by the id of the request
Scale = Literal["percent", "points"]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; None leaves it to the suite."""

    temperature: float | None = None
    max_tokens: int | None = None
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Judging:
    """How verdicts are drawn; None leaves the length to the suite."""

    temperature: float = 0.0
    max_tokens: int | None = None


@dataclass(frozen=True)
class Example:
    """One question's part in a suite's main figure, which is Σ score / Σ weight.

    Attributes:
        index: its place in the whole question file.
        extra: what the report needs beside it, such as differences of style.
    """

    id: str
    category: str
    question: str
    answer: str
    score: float
    weight: float
    index: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """What one model got in one suite.

    Attributes:
        suite: name and version, as the report calls it.
        main: the key in `figures` that `examples` make up and that models are compared by.
        figures: by column of the table.
        scale: of the main figure: a share, shown in percent, or points.
        categories: the main figure by category.
        position: what was seen of a preference for the first or second place.
        counts: questions, answers, verdicts, and those that could not be parsed.
        unread: ids of verdicts that could not be parsed.
        settings: judge, prompts, baseline, and what else the figures depend on.
        notes: sentences that a reader of the figures needs.
    """

    suite: str
    main: str
    figures: dict[str, Figure]
    scale: Scale = "percent"
    categories: dict[str, Figure] = field(default_factory=dict)
    position: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Measurement:
    """What our own engine is to measure for a suite.

    Attributes:
        kind: a measure of ``aligndistil evaluate --measure``.
        models: the names of the models that it takes, of those given, beside the one evaluated.
        data: preference pairs, by their source, or None where `responses` are measured.
        responses: records of prompts and responses.
    """

    kind: Literal["accuracy", "kl", "score"]
    models: tuple[str, ...]
    data: str | None = None
    responses: Sequence[dict[str, Any]] = ()


class Suite(Protocol):
    """A benchmark. Requests are a function of its settings and of earlier replies, so that a run can be resumed."""

    name: str

    def asks(self, answers: Replies) -> Sequence[Ask]:
        """Everything that the model can be asked by now; asked again until nothing new comes."""
        ...

    def verdict_asks(self, answers: Replies) -> Sequence[Ask]:
        """What the judge is asked about the answers; empty where there is no judge."""
        ...

    def measurement(self, answers: Replies) -> Measurement | None:
        """What the engine is to measure, once the answers are there; None where nothing."""
        ...

    def score(self, answers: Replies, verdicts: Replies, measured: Mapping[str, Figure]) -> Result:
        """The figures, from what is there."""
        ...


class JudgedSuite:
    """A suite for which the engine measures nothing."""

    def measurement(self, answers: Replies) -> Measurement | None:
        return None


def read_questions(source: str, needs: Sequence[str], name: str | None = None) -> list[Record]:
    """The records of a question file, told apart by their key `name` where they have one.

    Raises DataError where a record lacks a key of `needs`, or has another's name, with its file and line.
    """
    records = list(load_records(source))
    for record in records:
        missing = [key for key in needs if key not in record.values]
        if missing:
            raise DataError(f"{record.where} has no {missing[0]}; a question here needs {', '.join(needs)}")
    if not records:
        raise DataError(f"{source} holds no questions")
    seen: set[str] = set()
    for record in records:
        value = str(record.values[name]) if name else record.where
        if value in seen:
            raise DataError(f"{record.where}: {name} {value} was there before; every question needs its own")
        seen.add(value)
    return records


def spread(count: int, limit: int | None) -> list[int]:
    """The places of `limit` of `count` questions, spread evenly so that categories keep their share."""
    if limit is None or limit >= count:
        return list(range(count))
    return [place * count // limit for place in range(limit)]


def responses_of(asks: Sequence[Ask], answers: Replies) -> list[dict[str, Any]]:
    """Records of prompts and responses, as tokens where our own engine sampled them."""
    records: list[dict[str, Any]] = []
    for ask in asks:
        reply = answers.get(ask.id)
        if reply is None:
            continue
        if reply.tokens:
            records.append({"prompt_tokens": reply.tokens[0], "response_tokens": reply.tokens[1]})
        else:
            alone = len(ask.messages) == 1 and ask.messages[0]["content"]
            records.append({"prompt": alone or list(ask.messages), "response": reply.text})
    return records


def excerpt(text: str, length: int = 600) -> str:
    """The beginning of a text."""
    return text if len(text) <= length else text[:length].rstrip() + " …"


def by_category(examples: Sequence[Example], figure: Callable[[list[Example]], Figure]) -> dict[str, Figure]:
    """`figure` of the examples of each category, in the order in which categories first occur."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.category, []).append(example)
    return {category: figure(group) for category, group in groups.items()} if len(groups) > 1 else {}
