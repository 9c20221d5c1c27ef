"""Tiny random transformers models, saved as checkpoint folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

_SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
# No vocabulary here is a multiple of 128; with 100 tokens, later ranks of tp 4 hold nothing but padding.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2-tied": {"vocab_size": 300, "tie_word_embeddings": True},
    "qwen2-untied": {"vocab_size": 300, "num_key_value_heads": 2},
    "llama-untied": {"vocab_size": 100, "head_dim": 16},
    "llama-tied": {"vocab_size": 515, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "qwen3-tied": {"vocab_size": 300, "head_dim": 8, "tie_word_embeddings": True},
    "mistral-untied": {"vocab_size": 100, "sliding_window": None},
}


def make(
    name: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    scalar: bool = False,
    **changes: Any,
) -> PreTrainedModel:
    """A random model, biases and norms too, saved in `folder`; `changes` go to its configuration.

    With `scalar` it is a sequence classification model with one label.
    """
    settings = {**_SIZES, **MODELS[name], **({"num_labels": 1} if scalar else {}), **changes}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name.partition("-")[0], **settings)
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
            if parameter.dim() == 1:
                parameter.add_(1.0)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    return model
