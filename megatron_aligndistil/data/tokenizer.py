"""Tokenizers: loading one, and the few ids that the rest of the program asks it for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_aligndistil.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def has_tokenizer(folder: str | Path) -> bool:
    """Whether there are a tokenizer's files in a folder."""
    return any((Path(folder) / name).is_file() for name in _FILES)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer kept in a folder, with its chat template where it has one. Nothing is downloaded.

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
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers and tokenizers have no common base for what may be wrong with a file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {reason}") from error


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
