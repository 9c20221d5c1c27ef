"""Forms of record that other tools write, turned into the keys that :mod:`megatron_aligndistil.data.forms` reads.

A new one is one function and one line in `DIALECTS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from megatron_aligndistil.errors import DataError

Values = dict[str, Any]

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
_TURN = re.compile(r"\n\n(Human|Assistant):")


def translate(values: Values) -> Values:
    """The same record in our keys; one that is in no other tool's form stays as it is.

    Raises DataError where a value is not what its key says.
    """
    if "kto_tag" in values and "label" not in values:  # LLaMA-Factory's name
        values = {"label" if key == "kto_tag" else key: value for key, value in values.items()}
    for is_one, read in DIALECTS.values():
        if is_one(values):
            return read(values)
    return values


def _sharegpt(values: Values) -> Values:
    """LLaMA-Factory's ShareGPT style: `conversations` of {from, value}, with `chosen` and `rejected` beside them."""
    conversation = [_spoken(turn, "conversations") for turn in _listed(values, "conversations")]
    if isinstance(values.get("system"), str) and values["system"]:
        conversation.insert(0, {"role": "system", "content": values["system"]})
    rest = {key: value for key, value in values.items() if key not in ("conversations", "system")}
    if "chosen" not in values:
        return rest | {"messages": conversation}
    return rest | {"prompt": conversation} | {key: [_spoken(values.get(key), key)] for key in ("chosen", "rejected")}


def _answered(values: Values) -> Values:
    """The same with OpenAI's names: `messages`, with one message each as `chosen` and `rejected` beside them."""
    rest = {key: value for key, value in values.items() if key != "messages"}
    return rest | {"prompt": values["messages"]} | {key: [values.get(key)] for key in ("chosen", "rejected")}


def _alpaca(values: Values) -> Values:
    """Alpaca's `instruction`, `input` and `output`, or `chosen` and `rejected` in the output's place.

    LLaMA-Factory adds `system`, and `history`: pairs of what was said before.
    """
    known = ("instruction", "input", "output", "system", "history")
    rest = {key: value for key, value in values.items() if key not in known}
    parts = [values["instruction"], values.get("input")]
    if any(part is not None and not isinstance(part, str) for part in parts):
        raise DataError("'instruction' or 'input' is no text")
    prompt: Any = "\n".join(part for part in parts if part)
    before = _said_before(values)
    if before:
        prompt = [*before, {"role": "user", "content": prompt}]
    if "chosen" in values and before:
        return rest | {"prompt": prompt} | {key: [_answer(values.get(key))] for key in ("chosen", "rejected")}
    if "chosen" in values:
        return rest | {"prompt": prompt}
    output = values.get("output", "")
    return rest | {"prompt": prompt, "completion": [_answer(output)] if before else output}


def _answer(text: Any) -> dict[str, Any]:
    if not isinstance(text, str):
        raise DataError("an answer beside 'history' or 'system' is no text")
    return {"role": "assistant", "content": text}


def _said_before(values: Values) -> list[dict[str, Any]]:
    """The messages before an instruction."""
    system, history = values.get("system") or "", values.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not isinstance(system, str) or not pairs or any(not isinstance(text, str) for pair in history for text in pair):
        raise DataError("'system' is no text, or 'history' no list of pairs of texts")
    said = [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return [{"role": "system", "content": system}, *said] if system else said


def _transcripts(values: Values) -> Values:
    """HH-RLHF's two transcripts: what they share is the prompt, and the response all that the assistant says after."""
    chosen, rejected = (_messages(values[key], key) for key in ("chosen", "rejected"))
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise DataError(f"'{key}' is a transcript that does not end with an answer by 'Assistant:'")
    if chosen[:-1] != rejected[:-1]:
        raise DataError("chosen and rejected are transcripts that part before the last answer")
    rest = {key: value for key, value in values.items() if key not in ("chosen", "rejected")}
    return rest | {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _messages(transcript: str, key: str) -> list[dict[str, str]]:
    """The messages of a transcript; turns of one speaker in a row are one message."""
    before, *parts = _TURN.split(transcript)
    if before.strip():
        raise DataError(f"'{key}' does not begin with a turn by 'Human:'")
    messages: list[dict[str, str]] = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + text.strip()
        else:
            messages.append({"role": role, "content": text.strip()})
    return messages


def _spoken(turn: Any, key: str) -> dict[str, Any]:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise DataError(f"'{key}' holds a turn that is not {{'from': ..., 'value': text}}")
    if not isinstance(turn.get("from"), str) or turn["from"] not in _SPEAKERS:
        raise DataError(f"'{key}' holds a turn from {turn.get('from')!r}; known: {', '.join(_SPEAKERS)}")
    return {"role": _SPEAKERS[turn["from"]], "content": turn["value"]}


def _listed(values: Values, key: str) -> list[Any]:
    if not isinstance(values[key], list) or not values[key]:
        raise DataError(f"'{key}' is no list of turns")
    return list(values[key])


def _is_message(values: Values) -> bool:
    return isinstance(values.get("chosen"), dict) and "role" in values["chosen"]


def _has_transcripts(values: Values) -> bool:
    pair = values.get("chosen"), values.get("rejected")
    return "prompt" not in values and all(isinstance(value, str) and _TURN.match(value) for value in pair)


# What a form is called, how it is told, and how it is read.
DIALECTS: dict[str, tuple[Callable[[Values], bool], Callable[[Values], Values]]] = {
    "ShareGPT conversations": (lambda values: "conversations" in values, _sharegpt),
    "messages with an answer chosen": (lambda values: "messages" in values and _is_message(values), _answered),
    "Alpaca instructions": (lambda values: "instruction" in values and "prompt" not in values, _alpaca),
    "HH-RLHF transcripts": (_has_transcripts, _transcripts),
}
