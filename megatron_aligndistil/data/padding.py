"""A padding token by which a reward model's last token can be told."""

from __future__ import annotations

from pathlib import Path

from megatron_aligndistil.data.tokenizer import Tokenizer, load_tokenizer, special_ids
from megatron_aligndistil.data.tokens import stop_ids
from megatron_aligndistil.errors import DataError


def pad_with_another_token(folder: Path) -> int | None:
    """The tokenizer in `folder` pads with a token that ends no response; returns that token's id.

    transformers scores a row at its last token that is not padding. A tokenizer that pads with the end of sequence
    would so hide the token at which the score is learned. It then gets another special token for padding (the beginning
    of sequence, else the first) and is written anew; None, and nothing written, where it has none.
    """
    tokenizer = load_tokenizer(folder)
    ends = _ends(tokenizer)
    candidates = (
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        *sorted(special_ids(tokenizer)),
        tokenizer.unk_token_id,
    )
    token = next((token for token in candidates if token is not None and token not in ends), None)
    if token is not None and token != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token)
        tokenizer.save_pretrained(str(folder))
    return None if token is None else int(token)


def _ends(tokenizer: Tokenizer) -> frozenset[int]:
    try:
        return stop_ids(tokenizer)
    except DataError:  # nothing ends a response
        return frozenset()
