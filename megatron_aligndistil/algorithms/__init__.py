"""Algorithms by name. One file, here or anywhere else, is one algorithm; nothing is registered.

Importing this package imports no torch, so that the command line can list the algorithms at once.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_aligndistil import config
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.user_code import import_module

if TYPE_CHECKING:
    from megatron_aligndistil.algorithms.base import Algorithm


def available() -> list[str]:
    """The names that ``algorithm.name`` may take, in alphabetical order; imports none of them.

    A module whose name begins with an underscore is what several algorithms share.
    """
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return sorted(name for name in names if name != "base" and not name.startswith("_"))


def load(name: str) -> type[Algorithm]:
    """The algorithm that ``algorithm.name`` calls `name`: one of :func:`available`, or a `.py` file that defines one.

    Raises ConfigError, with the nearest known, for any other name, and for a file that does not define one algorithm.
    """
    from_file = str(name).endswith(".py")
    if not from_file and name not in available():
        nearest = difflib.get_close_matches(str(name), available(), 1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(available())}, or a .py file"
        raise ConfigError(f"unknown algorithm.name '{name}'; {hint}")
    from megatron_aligndistil.algorithms.base import Algorithm

    module = import_module(name if from_file else f"{__name__}.{name}", "algorithm.name")
    classes = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Algorithm)]
    found = [kind for kind in classes if kind.__module__ == module.__name__ and hasattr(kind, "name")]
    if len(found) != 1:
        raise ConfigError(
            f"{name} defines {len(found)} algorithms and should define one: a class derived from Algorithm, with a name"
        )
    return found[0]


def build(section: Mapping[str, Any]) -> Algorithm:
    """The algorithm that an ``algorithm`` section of a configuration describes.

    Raises ConfigError when the name is missing or unknown, or when a key or value does not belong to that algorithm.
    """
    if "name" not in section:
        raise ConfigError(f"the configuration needs algorithm.name; known: {', '.join(available())}")
    kind = load(section["name"])
    return kind(config.build(kind.Config, {**section, "name": kind.name}, where="algorithm"))
