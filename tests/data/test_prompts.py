"""Prompts that a server gets, as tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_aligndistil.data.prompts import PromptEncoder
from megatron_aligndistil.data.tokenizer import load_tokenizer
from megatron_aligndistil.errors import DataError
from tests.data.tiny import BOS, END, IDS, NEWLINE, TEMPLATE, TURN, WORDS, A, B, make_tokenizer, user


def encoder(size: int = len(WORDS), **changes) -> PromptEncoder:
    return PromptEncoder(make_tokenizer(**changes), size)


def test_a_text_is_begun_once_and_not_ended() -> None:
    assert encoder().text("a b") == [BOS, A, B]
    assert encoder().text("<s> a b") == [BOS, A, B]
    assert encoder(adds_bos=False).text("a b") == [A, B]
    assert encoder(template=TEMPLATE).text("a b") == [BOS, A, B]  # completions know no template


def test_an_empty_text_is_the_beginning_of_sequence_or_an_error() -> None:
    assert encoder().text("") == encoder(adds_bos=False).text("") == [BOS]
    with pytest.raises(DataError, match="no beginning-of-sequence token"):
        encoder(bos=False, adds_bos=False).text("")


def test_messages_are_rendered_up_to_the_answer() -> None:
    found = encoder(template=TEMPLATE).messages([user("a")])
    assert found == [TURN, IDS["user"], A, END, NEWLINE, TURN, IDS["assistant"]]
    with pytest.raises(DataError, match="no chat template"):
        encoder().messages([user("a")])
    with pytest.raises(DataError, match="messages: the chat template refuses this conversation: no system"):
        encoder(template="{{ raise_exception('no system') if messages[0].role == 'system' else 'a <end>' }}").messages(
            [{"role": "system", "content": "a"}]
        )


def test_tokens_that_the_model_does_not_know_are_refused() -> None:
    assert encoder().tokens([A, B]) == [A, B]
    for wrong in ([], [-1], [A, len(WORDS)]):
        with pytest.raises(DataError):
            encoder().tokens(wrong)
    with pytest.raises(DataError, match=f"token id {B} is outside the model's vocabulary of {B}"):
        encoder(B).text("a b")


def test_texts_as_transformers_reads_them(shared_data: Path) -> None:
    for name in ("stories260K/hf", "qwen_tokenizer"):
        tokenizer = load_tokenizer(shared_data / name)
        found = PromptEncoder(tokenizer, len(tokenizer)).text("Once upon a time")
        assert found == tokenizer("Once upon a time")["input_ids"]
