"""A tokenizer small enough to know every id by heart, and files of records."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["<unk>", "<s>", "</s>", "<turn>", "<end>", "a", "b", "c", "d", "user", "assistant", "system", "\n"]
IDS = {word: index for index, word in enumerate(WORDS)}
BOS, EOS, TURN, END, A, B, C, D = (IDS[word] for word in ("<s>", "</s>", "<turn>", "<end>", "a", "b", "c", "d"))
NEWLINE = IDS["\n"]

TEMPLATE = (
    "{% for m in messages %}<turn> {{ m.role }} {{ m.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant {% endif %}"
)


def make_tokenizer(
    *, template: str | None = None, adds_bos: bool = True, bos: bool = True, eos: bool = True
) -> PreTrainedTokenizerFast:
    """One token a word; new lines are words, and spaces are nothing."""
    inner = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    inner.add_special_tokens(WORDS[:5])
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    if adds_bos:
        # Some tokenizers end their inputs too; a prompt must not be ended.
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
    )
    tokenizer.chat_template = template
    return tokenizer


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> str:
    """Write one record a line; returns the path as text."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
