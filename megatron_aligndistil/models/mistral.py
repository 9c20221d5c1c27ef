"""Mistral from version 0.2 on, which is Llama under another name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models import llama
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.families import Family


def read(config: Mapping[str, Any], where: str) -> Architecture:
    """A Mistral config.json as an architecture. Raises CheckpointError for the sliding window of version 0.1."""
    window = config.get("sliding_window")
    if window is not None and window < config["max_position_embeddings"]:
        raise CheckpointError(
            f"{where} has sliding_window {window}, which is not supported; use a version without one (0.2 or later)"
        )
    return llama.read(config, where)


FAMILY = Family("mistral", "MistralForCausalLM", read, llama.PARAMETERS)
