"""Algorithms by name. One file here is one algorithm; nothing is registered anywhere else.

Importing this package imports no torch, so that the command line can list the algorithms at once.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_aligndistil import config
from megatron_aligndistil.errors import ConfigError

if TYPE_CHECKING:
    from megatron_aligndistil.algorithms.base import Algorithm


def available() -> list[str]:
    """The names that ``algorithm.name`` may take, in alphabetical order; imports none of them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def load(name: str) -> type[Algorithm]:
    """The algorithm that ``algorithm.name`` calls `name`. Raises ConfigError, with the nearest known, for any other."""
    known = available()
    if name not in known:
        nearest = difflib.get_close_matches(str(name), known, 1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}"
        raise ConfigError(f"unknown algorithm.name '{name}'; {hint}")
    from megatron_aligndistil.algorithms.base import Algorithm

    module = importlib.import_module(f"{__name__}.{name}")
    classes = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Algorithm)]
    return next(kind for kind in classes if getattr(kind, "name", None) == name)


def build(section: Mapping[str, Any]) -> Algorithm:
    """The algorithm that an ``algorithm`` section of a configuration describes.

    Raises ConfigError when the name is missing or unknown, or when a key or value does not belong to that algorithm.
    """
    if "name" not in section:
        raise ConfigError(f"the configuration needs algorithm.name; known: {', '.join(available())}")
    kind = load(section["name"])
    return kind(config.build(kind.Config, section, where="algorithm"))
