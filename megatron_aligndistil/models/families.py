"""Model families. Each is one file of this package that defines `FAMILY`; a new file is found by being there."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from megatron_aligndistil import models
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models.layout import Rule

if TYPE_CHECKING:
    from megatron_aligndistil.models.architecture import Architecture


# How config.json's `architectures` names transformers' model with one number for an output.
SCALAR_CLASS = "ForSequenceClassification"


@dataclass(frozen=True)
class Family:
    """How one Hugging Face model type becomes an architecture, and what its parameters are called.

    Attributes:
        model_type: config.json's `model_type`.
        model_class: the transformers class that config.json's `architectures` names.
        read: (config.json's contents, its path for messages) -> architecture; a KeyError names a missing key.
        parameters: Megatron parameter name -> rule, in the order of the model. `{}` stands for the layer's number.
    """

    model_type: str
    model_class: str
    read: Callable[[Mapping[str, Any], str], Architecture]
    parameters: Mapping[str, Rule]

    def class_of(self, arch: Architecture) -> str:
        """The transformers class of a model with this head."""
        if arch.head == "lm":
            return self.model_class
        return self.model_class.replace("ForCausalLM", SCALAR_CLASS)


@cache
def families() -> Mapping[str, Family]:
    """Every family by model type."""
    modules = (
        importlib.import_module(f"{models.__name__}.{info.name}") for info in pkgutil.iter_modules(models.__path__)
    )
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.model_type: family for family in found}


def family_of(model_type: Any, where: str = "this model") -> Family:
    """The family of a model type. Raises CheckpointError naming the supported ones."""
    known = families()
    if model_type not in known:
        supported = ", ".join(sorted(known))
        raise CheckpointError(f"{where} says model_type {model_type!r}, which is not supported; supported: {supported}")
    return known[model_type]


def require(config: Mapping[str, Any], where: str, **expected: Any) -> None:
    """Raise CheckpointError when a key of config.json has another value than the one our layers compute.

    An absent key, or null, means the expected value.
    """
    for key, value in expected.items():
        found = config.get(key)
        if found is not None and found != value:
            raise CheckpointError(f"{where} has {key} {found!r}, which is not supported; only {value!r} is")
