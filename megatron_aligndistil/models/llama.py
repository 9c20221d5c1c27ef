"""Llama 2, 3 and 3.x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.families import Family, require
from megatron_aligndistil.models.layout import Columns, GateUp, QueryKeyValue, Replicated, Rule, Vocabulary
from megatron_aligndistil.models.rope import read_rope

PARAMETERS: dict[str, Rule] = {
    "embedding.word_embeddings.weight": Vocabulary("model.embed_tokens.weight"),
    "decoder.layers.{}.input_layernorm.weight": Replicated("model.layers.{}.input_layernorm.weight"),
    "decoder.layers.{}.self_attention.linear_qkv.weight": QueryKeyValue(
        "model.layers.{}.self_attn.q_proj.weight",
        "model.layers.{}.self_attn.k_proj.weight",
        "model.layers.{}.self_attn.v_proj.weight",
    ),
    "decoder.layers.{}.self_attention.linear_proj.weight": Columns(
        "model.layers.{}.self_attn.o_proj.weight", heads=True
    ),
    "decoder.layers.{}.pre_mlp_layernorm.weight": Replicated("model.layers.{}.post_attention_layernorm.weight"),
    "decoder.layers.{}.mlp.linear_fc1.weight": GateUp(
        "model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"
    ),
    "decoder.layers.{}.mlp.linear_fc2.weight": Columns("model.layers.{}.mlp.down_proj.weight"),
    "decoder.final_layernorm.weight": Replicated("model.norm.weight"),
    "output_layer.weight": Vocabulary("lm_head.weight", tied="model.embed_tokens.weight"),
}


def read(config: Mapping[str, Any], where: str) -> Architecture:
    """A Llama config.json as an architecture; a missing head size or number of key-value heads follows from others."""
    require(config, where, hidden_act="silu", attention_bias=False, mlp_bias=False)
    theta, scaling = read_rope(config, where)
    return Architecture(
        model_type=config["model_type"],
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=config.get("tie_word_embeddings", False),
        init_std=config.get("initializer_range", 0.02),
    )


FAMILY = Family("llama", "LlamaForCausalLM", read, PARAMETERS)
