"""Where each model of a run comes from, and what it is."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_aligndistil.algorithms.base import Algorithm
from megatron_aligndistil.config import ModelsConfig
from megatron_aligndistil.engine.checkpoint import read_architecture
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.models.architecture import Architecture, require_same


@dataclass(frozen=True)
class Source:
    """A model to build: the checkpoint that its weights, or at least its body and description, come from.

    Attributes:
        path: a Hugging Face folder or a distributed checkpoint.
        arch: the model's own architecture, whose head may be another than the checkpoint's.
        drawn: whether all its weights are drawn from the seed.
    """

    path: str
    arch: Architecture
    drawn: bool = False


def find_sources(models: ModelsConfig, algorithm: Algorithm) -> dict[str, Source]:
    """The source of every model that is trained, then of every other that is only asked.

    Raises ConfigError where a model is not named, and CheckpointError where one cannot be read, ends in something else
    than it must, or has another body than the first.
    """
    sources = {name: _trained(name, models, algorithm) for name in algorithm.trained}
    for name, need in algorithm.frozen.items():
        if name not in sources:
            path = _frozen_path(name, models, algorithm)
            sources[name] = Source(path, read_architecture(path, "scalar" if need in ("values", "score") else "lm"))
    require_same({name: source.arch for name, source in sources.items()})
    return sources


def _trained(name: str, models: ModelsConfig, algorithm: Algorithm) -> Source:
    """Language models start from `models.policy`; a scalar model from its own key where that is set.

    A critic without one starts from the reward model, as its value at the last token is the reward.
    """
    if algorithm.head(name) == "lm":
        return Source(models.policy, read_architecture(models.policy), models.init == "scratch")
    path = getattr(models, name, None) or (models.reward if name == "critic" else None) or models.policy
    return Source(path, read_architecture(path, "any").scalar(), models.init == "scratch" and path == models.policy)


def _frozen_path(name: str, models: ModelsConfig, algorithm: Algorithm) -> str:
    path = getattr(models, name) or (models.policy if name == "reference" else None)
    if path is None:
        raise ConfigError(f"{algorithm.name} needs a frozen {name} model; set models.{name} to its checkpoint")
    if name == "reference" and models.init == "scratch" and models.reference is None:
        raise ConfigError("a policy drawn from scratch is no reference; set models.reference")
    assert isinstance(path, str)
    return path
