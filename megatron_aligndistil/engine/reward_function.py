"""Rewards from a Python function that the configuration names."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_aligndistil.errors import ConfigError


@cache
def load_reward_function(name: str) -> Callable[..., Any]:
    """The function that `name` means, as in ``package.module:function`` or ``path/to/file.py:function``.

    A file's own folder is searched for what the file imports. Raises ConfigError where there is no such function, or
    its module cannot be imported.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ConfigError(
            f"rollout.reward '{name}' names no function; write module:function, or path/to/file.py:function"
        )
    function = getattr(_module(place, name), attribute, None)
    if not callable(function):
        raise ConfigError(f"rollout.reward '{name}': {place} has no function {attribute}")
    return function


def _module(place: str, name: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"rollout.reward '{name}': there is no file {place}")
        folder = str(path.parent)
        if folder not in sys.path:
            sys.path.append(folder)
        spec = importlib.util.spec_from_file_location(f"reward_function_{path.stem}", path)
        assert spec is not None and spec.loader is not None, "the name of a Python file"
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # as for every import; dataclasses, for one, look there
        spec.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(f"rollout.reward '{name}': {place} cannot be imported: {_told(error)}") from error


def rate(name: str, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """One number a completion, by the function that `name` means.

    It is called once, as ``function(prompts=[...], completions=[...])``, with lists of texts of one length, and returns
    a list of as many numbers. Raises ConfigError where it raises, or returns anything else.
    """
    function = load_reward_function(name)
    try:
        returned = function(prompts=list(prompts), completions=list(completions))
        found = list(returned) if isinstance(returned, Iterable) and not isinstance(returned, str) else None
    except Exception as error:
        raise ConfigError(f"the reward function {name} failed: {_told(error)}") from error
    if found is None or len(found) != len(completions):
        what = type(returned).__name__ if found is None else f"a list of {len(found)}"
        raise ConfigError(
            f"the reward function {name} returned {what} for {len(completions)} completions; it has to return a list "
            f"with one number each"
        )
    return [_number(value, index, name) for index, value in enumerate(found)]


def _number(value: Any, index: int, name: str) -> float:
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(
            f"the reward function {name} returned {value!r} for completion {index}; each has to be a finite number"
        )
    return number


def _told(error: Exception) -> str:
    """An error of the user's code in one line, with the place that raised it."""
    text = (str(error).strip() or "no message").splitlines()[0]
    theirs = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<") and importlib.__file__ != frame.filename
    ]
    where = f" ({theirs[-1].filename} line {theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}: {text}{where}"
