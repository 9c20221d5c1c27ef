"""Prompts and responses become rows of tokens whose response is marked exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_aligndistil.data.forms import Message, TokenTurn, Turn
from megatron_aligndistil.data.tokenizer import Tokenizer, special_ids, vocab_size
from megatron_aligndistil.errors import DataError, RecordError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Row:
    """The tokens of a prompt and of the response to it.

    Attributes:
        tokens: int32 [n], the prompt's tokens, then the response's, the one that ends it included.
        prompt_length: how many of them are the prompt.
        rating: a number that rates the response, if there is one: 1 (desirable) or 0 in unpaired data, what a reward
            function says of a sampled response.
        logprobs: float32, one a response token: its log-probability when it was sampled, in nats, if it was.
    """

    tokens: NDArray[np.int32]
    prompt_length: int
    rating: float | None = None
    logprobs: NDArray[np.float32] | None = None

    @property
    def num_targets(self) -> int:
        """Response tokens that some state predicts: all of them, but for the first where there is no prompt."""
        return max(len(self.tokens) - max(self.prompt_length, 1), 0)


def make_row(prompt: Sequence[int], response: Sequence[int]) -> Row:
    """A row of the tokens of a prompt and of a response."""
    return Row(np.asarray([*prompt, *response], dtype=np.int32), len(prompt))


def truncate(row: Row, *, max_prompt_length: int, max_length: int) -> Row:
    """`row` within its limits: a longer prompt loses its beginning, a longer response its end, and nothing is added."""
    start = max(row.prompt_length - max_prompt_length, 0)
    tokens = row.tokens[start : start + max_length]
    prompt_length = min(row.prompt_length - start, max_length)
    logprobs = None if row.logprobs is None else row.logprobs[: len(tokens) - prompt_length]
    return Row(tokens, prompt_length, row.rating, logprobs)


@dataclass(frozen=True)
class _Rendered:
    """The texts of a turn.

    Attributes:
        prompt: what the response follows.
        whole: the conversation with the response in it, as a chat template renders it; it begins with `prompt`.
        response: the response by itself, without a chat template.
        plain: no chat template was applied, so the beginning and the end of the sequence are still to be marked.
    """

    prompt: str
    whole: str | None = None
    response: str | None = None
    plain: bool = False


class Encoder:
    """Turns -> untruncated rows, by one tokenizer.

    With a chat template the prompt is ``apply_chat_template(prompt, add_generation_prompt=True)``, and the response is
    what the template renders after it, up to and including the token that ends the turn (``<|im_end|>`` for Qwen2.5,
    ``<|eot_id|>`` for Llama-3); what the template puts behind that token is left out. Text prompts and responses are
    taken as one message by `user` and one by `assistant`. Tokens are those of transformers' own
    ``apply_chat_template``, which tokenises the whole conversation at once; only where a token would reach from the
    prompt into the response are the two tokenised apart, since a policy never samples such a token.

    Without a chat template: the beginning-of-sequence token if the tokenizer adds one, the prompt, the response, the
    end-of-sequence token. Where there is no prompt (a bare text, with or without a chat template), the
    beginning-of-sequence token stands for it if the tokenizer has one.

    An empty response (nothing but white space) stays empty: no lone end token is made for it. Rows given as tokens are
    used as they are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer: Any = tokenizer
        self._vocab_size = vocab_size(tokenizer)
        self._special = special_ids(tokenizer)
        bos = tokenizer.bos_token_id
        self._bos = [] if bos is None else [int(bos)]
        self._adds_bos = bool(self._bos) and tokenizer("")["input_ids"][:1] == self._bos

    def encode(self, turns: Sequence[Turn | TokenTurn], places: Sequence[str]) -> list[Row]:
        """The row of each turn, with its rating; a turn without a response gives its prompt alone.

        `places` says for each turn where it was read. Raises what :meth:`try_encode` raises, and the first RecordError
        that it returns.
        """
        rows = []
        for row in self.try_encode(turns, places):
            if isinstance(row, RecordError):
                raise row
            rows.append(row)
        return rows

    def try_encode(self, turns: Sequence[Turn | TokenTurn], places: Sequence[str]) -> list[Row | RecordError]:
        """As :meth:`encode`, with what is wrong with a turn (a conversation that the template refuses, a token id
        outside the vocabulary, half a character) in the place of its row.

        Raises DataError where the tokenizer lacks what a turn needs: a template, an end of sequence.
        """
        texts = [_or_error(partial(self._prepare, turn, where)) for turn, where in zip(turns, places, strict=True)]
        ids = self._tokenise([item for item in texts if isinstance(item, _Rendered)])
        return [
            item if isinstance(item, RecordError) else _or_error(partial(self._finish, turn, item, ids, where))
            for turn, item, where in zip(turns, texts, places, strict=True)
        ]

    def _prepare(self, turn: Turn | TokenTurn, where: str) -> _Rendered | None:
        """What is to be tokenised of a turn: nothing of tokens."""
        if isinstance(turn, TokenTurn):
            return None
        rendered = self._render(turn, where)
        for text in (rendered.prompt, rendered.whole, rendered.response):
            try:
                (text or "").encode()
            except UnicodeEncodeError as error:
                raise RecordError(
                    f"{where}: the text holds {error.object[error.start]!r}, half of a character that takes two such "
                    f"codes"
                ) from None
        return rendered

    def _finish(self, turn: Turn | TokenTurn, item: _Rendered | None, ids: dict[str, list[int]], where: str) -> Row:
        if isinstance(turn, TokenTurn):
            row = self._given(turn, where)
        else:
            assert item is not None
            row = self._join(item, ids, where) if item.whole is None else self._split(item, ids, where)
        return replace(row, rating=turn.rating)

    def _given(self, turn: TokenTurn, where: str) -> Row:
        response = turn.response or []
        wrong = [token for token in (*turn.prompt, *response) if not 0 <= token < self._vocab_size]
        if wrong:
            raise RecordError(
                f"{where}: token id {wrong[0]} is outside the tokenizer's vocabulary of {self._vocab_size}; were these "
                f"tokens made with another tokenizer?"
            )
        return make_row(turn.prompt, response)

    def _render(self, turn: Turn, where: str) -> _Rendered:
        prompt, response = turn.prompt, turn.response
        if response is not None and _is_empty(response):
            response = None
        if prompt is None or not self._tokenizer.chat_template:
            if isinstance(prompt, list) or isinstance(response, dict):
                raise DataError(
                    f"{where} holds messages, and the tokenizer has no chat template to render them by; put a "
                    f"chat_template.jinja in the tokenizer's folder, or give prompt and response as text"
                )
            return _Rendered(prompt or "", response=response, plain=True)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        start = self._apply(messages, where, generate=True)
        if response is None:
            return _Rendered(start)
        answer = {"role": "assistant", "content": response} if isinstance(response, str) else response
        whole = self._apply([*messages, answer], where, generate=False)
        if not whole.startswith(start):
            raise RecordError(
                f"{where}: the chat template renders the prompt in another way once a response follows, so the "
                f"response cannot be told apart; the prompt's rendering ends in {start[-40:]!r}"
            )
        return _Rendered(start, whole=whole)

    def _apply(self, messages: list[Message], where: str, *, generate: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # a template is a program: what it may raise has no common base
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RecordError(f"{where}: the chat template refuses this conversation: {reason}") from error
        assert isinstance(text, str)
        return text

    def _tokenise(self, rendered: Sequence[_Rendered]) -> dict[str, list[int]]:
        """Tokens of every text that is needed, each text once (the prompt of a pair occurs twice)."""
        texts = dict.fromkeys(text for item in rendered for text in (item.prompt, item.whole, item.response) if text)
        ids = self._ids(list(texts)) if texts else []
        return {"": [], **dict(zip(texts, ids, strict=True))}

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    @cached_property
    def end_of_turn(self) -> int:
        """The id that the chat template ends a response with, seen in a conversation made for the purpose.

        Raises DataError where the template ends a response with no special token.
        """
        texts = self._render(Turn("a", "b"), "a conversation made to find where responses end")
        _, rest = self._halves(texts, self._tokenise([texts]))
        end = self._ending(rest)
        if end is None:
            raise DataError(
                "the chat template puts no special token behind a response, so a model would never learn to stop; use "
                "a template that ends the turn (with the tokenizer's eos_token, for instance)"
            )
        return rest[end]

    def _split(self, texts: _Rendered, ids: dict[str, list[int]], where: str) -> Row:
        """Cut a rendered conversation into prompt and response, and off behind the token that ends the response."""
        prompt, rest = self._halves(texts, ids)
        if self.end_of_turn in rest:
            end: int | None = len(rest) - 1 - rest[::-1].index(self.end_of_turn)
        else:
            end = self._ending(rest)  # some templates end a tool call with a token of its own
        if end is None:
            raise RecordError(f"{where}: the chat template puts no special token behind this response")
        return make_row(prompt, rest[: end + 1])

    def _halves(self, texts: _Rendered, ids: dict[str, list[int]]) -> tuple[list[int], list[int]]:
        """Tokens of a rendered prompt and of all that follows it."""
        assert texts.whole is not None
        prompt, whole = ids[texts.prompt], ids[texts.whole]
        if whole[: len(prompt)] == prompt:
            return prompt, whole[len(prompt) :]
        return prompt, self._ids([texts.whole[len(texts.prompt) :]])[0]

    def _ending(self, tokens: list[int]) -> int | None:
        """Where the first of the special tokens at the very end is, between which there is only white space.

        Qwen2.5 puts a new line behind the token that ends the turn, and Phi-3 an end of sequence that no generation
        reaches.
        """
        end = None
        for index in range(len(tokens) - 1, -1, -1):
            if tokens[index] in self._special:
                end = index
            elif self._tokenizer.decode([tokens[index]]).strip():
                break
        return end

    def _join(self, texts: _Rendered, ids: dict[str, list[int]], where: str) -> Row:
        """Put a prompt and a plain response side by side; a rendered prompt comes here when it stands alone."""
        prompt, response = ids[texts.prompt], ids[texts.response or ""]
        if texts.plain and (self._adds_bos or not prompt):
            prompt = self._bos + prompt
        if response:
            if self._tokenizer.eos_token_id is None:
                raise DataError(
                    f"{where}: the tokenizer has no eos_token to end a response with; name one in its folder"
                )
            response = [*response, int(self._tokenizer.eos_token_id)]
        return make_row(prompt, response)


def _or_error(make: Callable[[], Result]) -> Result | RecordError:
    try:
        return make()
    except RecordError as error:
        return error


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end generation: the end of sequence, and the end of turn of the chat template where there is one.

    Raises DataError where the tokenizer has neither.
    """
    found = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if tokenizer.chat_template:
        found.add(Encoder(tokenizer).end_of_turn)
    if not found:
        raise DataError("the tokenizer has no eos_token and no chat template, so nothing would end generation")
    return frozenset(found)


def _is_empty(response: str | Message) -> bool:
    if isinstance(response, str):
        return not response.strip()
    return not response.get("tool_calls") and not str(response.get("content", "")).strip()
