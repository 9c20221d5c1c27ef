"""What sampling is to the rest of the engine: prompts and settings in, tokens and finish reasons out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How a response is drawn.

    Attributes:
        max_new_tokens: length limit in tokens.
        seed: of the random streams.
        stop_tokens: tokens that end a response; the one that did is its last token.
        temperature: 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only; 0 turns it off.
        top_p: draw from the likeliest tokens that together have this probability; 1 turns it off.
        stop_strings: texts that end a response; the tokens that made the text are its last.
    """

    max_new_tokens: int
    seed: int
    stop_tokens: frozenset[int]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """One sampled response: its tokens, their log-probabilities at temperature 1 in nats, and why it ended.

    Nothing is forged: a response that reached its length limit ("length") does not end with a stop token. `rating` is
    what a reward function says of it, where there is one.
    """

    tokens: list[int]
    logprobs: list[float]
    finish: Finish
    rating: float | None = None


class Sampler(Protocol):
    """An engine that answers prompts. All processes of a job call it together, with the same arguments."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_progress: Callable[[int], None] = ...
    ) -> list[Completion | None]:
        """A response for each prompt (token ids).

        Prompts are dealt to data parallel ranks; an entry that another rank has sampled is None. `on_progress` is told
        how many of this rank's responses are done. The same seed gives the same responses.
        """
        ...
