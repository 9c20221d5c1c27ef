"""The bodies of OpenAI's answers, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_aligndistil.commands.http.answers import Part, Token

Json = dict[str, Any]


def usage(num_prompt: int, num_answer: int) -> Json:
    """Counts of tokens; those that end answers are among the answers'."""
    return {"prompt_tokens": num_prompt, "completion_tokens": num_answer, "total_tokens": num_prompt + num_answer}


def joined(parts: Iterable[Part]) -> list[Part]:
    """The parts of each answer put together, in the order of their indices."""
    answers: dict[int, Part] = {}
    for part in parts:
        before = answers.get(part.index, Part(part.index, ""))
        answers[part.index] = Part(part.index, before.text + part.text, before.tokens + part.tokens, part.finish)
    return [answers[index] for index in sorted(answers)]


class Shape(ABC):
    """How the answers to one request are written down."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, logprobs: bool) -> None:
        self._logprobs = logprobs
        self._id = {"id": f"{self.prefix}-{secrets.token_hex(12)}"}
        self._origin = {"created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Part], counts: Json) -> Json:
        """The body of an answer that is not streamed."""
        choices = [self.whole_choice(answer) for answer in answers]
        return {**self._id, "object": self.whole_object, **self._origin, "choices": choices, "usage": counts}

    def chunk(self, choices: list[Json], counts: Json | None = None) -> Json:
        """The body of a chunk of a stream."""
        return {**self._id, "object": self.chunk_object, **self._origin, "choices": choices, "usage": counts}

    def opening(self, num_choices: int) -> list[Json]:
        """The choices of the first chunk; none where it is not needed."""
        return []

    @abstractmethod
    def whole_choice(self, answer: Part) -> Json:
        """One complete answer."""

    @abstractmethod
    def chunk_choice(self, part: Part) -> Json:
        """One piece of an answer."""


class CompletionShape(Shape):
    """Of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def whole_choice(self, answer: Part) -> Json:
        return {
            "index": answer.index,
            "text": answer.text,
            "logprobs": self._logprobs_of(answer.tokens) if self._logprobs else None,
            "finish_reason": answer.finish,
        }

    def chunk_choice(self, part: Part) -> Json:
        return self.whole_choice(part)

    @staticmethod
    def _logprobs_of(tokens: Sequence[Token]) -> Json:
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": None,
            "text_offset": [token.offset for token in tokens],
        }


class ChatShape(Shape):
    """Of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, num_choices: int) -> list[Json]:
        start = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": start, "finish_reason": None} for index in range(num_choices)]

    def whole_choice(self, answer: Part) -> Json:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": answer.index, "message": message, **self._ending(answer)}

    def chunk_choice(self, part: Part) -> Json:
        return {"index": part.index, "delta": {"content": part.text} if part.text else {}, **self._ending(part)}

    def _ending(self, part: Part) -> Json:
        content = [
            {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode()), "top_logprobs": []}
            for token in part.tokens
        ]
        logprobs = {"content": content, "refusal": None} if self._logprobs else None
        return {"logprobs": logprobs, "finish_reason": part.finish}
