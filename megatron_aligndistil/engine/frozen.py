"""Models that are asked and never trained."""

from __future__ import annotations

from pathlib import Path

from megatron_aligndistil.config import PrecisionConfig
from megatron_aligndistil.engine.checkpoint import load_model
from megatron_aligndistil.engine.model import build_model, freeze
from megatron_aligndistil.engine.parallel import Parallel
from megatron_aligndistil.engine.schedule import Model
from megatron_aligndistil.models.architecture import Architecture


def load_frozen(path: str | Path, arch: Architecture, parallel: Parallel, precision: PrecisionConfig) -> Model:
    """This rank's chunks of the model at `path`, in either format, without gradient and in evaluation mode.

    Raises what :func:`build_model` and :func:`load_model` raise.
    """
    chunks = build_model(arch, parallel, precision)
    load_model(chunks, path, arch, parallel)
    freeze(chunks)
    return Model(chunks, arch)
