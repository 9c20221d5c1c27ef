"""What is asked of a model or of a judge, and what comes back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Message = dict[str, str]


@dataclass(frozen=True)
class Ask:
    """One request for text.

    Attributes:
        id: names it among the requests of one store, as "81/2" (question 81, second turn).
        messages: the conversation so far.
        temperature: 0 takes the likeliest token.
        max_tokens: length limit of the answer.
        top_logprobs: so many log-probabilities of the answer's first token are wanted as well.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: of the sampling, where the other side takes one.
    """

    id: str
    messages: tuple[Message, ...]
    temperature: float
    max_tokens: int
    top_logprobs: int = 0
    top_p: float = 1.0
    seed: int = 0

    def fingerprint(self, model: str) -> str:
        """Tells this request to `model` from any other, so that a stored reply to another one is not taken for its."""
        text = json.dumps([model, asdict(self)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Reply:
    """What came back, whole.

    Attributes:
        text: the answer.
        finish: why it ended, in the other side's words ("stop", "length").
        prompt_tokens, completion_tokens: what it took, as the other side counts; 0 where it does not say.
        first_token: the alternatives for the answer's first token with log-probabilities in nats, where asked for.
        tokens: (prompt, response) token ids, where our own engine answered.
        prompt_cut: the prompt lost its beginning, for want of room in the model's positions.
    """

    text: str
    finish: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token: dict[str, float] | None = None
    tokens: tuple[list[int], list[int]] | None = None
    prompt_cut: bool = False

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Reply:
        """The reply that ``asdict`` made `values` of."""
        tokens = values.get("tokens")
        return cls(**{**values, "tokens": (tokens[0], tokens[1]) if tokens else None})


@dataclass(frozen=True)
class Failure:
    """A request that got no reply, and why."""

    id: str
    reason: str


def user(text: str) -> Message:
    """A message by the user."""
    return {"role": "user", "content": text}


def system(text: str) -> Message:
    """A system message."""
    return {"role": "system", "content": text}


def assistant(text: str) -> Message:
    """A message by the assistant."""
    return {"role": "assistant", "content": text}


def plain_text(messages: Sequence[Message]) -> str:
    """A conversation as bare text, for models without a chat template: a single message as it stands, several as
    paragraphs."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "".join(message["content"].strip() + "\n\n" for message in messages)
