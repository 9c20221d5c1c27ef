"""The tokens of prompts that come one at a time, as a server gets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_aligndistil.data.forms import Message, Turn
from megatron_aligndistil.data.tokenizer import Tokenizer
from megatron_aligndistil.data.tokens import Encoder
from megatron_aligndistil.errors import DataError


class PromptEncoder:
    """Texts, tokens and conversations -> prompt tokens.

    Args:
        vocab_size: of the model, whose embedding takes no other tokens.

    Every method raises DataError where nothing can be made of a prompt.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer: Any = tokenizer
        self._vocab_size = vocab_size
        self._encoder = Encoder(tokenizer)
        bos = tokenizer.bos_token_id
        self._bos = [] if bos is None else [int(bos)]
        self._adds_bos = bool(self._bos) and tokenizer("")["input_ids"][:1] == self._bos

    def text(self, text: str) -> list[int]:
        """A text as it stands, without a chat template; begun as the tokenizer begins a sequence, unless it is so
        already because a client has rendered a template itself."""
        tokens = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not tokens or (self._adds_bos and tokens[:1] != self._bos):
            tokens = self._bos + tokens
        return self.tokens(tokens)

    def messages(self, messages: list[Message]) -> list[int]:
        """A conversation as the tokenizer's chat template renders it, up to where the assistant's answer begins."""
        if not self._tokenizer.chat_template:
            raise DataError("this model's tokenizer has no chat template, so it takes text prompts only, no messages")
        (row,) = self._encoder.encode([Turn(messages, None)], ["messages"])
        return self.tokens(row.tokens.tolist())

    def tokens(self, tokens: Sequence[int]) -> list[int]:
        """Tokens as they are."""
        if not tokens:
            raise DataError("the prompt is empty, and the tokenizer has no beginning-of-sequence token to stand for it")
        wrong = [token for token in tokens if not 0 <= token < self._vocab_size]
        if wrong:
            raise DataError(f"token id {wrong[0]} is outside the model's vocabulary of {self._vocab_size}")
        return list(tokens)
