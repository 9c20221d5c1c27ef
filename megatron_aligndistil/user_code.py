"""Python of the user's own that a configuration names: algorithms and reward functions."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from megatron_aligndistil.errors import ConfigError


def import_module(place: str, key: str) -> ModuleType:
    """The module that `place` means: the path of a `.py` file, whose own folder is searched for what it imports, or a
    dotted name.

    Raises ConfigError, naming the configuration's `key`, where there is no such file or it cannot be imported.
    """
    path = Path(place).expanduser().resolve()
    from_file = place.endswith(".py")
    if from_file and not path.is_file():
        raise ConfigError(f"{key}: there is no file {place}; give the path of a Python file")
    try:
        if not from_file:
            return importlib.import_module(place)
        folder = str(path.parent)
        if folder not in sys.path:
            sys.path.append(folder)
        spec = importlib.util.spec_from_file_location(f"user_code_{path.stem}", path)
        assert spec is not None and spec.loader is not None, "the name of a Python file"
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # as for every import: annotations and dataclasses are looked up there
        spec.loader.exec_module(module)
        return module
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(f"{key}: {place} cannot be imported: {told(error)}") from error


def told(error: Exception) -> str:
    """An error of the user's code in one line, with the place that raised it."""
    text = (str(error).strip() or "no message").splitlines()[0]
    ours = str(Path(__file__).parent)
    theirs = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((ours, "<")) and frame.filename != importlib.__file__
    ]
    where = f" ({theirs[-1].filename} line {theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}: {text}{where}"
