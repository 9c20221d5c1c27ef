"""Constraints for a virtual environment that stands on an installation with its own CUDA build of torch.

Prints `constraints.txt` changed so that pip replaces nothing which works already:

- what is not installed keeps its pin;
- what is installed loses its pin, so pip leaves it alone unless the project needs another version, and then puts that
  one in the virtual environment only;
- torch and numpy are held at the versions that are there, because the installation's other extensions (Transformer
  Engine, flash attention, apex) were compiled against exactly these.

Usage: python tools/held_versions.py [constraints.txt]; without the file, only the held versions.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

HELD = ("torch", "numpy")


def normalise(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_versions() -> dict[str, str]:
    """Normalised name -> version of all that this interpreter can import; of two, the one that it would import."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # leftovers of a broken removal have none
            found.setdefault(normalise(name), distribution.version)
    return found


def held(lines: Iterable[str], installed: Mapping[str, str]) -> list[str]:
    """The lines of a constraints file as they should read beside the `installed` versions."""
    kept = []
    for line in lines:
        name, pinned, _ = line.partition("==")
        if pinned and normalise(name) in installed:
            continue
        kept.append(line)
    return kept + [f"{name}=={installed[name]}" for name in HELD if name in installed]


if __name__ == "__main__":
    pins = [line for path in sys.argv[1:] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    print("\n".join(held(pins, installed_versions())))
