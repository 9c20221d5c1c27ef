"""Qwen3: Llama whose queries and keys are normalised per head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_aligndistil.models import llama
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.families import Family, require
from megatron_aligndistil.models.layout import Replicated, Rule

_ATTENTION = "decoder.layers.{}.self_attention."

PARAMETERS: dict[str, Rule] = {
    **llama.PARAMETERS,
    _ATTENTION + "q_layernorm.weight": Replicated("model.layers.{}.self_attn.q_norm.weight", size="head_dim"),
    _ATTENTION + "k_layernorm.weight": Replicated("model.layers.{}.self_attn.k_norm.weight", size="head_dim"),
}


def read(config: Mapping[str, Any], where: str) -> Architecture:
    """A Qwen3 config.json as an architecture. Every layer attends to everything before it: no sliding windows."""
    require(config, where, use_sliding_window=False)
    return replace(llama.read(config, where), qk_norm=True)


FAMILY = Family("qwen3", "Qwen3ForCausalLM", read, PARAMETERS)
