"""Qwen2 and Qwen2.5: Llama with a bias on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_aligndistil.models import llama
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.families import Family, require
from megatron_aligndistil.models.layout import QueryKeyValue, Rule

PARAMETERS: dict[str, Rule] = {
    **llama.PARAMETERS,
    "decoder.layers.{}.self_attention.linear_qkv.bias": QueryKeyValue(
        "model.layers.{}.self_attn.q_proj.bias",
        "model.layers.{}.self_attn.k_proj.bias",
        "model.layers.{}.self_attn.v_proj.bias",
        bias=True,
    ),
}


def read(config: Mapping[str, Any], where: str) -> Architecture:
    """A Qwen2 config.json as an architecture. Every layer attends to everything before it: no sliding windows."""
    require(config, where, use_sliding_window=False)
    return replace(llama.read(config, where), qkv_bias=True)


FAMILY = Family("qwen2", "Qwen2ForCausalLM", read, PARAMETERS)
