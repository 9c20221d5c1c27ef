"""Tokenizers from a SentencePiece model alone, with SentencePiece's own rules for spaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_aligndistil.errors import CheckpointError

_PROBES = ("Once upon a time", "  two  spaces\tand\n\na new line ", "Ünïcödé 🙂 ﬁ", "a b")


def is_sentencepiece(path: Path) -> bool:
    """Whether a file is a SentencePiece model; files of tiktoken, a text, have the same name."""
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        return False
    return True


def follow_model(tokenizer: Any, path: Path, *, adds_bos: bool) -> None:
    """Give a fast tokenizer that transformers has made of the model in `path` the rules that the model itself states.

    transformers takes the pieces from the model. Which spaces are dropped, whether one is put in front, how bytes are
    joined and what begins a sequence it takes from the class of a known model, and without one it goes astray.

    Raises CheckpointError where its tokens are still not those of SentencePiece.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Regex, decoders, normalizers, processors
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto.FromString(path.read_bytes())
    spec, inner = model.normalizer_spec, tokenizer.backend_tokenizer
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A +| +\z"), "")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    inner.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = None
    begin = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *begin])
    if adds_bos and tokenizer.bos_token_id is not None:
        bos = tokenizer.bos_token
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    sentencepiece = SentencePieceProcessor(model_file=str(path))
    for text in _PROBES:
        expected, found = sentencepiece.encode(text), tokenizer(text, add_special_tokens=False)["input_ids"]
        if found != expected:
            raise CheckpointError(
                f"{path} cannot be used by itself: transformers splits {text!r} into {found} and SentencePiece into "
                f"{expected}; put the tokenizer.json that belongs to it beside it"
            )
