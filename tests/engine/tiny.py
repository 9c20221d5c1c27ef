"""Tiny checkpoints with a tokenizer, and preference pairs of random tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models.tiny import MODELS, make


def make_checkpoint(name: str, folder: Path, seed: int = 0, **changes) -> None:
    """A random model of `tests.models.tiny` with a word-level tokenizer of as many tokens as the model knows."""
    make(name, folder, seed=seed, **changes)
    size = changes.get("vocab_size", MODELS[name]["vocab_size"])
    words = {"<bos>": 0, "<eos>": 1, "<unk>": 2} | {f"w{index}": index for index in range(3, size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)


def make_pairs(path: Path, count: int, vocab_size: int, seed: int = 0) -> None:
    """Pairs whose prompts and responses have different lengths; every token of the vocabulary may occur."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(3, vocab_size) for _ in range(draw.randint(low, high))]

    with path.open("w") as file:
        for _ in range(count):
            record = {
                "prompt_tokens": [0, *tokens(1, 9)],
                "chosen_tokens": [*tokens(1, 14), 1],
                "rejected_tokens": tokens(1, 14),
            }
            file.write(json.dumps(record) + "\n")
