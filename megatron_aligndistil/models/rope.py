"""Rotary position embedding: what a configuration asks for, and the frequencies it means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_aligndistil.errors import CheckpointError

# Keys that each supported scaling needs beside its name; transformers' spelling.
_SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_DEFAULT_THETA = 10000.0


def read_rope(config: Mapping[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling from a config.json, in either spelling.

    transformers 5 writes one `rope_parameters`; older folders hold `rope_theta` beside `rope_scaling`, whose type is
    called `rope_type` or, older still, `type`.

    Returns:
        theta, and the scaling as {"rope_type": "linear" | "llama3", its numbers ...}, or None where positions are
        unscaled.

    Raises:
        CheckpointError: a scaling that depends on the sequence (dynamic, yarn, longrope), or one that lacks a number.
    """
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = parameters.get("rope_theta") or config.get("rope_theta") or _DEFAULT_THETA
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _SCALINGS:
        raise CheckpointError(
            f"{where} asks for RoPE scaling '{kind}', which is not supported; supported: {', '.join(_SCALINGS)}"
        )
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if partial != 1.0:
        raise CheckpointError(
            f"{where} rotates only {partial} of each head (partial_rotary_factor), which is not supported"
        )
    if kind == "default":
        return float(theta), None
    if kind == "llama3":
        parameters.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    missing = [key for key in _SCALINGS[kind] if parameters.get(key) is None]
    if missing:
        raise CheckpointError(
            f"{where} asks for RoPE scaling '{kind}' without {' and '.join(missing)}; add it to the file"
        )
    return float(theta), {"rope_type": kind, **{key: parameters[key] for key in _SCALINGS[kind]}}


def inverse_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> Tensor:
    """Inverse frequencies [head_dim / 2], float32, on the CPU: theta^(-2i/head_dim), scaled.

    `linear` divides every frequency by its factor (the same as dividing positions). `llama3` (Llama 3.1) keeps
    frequencies whose wavelength is below original/high_freq_factor positions, divides by the factor those above
    original/low_freq_factor, and between the two blends linearly in original/wavelength. Written in the order of
    operations that transformers uses, so that the numbers are the same to the last bit.
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float) / head_dim))
    if scaling is None:
        return frequencies
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    long = wavelength > original / low
    short = wavelength < original / high
    scaled = torch.where(long, frequencies / factor, frequencies)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * scaled / factor + smooth * scaled
    return torch.where(~long & ~short, blended, scaled)
