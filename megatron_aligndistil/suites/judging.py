"""Reading verdicts from what a judge wrote. What cannot be read is None: it is counted and shown, never guessed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_LABELS = (re.compile(r"\[\[([AB<>=]+)\]\]"), re.compile(r"\[([AB<>=]+)\]"))
_CHOICE = re.compile(r"\[\[([ABC])\]\]")

# Label -> (score of A, weight): a large win counts three times, as in arena-hard-auto.
_SCORES = {
    **{"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "A<B": (0.0, 1), "A<<B": (0.0, 3)},
    **{"B>>A": (0.0, 3), "B>A": (0.0, 1), "B=A": (0.5, 1), "B<A": (1.0, 1), "B<<A": (1.0, 3)},
}


def rating(text: str) -> float | None:
    """The first ``[[n]]`` with n from 1 to 10, as FastChat reads ratings; None where there is none."""
    found = _RATING.search(text)
    value = float(found.group(1)) if found else math.nan
    return value if 1 <= value <= 10 else None


def label(text: str) -> tuple[float, int] | None:
    """(score of A, weight) of the last ``[[A>>B]]``, else of the last ``[A>>B]``, as arena-hard-auto reads them."""
    for pattern in _LABELS:
        found = pattern.findall(text.upper())
        if found:
            return _SCORES.get(found[-1])
    return None


def choice(text: str) -> float | None:
    """Score of A from the last ``[[A]]``, ``[[B]]`` or ``[[C]]`` (a tie)."""
    found = _CHOICE.findall(text)
    return {"A": 1.0, "B": 0.0, "C": 0.5}[found[-1]] if found else None


def letter_probability(first_token: Mapping[str, float] | None, letter: str, other: str) -> float | None:
    """P(letter) among the two letters, from the log-probabilities of the first token's alternatives.

    A letter that is not among the alternatives counts as having no probability; None where neither is.
    """
    given = {key: first_token[key] for key in (letter, other) if key in first_token} if first_token else {}
    if not given:
        return None
    highest = max(given.values())
    if not math.isfinite(highest):
        return None
    weights = {key: math.exp(value - highest) for key, value in given.items()}
    return weights.get(letter, 0.0) / sum(weights.values())
