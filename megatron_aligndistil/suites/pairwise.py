"""Verdicts on pairs of answers: the model's beside a baseline's, in one order or both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_aligndistil.suites.asks import Ask
from megatron_aligndistil.suites.base import Replies
from megatron_aligndistil.suites.prompts import JudgePrompt

Orders = Literal["both", "random"]


@dataclass(frozen=True)
class Contest:
    """A question with both answers.

    Attributes:
        id: the question's.
        index: its place in the whole file.
    """

    id: str
    category: str
    question: str
    baseline: str
    answer: str
    index: int = 0


@dataclass(frozen=True)
class Verdict:
    """What was read from a judge: the model's score from 0 to 1, and how much the verdict counts."""

    model_first: bool
    score: float
    weight: float = 1.0


def ordered(contest: Contest, orders: Orders) -> tuple[bool, ...]:
    """In which orders a contest is shown (is the model first?): both, or one drawn from the question's text."""
    if orders == "both":
        return False, True
    return (hashlib.sha256(contest.question.encode()).digest()[0] % 2 == 1,)


def verdict_id(contest: Contest, model_first: bool) -> str:
    """The id of the request for a verdict."""
    return f"{contest.id}/{'model' if model_first else 'baseline'}-first"


def verdict_asks(
    contests: Iterable[Contest], orders: Orders, prompt: JudgePrompt, temperature: float, max_tokens: int
) -> list[Ask]:
    """The requests for verdicts."""
    asks = []
    for contest in contests:
        for model_first in ordered(contest, orders):
            first, second = (contest.answer, contest.baseline) if model_first else (contest.baseline, contest.answer)
            values = {"question": contest.question, "answer_a": first, "answer_b": second}
            messages = prompt.messages(values, contest.category)
            asks.append(Ask(verdict_id(contest, model_first), messages, temperature, max_tokens))
    return asks


def read_all(
    contests: Sequence[Contest], orders: Orders, verdicts: Replies, read: Mapping[str, Verdict | None]
) -> tuple[dict[str, list[Verdict]], list[str]]:
    """Verdicts by question, where every verdict is there and could be read; and the ids of those that could not."""
    whole: dict[str, list[Verdict]] = {}
    unread = []
    for contest in contests:
        ids = [verdict_id(contest, model_first) for model_first in ordered(contest, orders)]
        unread += [each for each in ids if each in verdicts and read[each] is None]
        found = [verdict for each in ids if (verdict := read.get(each)) is not None]
        if len(found) == len(ids):
            whole[contest.id] = found
    return whole, unread


def position(verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, float]:
    """How far the place of an answer, rather than the answer, decided.

    `first_place` is the mean score of whichever answer came first, in percent: 50 without bias. Where both orders were
    judged: `agree` is the share of questions with the same outcome in both, `for_first` and `for_second` the shares
    where the outcome followed the place.
    """
    flat = [verdict for group in verdicts.values() for verdict in group]
    if not flat:
        return {}
    found = {"first_place": 100 * _mean(each.score if each.model_first else 1 - each.score for each in flat)}
    pairs = [group for group in verdicts.values() if len({each.model_first for each in group}) == 2]
    if pairs:
        outcomes = [{each.model_first: _sign(each.score) for each in group} for group in pairs]
        found["agree"] = 100 * _mean(each[True] == each[False] for each in outcomes)
        found["for_first"] = 100 * _mean(each[True] > each[False] for each in outcomes)
        found["for_second"] = 100 * _mean(each[True] < each[False] for each in outcomes)
    return found


def _sign(score: float) -> int:
    return (score > 0.5) - (score < 0.5)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
