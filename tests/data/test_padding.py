"""A reward model's tokenizer pads with a token that ends no response."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_aligndistil.data.padding import pad_with_another_token

WORDS = ("<eos>", "<bos>", "<pad>", "<mark>", "word")
TEMPLATE = "{% for message in messages %}<mark>{{ message['content'] }}<turn>{% endfor %}"


def write(folder: Path, words: tuple[str, ...] = WORDS, template: str | None = None, **special: str) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="word"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = template
    fast.save_pretrained(folder)


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"}, 2),
        ({"eos_token": "<eos>", "pad_token": "<eos>", "bos_token": "<bos>"}, 1),
        ({"eos_token": "<eos>", "pad_token": "<eos>", "additional_special_tokens": ["<mark>"]}, 3),
        ({"eos_token": "<eos>", "unk_token": "word"}, 4),
        ({"eos_token": "<eos>"}, None),
        ({"eos_token": "<eos>", "pad_token": "<eos>"}, None),
    ],
)
def test_padding(tmp_path: Path, special: dict, expected: int | None) -> None:
    write(tmp_path, **special)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert pad_with_another_token(tmp_path) == expected
    if expected in (2, None):
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    if expected is not None:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert tokenizer.pad_token_id == expected and tokenizer.eos_token_id == 0


def test_the_end_of_a_turn_is_no_padding_either(tmp_path: Path) -> None:
    words = ("<eos>", "<turn>", "<mark>", "a", "b")
    extra = {"eos_token": "<eos>", "additional_special_tokens": ["<turn>", "<mark>"], "pad_token": "<turn>"}
    write(tmp_path, words, TEMPLATE, **extra)
    assert pad_with_another_token(tmp_path) == 2
