"""Rewards from a Python function that the configuration names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.user_code import import_module, told


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
    function = getattr(import_module(place, f"rollout.reward '{name}'"), attribute, None)
    if not callable(function):
        raise ConfigError(f"rollout.reward '{name}': {place} has no function {attribute}")
    return function


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
        raise ConfigError(f"the reward function {name} failed: {told(error)}") from error
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
