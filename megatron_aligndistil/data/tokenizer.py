"""Tokenizers: loading one, and the few ids that the rest of the program asks it for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_aligndistil.data.sentencepiece_model import follow_model, is_sentencepiece
from megatron_aligndistil.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

_MODEL = "tokenizer.model"
_FILES = ("tokenizer.json", _MODEL, "tokenizer_config.json", "vocab.json", "vocab.txt")


def has_tokenizer(folder: str | Path) -> bool:
    """Whether there are a tokenizer's files in a folder."""
    return any((Path(folder) / name).is_file() for name in _FILES)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer kept in a folder, with its chat template where it has one. Nothing is downloaded.

    A SentencePiece model (tokenizer.model) with nothing else gives the tokens of SentencePiece itself, begun with its
    beginning-of-sequence token where it has one.

    Raises CheckpointError where the folder holds no tokenizer, or one that transformers cannot read.
    """
    folder = Path(folder).expanduser()
    if not has_tokenizer(folder):
        what = "holds no tokenizer" if folder.is_dir() else "is no folder"
        raise CheckpointError(
            f"{folder} {what}; a tokenizer is {_FILES[0]} with {_FILES[2]}, beside the model's weights"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if _is_bare(folder):
            follow_model(tokenizer, folder / _MODEL, adds_bos=bool(_settings(folder).get("add_bos_token", True)))
        return tokenizer
    except CheckpointError:
        raise
    except Exception as error:  # transformers and tokenizers have no common base for what may be wrong with a file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {reason}") from error


def _is_bare(folder: Path) -> bool:
    """Whether there is a SentencePiece model, and nothing that says which class of tokenizer reads it."""
    if (folder / "tokenizer.json").is_file() or "tokenizer_class" in _settings(folder):
        return False
    return (folder / _MODEL).is_file() and is_sentencepiece(folder / _MODEL)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def to_text(tokenizer: Tokenizer, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """The text of some tokens; spaces are left as the tokens have them."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    assert isinstance(text, str), "one text for one list of tokens"
    return text


def pad_id(tokenizer: Tokenizer) -> int:
    """The id that fills rows up; padding is never seen by a loss, so any id of the vocabulary serves."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in ids if token is not None)


def vocab_size(tokenizer: Tokenizer) -> int:
    """The number of ids that the tokenizer can give, added tokens included; a model may have more rows than that."""
    return max(tokenizer.get_vocab().values()) + 1


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of control tokens, which no ordinary text is split into; so not the one for unknown text."""
    marked = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return frozenset((marked | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id})
