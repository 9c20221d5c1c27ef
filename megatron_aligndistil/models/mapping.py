"""From one Megatron parameter to its Hugging Face tensors and back, any tensor parallel slice at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.families import family_of
from megatron_aligndistil.models.layout import Replicated, Row, Rule, Shape, Vocabulary, shard

# Transformer Engine fuses a norm into the linear layer after it, and names its weight accordingly.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
# The output layer, and what it is in transformers' sequence classification models.
_OUTPUT, SCORE = "output_layer.weight", "score.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def _rule(name: str, arch: Architecture) -> tuple[Rule, str]:
    """The rule of a Megatron parameter and the layer number that fills its `{}` (empty outside layers)."""
    number, template = "", name
    if match := _LAYER.fullmatch(name):
        number, rest = match.groups()
        template = f"decoder.layers.{{}}.{_FUSED_NORMS.get(rest, rest)}"
    if template == _OUTPUT and arch.head == "scalar":
        return Row(SCORE), number
    rules = family_of(arch.model_type).parameters
    if template not in rules:
        raise CheckpointError(
            f"the Megatron parameter {name} has no Hugging Face counterpart in model type {arch.model_type}"
        )
    return rules[template], number


def parameter_names(arch: Architecture) -> list[str]:
    """Every Megatron parameter of the model in order, with unfused norms; a tied output layer is left out."""
    rules = family_of(arch.model_type).parameters
    templates = list(rules)
    in_layer = [t for t in templates if "{}" in t]
    first = templates.index(in_layer[0])
    before = [t for t in templates[:first] if "{}" not in t]
    after = [t for t in templates[first:] if "{}" not in t and not is_copy(t, arch)]
    return [*before, *(t.format(layer) for layer in range(arch.num_layers) for t in in_layer), *after]


def is_copy(name: str, arch: Architecture) -> bool:
    """Whether the parameter is a later pipeline stage's copy of the tied embedding: read, but never written."""
    rule, _ = _rule(name, arch)
    return isinstance(rule, Vocabulary) and rule.is_copy(arch)


def is_replicated(name: str, arch: Architecture) -> bool:
    """Whether every tensor parallel rank holds the whole parameter."""
    return isinstance(_rule(name, arch)[0], Replicated)


def hf_sources(name: str, arch: Architecture) -> dict[str, Shape]:
    """The Hugging Face tensors behind one Megatron parameter, with their shapes."""
    rule, layer = _rule(name, arch)
    return {source.format(layer): shape for source, shape in rule.tensors(arch).items()}


def hf_tensors(arch: Architecture) -> dict[str, Shape]:
    """Every tensor of the model's Hugging Face checkpoint in the model's order, with its shape."""
    return {source: shape for name in parameter_names(arch) for source, shape in hf_sources(name, arch).items()}


def read_shard(name: str, arch: Architecture, tp_rank: int, tp_size: int, get: Callable[[str], Any]) -> Tensor:
    """One tensor parallel rank's part of a Megatron parameter, in the dtype of its sources.

    Arguments:
        name: Megatron's parameter name with the global layer number, with fused or unfused norms.
        get: Hugging Face tensor name -> anything that slices like a tensor (safetensors' `get_slice`): only the rows or
            columns of this rank are asked for.

    Raises:
        CheckpointError: a parameter that the architecture does not have.
        ValueError: a layout that does not divide the parameter.
    """
    rule, layer = _rule(name, arch)
    if rule.split_dim is None:
        (source,) = rule.tensors(arch)
        return get(source.format(layer))[:]
    part = shard(rule.pieces(arch, tp_size), tp_rank, tp_size)
    read = [_slice(get(p.source.format(layer)), rule.split_dim, p.start, p.stop) for p in part if p.source is not None]
    if padding := sum(piece.size for piece in part if piece.source is None):
        # A rank may hold nothing but padding; even then dtype and width are its source's.
        (source,) = rule.tensors(arch)
        empty = _slice(get(source.format(layer)), rule.split_dim, 0, 0)
        read.append(empty.new_zeros(padding, *empty.shape[1:]))
    return read[0] if len(read) == 1 else torch.cat(read, dim=rule.split_dim)


def write_full(name: str, arch: Architecture, shards: Sequence[Tensor]) -> dict[str, Tensor]:
    """The Hugging Face tensors of one Megatron parameter: the inverse of :func:`read_shard`.

    Arguments:
        shards: the parameter of every tensor parallel rank, in rank order (one is enough for a replicated parameter).

    Returns:
        Contiguous tensors, which may share memory with the shards; none for a copy of the tied embedding.
    """
    rule, layer = _rule(name, arch)
    if is_copy(name, arch):
        return {}
    if rule.split_dim is None:
        (source,) = rule.tensors(arch)
        return {source.format(layer): shards[0].contiguous()}
    parts: dict[str, list[tuple[int, Tensor]]] = {source: [] for source in rule.tensors(arch)}
    pieces = rule.pieces(arch, len(shards))
    for rank, tensor in enumerate(shards):
        offset = 0
        for piece in shard(pieces, rank, len(shards)):
            if piece.source is not None:
                parts[piece.source].append((piece.start, tensor.narrow(rule.split_dim, offset, piece.size)))
            offset += piece.size
    return {source.format(layer): _join(found, rule.split_dim) for source, found in parts.items()}


def _slice(tensor: Any, dim: int, start: int, stop: int) -> Tensor:
    return tensor[start:stop] if dim == 0 else tensor[:, start:stop]


def _join(parts: list[tuple[int, Tensor]], dim: int) -> Tensor:
    ordered = [tensor for _, tensor in sorted(parts, key=lambda part: part[0])]
    return ordered[0].contiguous() if len(ordered) == 1 else torch.cat(ordered, dim=dim)
