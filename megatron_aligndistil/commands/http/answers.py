"""From requests to answers: what the engine draws becomes text, for each coroutine that waits for some."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_aligndistil.commands.http.errors import ApiError, bad_request
from megatron_aligndistil.commands.http.text import Detokeniser, StopStrings

Finish = Literal["stop", "length"]
Drawn = tuple[int, int, float, Finish | None]  # key, token, log-probability, why the answer ends with it
ToText = Callable[[Sequence[int]], str]


class Engine(Protocol):
    """What draws tokens. Called from the server's thread."""

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        seed: int,
        stream: int,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> int:
        """Ask for an answer; returns the key under which its tokens will come."""
        ...

    def cancel(self, key: int) -> None:
        """Give up on an answer."""
        ...


@dataclass(frozen=True)
class Choice:
    """One answer that is asked for.

    Attributes:
        opening: text that the answer begins with: its prompt, where that is to be echoed.
        seed, stream: of the random numbers.
    """

    prompt: list[int]
    opening: str
    max_new_tokens: int
    seed: int
    stream: int
    temperature: float
    top_k: int
    top_p: float
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Token:
    """A token of an answer: the characters that it completes, where they begin, its log-probability in nats."""

    text: str
    offset: int
    logprob: float


@dataclass(frozen=True)
class Part:
    """A piece of the answer with this index: its text, the tokens drawn for it, and, in the last one, why it ends."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None


class _Answer:
    """One answer in the making."""

    def __init__(self, index: int, choice: Choice, to_text: ToText) -> None:
        self._index = index
        self._detokeniser = Detokeniser(to_text, choice.prompt)
        self._stops = StopStrings(choice.stop)
        self._offset = 0
        self._tokens: list[Token] = []

    def add(self, token: int, logprob: float, finish: Finish | None) -> Part | None:
        """The part that is complete with this token, if it brings any text or is the last."""
        # Nothing is written of the token that ends a sequence.
        piece = "" if finish == "stop" else self._detokeniser.add(token)
        self._tokens.append(Token(piece, self._offset, logprob))
        self._offset += len(piece)
        text = self._stops.add(piece)
        if self._stops.met:
            finish = "stop"
        elif finish:
            text += self._stops.rest()
        if not text and finish is None:
            return None
        tokens, self._tokens = tuple(self._tokens), []
        return Part(self._index, text, tokens, finish)


class Answers:
    """The answers that are being made, and how many there may be. Its methods are for the server's event loop, but for
    :meth:`deliver` and :meth:`fail`, which any thread may call.

    Args:
        most: answers in progress, running or waiting.
        to_text: token ids -> text.
    """

    def __init__(self, engine: Engine, most: int, to_text: ToText) -> None:
        self._engine, self._most, self._to_text = engine, most, to_text
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: dict[int, Running] = {}  # by key
        self._failure: ApiError | None = None

    @property
    def num_running(self) -> int:
        """Answers in progress."""
        return len(self._running)

    def start(self, choices: Sequence[Choice]) -> Running:
        """Begin an answer to each of `choices`. Raises ApiError where there are too many, now or ever."""
        if self._failure:
            raise self._failure
        if len(choices) > self._most:
            raise bad_request(f"{len(choices)} answers are asked for at once, and this server takes {self._most}", "n")
        if self.num_running + len(choices) > self._most:
            message = f"{self.num_running} answers are in progress, and this server takes {self._most}; ask again later"
            raise ApiError(429, message, code="queue_full", retry_after=1)
        self._loop = asyncio.get_running_loop()
        running = Running(choices, self._submit, self._release, self._to_text)
        self._running |= dict.fromkeys(running.keys, running)
        return running

    def _submit(self, choice: Choice) -> int:
        return self._engine.submit(
            choice.prompt,
            max_new_tokens=choice.max_new_tokens,
            seed=choice.seed,
            stream=choice.stream,
            temperature=choice.temperature,
            top_k=choice.top_k,
            top_p=choice.top_p,
        )

    def _release(self, key: int, complete: bool) -> None:
        self._running.pop(key, None)
        if not complete:
            self._engine.cancel(key)

    def deliver(self, drawn: Sequence[Drawn]) -> None:
        """Tokens from the engine."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._dispatch, drawn)

    def _dispatch(self, drawn: Sequence[Drawn]) -> None:
        for each in drawn:
            if each[0] in self._running:  # else it was given up a moment ago
                self._running[each[0]].inbox.put_nowait(each)

    def fail(self, error: ApiError) -> None:
        """End every answer with `error`, those to come as well."""
        self._failure = error
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._fail_running, error)

    def _fail_running(self, error: ApiError) -> None:
        for running in set(self._running.values()):
            running.inbox.put_nowait(error)


class Running:
    """The answers to one HTTP request, in progress.

    Attributes:
        keys: of its answers at the engine, in order.
        inbox: what has come from the engine.
        num_tokens: drawn so far, over all answers.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        submit: Callable[[Choice], int],
        release: Callable[[int, bool], None],
        to_text: ToText,
    ) -> None:
        self.inbox: asyncio.Queue[Drawn | ApiError] = asyncio.Queue()
        self.num_tokens = 0
        self._openings = [choice.opening for choice in choices]
        self._open = {submit(choice): _Answer(index, choice, to_text) for index, choice in enumerate(choices)}
        self._release = release
        self.keys = tuple(self._open)

    async def parts(self) -> AsyncIterator[Part]:
        """Pieces of the answers as they come, until all are complete. Raises ApiError where the engine fails."""
        for index, opening in enumerate(self._openings):
            if opening:
                yield Part(index, opening)
        while self._open:
            event = await self.inbox.get()
            if isinstance(event, ApiError):
                raise event
            key, token, logprob, finish = event
            if key not in self._open:
                continue  # ended by a stop string while this was drawn
            self.num_tokens += 1
            part = self._open[key].add(token, logprob, finish)
            if part and part.finish:
                del self._open[key]
                self._release(key, finish is not None)
            if part:
                yield part

    def close(self) -> None:
        """Give up on what is not complete."""
        for key in self._open:
            self._release(key, False)
        self._open = {}
