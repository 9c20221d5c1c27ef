"""Algorithms by name. One file, here or anywhere else, is one algorithm; nothing is registered.

Importing this package imports no torch, so that the command line can list the algorithms at once.
"""

from __future__ import annotations

import difflib
import importlib.util
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megatron_aligndistil import config
from megatron_aligndistil.errors import ConfigError

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

    module = _import_file(Path(name)) if from_file else importlib.import_module(f"{__name__}.{name}")
    classes = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Algorithm)]
    found = [kind for kind in classes if kind.__module__ == module.__name__ and hasattr(kind, "name")]
    if len(found) != 1:
        raise ConfigError(
            f"{name} defines {len(found)} algorithms and should define one: a class derived from Algorithm, with a name"
        )
    return found[0]


def _import_file(path: Path) -> ModuleType:
    """The module that a file outside the package holds."""
    if not path.is_file():
        raise ConfigError(f"algorithm.name {path} is no file; give the path of a Python file, or one of {available()}")
    name = f"{__name__}.of_user.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where annotations are looked up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"algorithm.name {path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def build(section: Mapping[str, Any]) -> Algorithm:
    """The algorithm that an ``algorithm`` section of a configuration describes.

    Raises ConfigError when the name is missing or unknown, or when a key or value does not belong to that algorithm.
    """
    if "name" not in section:
        raise ConfigError(f"the configuration needs algorithm.name; known: {', '.join(available())}")
    kind = load(section["name"])
    return kind(config.build(kind.Config, {**section, "name": kind.name}, where="algorithm"))
