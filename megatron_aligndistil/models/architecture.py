"""What a model is, as data: everything Megatron needs to build it, read from a Hugging Face configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models.families import SCALAR_CLASS, family_of
from megatron_aligndistil.models.rope import inverse_frequencies

# Megatron splits an embedding evenly over the tensor parallel group, each part a multiple of this.
_VOCAB_MULTIPLE = 128
# Neither changes what the model's body computes.
_NOT_COMPARED = ("max_positions", "init_std", "head")


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer: RMSNorm before each block, rotary positions, SiLU-gated feed-forward layers.

    Attributes:
        model_type: the Hugging Face model type; names the family whose file maps parameter names.
        num_layers, hidden_size, ffn_hidden_size: depth and widths.
        num_heads, num_kv_heads, head_dim: query heads, key-value heads (query groups), size of each head.
        vocab_size: rows of the checkpoint's embedding.
        max_positions: longest sequence the model was made for.
        norm_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, or transformers' parameters of the `linear` or `llama3` scaling.
        tied_embeddings: the output layer is the embedding.
        qkv_bias: query, key and value projections have a bias.
        qk_norm: queries and keys are normalised per head.
        init_std: standard deviation of weights drawn from scratch.
        head: what the last layer's states go through: an output layer over the vocabulary ("lm"), or one row ("scalar":
            reward models and critics, transformers' sequence classification with one label).
    """

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    init_std: float = 0.02
    head: Literal["lm", "scalar"] = "lm"

    def scalar(self) -> Architecture:
        """The same body with an output layer of one row."""
        return replace(self, head="scalar", tied_embeddings=False)

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of Megatron's embedding: the vocabulary rounded up to a multiple of 128 · tp."""
        multiple = _VOCAB_MULTIPLE * tp
        return -(-self.vocab_size // multiple) * multiple

    def inverse_frequencies(self) -> Tensor:
        """RoPE inverse frequencies [head_dim / 2] in float32, scaling included."""
        return inverse_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)

    @classmethod
    def from_folder(cls, path: str | Path) -> Architecture:
        """Read a Hugging Face checkpoint folder's config.json.

        Raises:
            CheckpointError: no such folder, no or broken config.json, or a model that is not supported.
        """
        config = read_config(path)
        where = str(Path(path) / "config.json")
        family = family_of(config.get("model_type"), where)
        if config.get("quantization_config"):
            raise CheckpointError(
                f"{where} describes quantised weights; use the checkpoint in bf16, fp16 or fp32 instead"
            )
        try:
            arch = family.read(config, where)
        except KeyError as error:
            raise CheckpointError(f"{where} lacks {error.args[0]}; is the file complete?") from None
        if arch.num_heads % arch.num_kv_heads:
            raise CheckpointError(
                f"{where} has {arch.num_heads} attention heads, not a multiple of its {arch.num_kv_heads} "
                "key-value heads"
            )
        return arch.scalar() if _is_scalar(config, where) else arch


def _is_scalar(config: Mapping[str, Any], where: str) -> bool:
    """Whether config.json describes a sequence classification model; one of several labels is refused."""
    if not any(str(name).endswith(SCALAR_CLASS) for name in config.get("architectures") or ()):
        return False
    labels = config.get("id2label")
    count = config.get("num_labels", 2) if labels is None else len(labels)  # transformers' own default is 2
    if count != 1:
        raise CheckpointError(f"{where} has {count} labels, and only sequence classification with 1 (a reward) is read")
    return True


def read_config(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint folder's config.json. Raises CheckpointError when there is none to read."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a checkpoint: there is no such folder; give a Hugging Face folder's path"
        )
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a Hugging Face checkpoint: it holds no config.json") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds no JSON object, so it is not a model configuration")
    return config


def differences(first: Architecture, second: Architecture) -> list[str]:
    """What keeps two models from sharing one module, as "hidden_size 64 and 128"; empty when nothing does.

    The longest position, the scale of initial weights and the head may differ.
    """
    ignored = _NOT_COMPARED if first.head == second.head else (*_NOT_COMPARED, "tied_embeddings")
    pairs = [
        (f.name, getattr(first, f.name), getattr(second, f.name)) for f in fields(Architecture) if f.name not in ignored
    ]
    return [f"{name} {_show(one)} and {_show(other)}" for name, one, other in pairs if one != other]


def require_same(models: Mapping[str, Architecture]) -> None:
    """Raise CheckpointError ("policy and dpo differ: hidden_size 64 and 128") unless models have one architecture.

    Arguments:
        models: name -> architecture; every one is compared with the first.
    """
    (first_name, first), *others = models.items()
    for name, other in others:
        if found := differences(first, other):
            raise CheckpointError(
                f"{first_name} and {name} differ: {', '.join(found)}; models used together need one architecture"
            )


def _show(value: Any) -> str:
    return json.dumps(value) if isinstance(value, Mapping) else str(value)
