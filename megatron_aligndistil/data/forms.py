"""The forms a record may have, each read by a small function into prompts and responses.

A new form is one function and one line in `FORMS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_aligndistil.data.dialects import DIALECTS, translate
from megatron_aligndistil.data.records import Record
from megatron_aligndistil.errors import DataError, RecordError

Values = dict[str, Any]
Message = dict[str, Any]
Kind = Literal["pair", "unpaired", "response", "prompt"]
DataForm = Literal["responses", "pairs", "prompts", "unpaired"]


@dataclass(frozen=True)
class Turn:
    """A prompt and one response to it.

    Attributes:
        prompt: text, or messages; None where the response has no prompt at all.
        response: text, or a message by the assistant; None where there is only a prompt.
        rating: 1 where the response is desirable, 0 where it is not, None where nothing says.
    """

    prompt: str | list[Message] | None
    response: str | Message | None
    rating: float | None = None


@dataclass(frozen=True)
class TokenTurn:
    """A prompt and one response (None: only a prompt) that are tokens already, to be used as they are."""

    prompt: list[int]
    response: list[int] | None
    rating: float | None = None


Turns = tuple[Turn | TokenTurn, ...]


@dataclass(frozen=True)
class Form:
    """A form of record: the keys that tell it, what it holds, and how its turns are read (pair: chosen, rejected)."""

    keys: tuple[str, ...]
    kind: Kind
    read: Callable[[Values], Turns]

    def __str__(self) -> str:
        return "{" + ", ".join(self.keys) + "}"


def _token_pair(values: Values) -> Turns:
    prompt = _tokens(values, "prompt_tokens")
    return tuple(TokenTurn(prompt, _tokens(values, key)) for key in ("chosen_tokens", "rejected_tokens"))


def _pair(values: Values) -> Turns:
    chosen, rejected = (_turn(values, key) for key in ("chosen", "rejected"))
    if chosen.prompt != rejected.prompt:
        raise DataError("chosen and rejected answer different prompts")
    return chosen, rejected


def _token_response(values: Values) -> Turns:
    return (TokenTurn(_tokens(values, "prompt_tokens"), _tokens(values, "response_tokens")),)


def _messages_response(values: Values) -> Turns:
    return (_turn(values, "messages"),)


def _text(values: Values) -> Turns:
    if not isinstance(values["text"], str):
        raise DataError(f"'text' is {type(values['text']).__name__}, not text")
    return (Turn(None, values["text"]),)


def _labelled(read: Callable[[Values], Turns]) -> Callable[[Values], Turns]:
    """What `read` reads, rated by the record's label."""

    def read_labelled(values: Values) -> Turns:
        label = values["label"]
        if label not in (0, 1):
            raise DataError(f"'label' is {label!r} and must be true (desirable) or false")
        return tuple(replace(turn, rating=float(label)) for turn in read(values))

    return read_labelled


def _token_prompt(values: Values) -> Turns:
    return (TokenTurn(_tokens(values, "prompt_tokens"), None),)


def _prompt(values: Values) -> Turns:
    prompt = values["prompt"]
    return (Turn(prompt if isinstance(prompt, str) else _messages(prompt, "prompt"), None),)


def _messages_prompt(values: Values) -> Turns:
    """All the messages; an answer at the end is not part of the prompt."""
    messages = _messages(values["messages"], "messages")
    return (Turn(messages[:-1] if messages[-1]["role"] == "assistant" else messages, None),)


_RESPONSES: list[Form] = [
    Form(("prompt_tokens", "response_tokens"), "response", _token_response),
    Form(("prompt", "completion"), "response", lambda values: (_turn(values, "completion"),)),
    Form(("prompt", "response"), "response", lambda values: (_turn(values, "response"),)),
    Form(("messages",), "response", _messages_response),
]

# The first form whose keys a record has is the one it is read by.
FORMS: list[Form] = [
    Form(("prompt_tokens", "chosen_tokens", "rejected_tokens"), "pair", _token_pair),
    Form(("prompt", "chosen", "rejected"), "pair", _pair),
    Form(("chosen", "rejected"), "pair", _pair),
    *(Form((*form.keys, "label"), "unpaired", _labelled(form.read)) for form in _RESPONSES),
    *_RESPONSES,
    Form(("text",), "response", _text),
    Form(("prompt_tokens",), "prompt", _token_prompt),
    Form(("prompt",), "prompt", _prompt),
    Form(("messages",), "prompt", _messages_prompt),
]

_READABLE: dict[DataForm, tuple[Kind, ...]] = {
    "pairs": ("pair",),
    "unpaired": ("pair", "unpaired"),
    "responses": ("pair", "response"),
    "prompts": ("pair", "response", "prompt"),
}


def read_turns(record: Record, wanted: DataForm) -> Turns:
    """The turns of a record: (chosen, rejected) of a pair, or one turn; for "prompts" one turn without a response.

    For "unpaired" every turn is rated: by its label, and of a pair the chosen response 1, the rejected one 0.

    Raises RecordError, naming the place, where the record is in no form that serves, or a value is not what its key
    says.
    """
    try:
        values = translate(record.values)
    except DataError as error:
        raise RecordError(f"{record.where}: {error}") from None
    forms = [form for form in FORMS if form.kind in _READABLE[wanted]]
    if wanted == "prompts":
        # An unfinished conversation is a prompt, and so is everything before an answer; a bare text has no prompt.
        forms = [form for form in forms if form.read not in (_messages_response, _text)]
    for form in forms:
        if all(key in values for key in form.keys):
            try:
                turns = form.read(values)
            except DataError as error:
                raise RecordError(f"{record.where}, read as {form}: {error}") from None
            if wanted == "prompts":
                return (replace(turns[0], response=None),)
            if wanted == "unpaired" and form.kind == "pair":
                return tuple(replace(turn, rating=rating) for turn, rating in zip(turns, (1.0, 0.0), strict=True))
            return turns
    raise RecordError(
        f"{record.where}: a record with the keys {', '.join(map(str, record.values)) or '(none)'} cannot be read as "
        f"{wanted}; known forms: {', '.join(map(str, forms))}; also {', '.join(DIALECTS)}; "
        "data.columns says where keys have other names"
    )


def _turn(values: Values, key: str) -> Turn:
    """The prompt and the response under `key`: text, the answering message(s), or the whole conversation."""
    prompt, response = values.get("prompt"), values[key]
    if isinstance(response, str):
        if prompt is None:
            raise DataError(f"'{key}' is text, and no 'prompt' says what it answers")
        return Turn(prompt if isinstance(prompt, str) else _messages(prompt, "prompt"), response)
    messages = _messages(response, key)
    if isinstance(prompt, str):
        # Such a prompt only repeats the first user message where the conversation is whole.
        before: list[Message] = [{"role": "user", "content": prompt}] if len(messages) == 1 else []
    else:
        before = [] if prompt is None else _messages(prompt, "prompt")
        if messages[: len(before)] == before:
            before = []
    *conversation, answer = before + messages
    if answer["role"] != "assistant":
        raise DataError(f"the last message of '{key}' is by '{answer['role']}', so it holds no response by 'assistant'")
    if not conversation:
        raise DataError(f"'{key}' holds only a response and no prompt before it")
    return Turn(conversation, answer)


def _messages(value: Any, key: str) -> list[Message]:
    """Messages without their empty keys, which columnar files add and a chat template may trip over."""
    if not isinstance(value, list) or not value:
        raise DataError(f"'{key}' is neither text nor a list of messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"'{key}' holds a message without a 'role'; a message is {{'role': ..., 'content': ...}}")
        content = message.get("content")
        if content is None and message.get("tool_calls") is None:
            raise DataError(f"'{key}' holds a message by '{message['role']}' without 'content'")
        if not isinstance(content, str | list | None):
            raise DataError(f"'{key}' holds a message whose 'content' is {type(content).__name__}, not text")
    return [{name: part for name, part in message.items() if part is not None} for message in value]


def _tokens(values: Values, key: str) -> list[int]:
    tokens = values[key]
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        raise DataError(f"'{key}' is not a list of token ids")
    return tokens
