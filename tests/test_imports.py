"""The layers: imports point down only, and each layer knows only what is its business."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_aligndistil"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lowest first. A module may import from the layers below its own, and from its own unless other layers share the line.
LEVELS = (
    ("errors",),
    ("config", "user_code"),
    ("backends",),
    ("ops",),
    ("data",),
    ("models", "algorithms"),
    ("engine", "suites"),
    ("commands",),
    ("__main__",),
)
LEVEL = {layer: level for level, layers in enumerate(LEVELS) for layer in layers}

# What only some layers may import. torch is missing here: commands import it late (see below), the rest when they want.
BUSINESS = {
    "megatron": {"engine", "backends"},
    "transformer_engine": {"engine", "backends"},
    "torch.distributed": {"ops", "engine", "backends", "commands"},
    "transformers": {"data"},
    "datasets": {"data"},
}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported below a node; a name taken from a package counts as its module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, "." * node.level + f"{node.module or ''}.{alias.name}"


def violations(source: str, layer: str) -> list[str]:
    """What a module of `layer` may not import, as sentences."""
    found = []
    for line, name in imports(ast.parse(source)):
        top, _, rest = name.partition(".")
        if name.startswith("."):
            found.append(f"line {line}: {name} is relative; write the whole name")
        elif top == PACKAGE.name:
            target = rest.partition(".")[0]
            if target not in LEVEL:
                continue  # the package itself, for its version
            if target != layer and LEVEL[target] >= LEVEL[layer]:
                found.append(f"line {line}: {layer} imports {target}, which is not below it")
        for module, layers in BUSINESS.items():
            if f"{name}.".startswith(f"{module}.") and layer not in layers:
                found.append(f"line {line}: only {', '.join(sorted(layers))} may import {module}")
    return found


def test_every_layer_has_its_place() -> None:
    layers = {layer_of(path) for path in MODULES} - {"__init__"}
    assert layers <= set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    layer = layer_of(path)
    if layer == "__init__":
        assert list(imports(ast.parse(path.read_text()))) == []  # setup.py and --help read it
    else:
        assert violations(path.read_text(), layer) == []


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("ops", "from megatron_aligndistil.data.batch import MicroBatch"),
        ("models", "import megatron_aligndistil.algorithms.base"),
        ("algorithms", "from megatron_aligndistil import models"),
        ("engine", "def late():\n    from megatron_aligndistil.commands import train"),
        ("errors", "from megatron_aligndistil.config import Section"),
        ("data", "import torch.distributed as dist"),
        ("algorithms", "from torch import distributed"),
        ("ops", "from megatron.core import parallel_state"),
        ("engine", "from .model import build_model"),
    ],
)
def test_a_wrong_import_is_seen(layer: str, source: str) -> None:
    assert len(violations(source, layer)) == 1


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("algorithms", "from megatron_aligndistil.data.batch import Responses"),
        ("engine", "from megatron_aligndistil import algorithms"),
        ("ops", "from megatron_aligndistil.ops.head import LMHead\nimport torch.distributed as dist"),
        ("config", "from megatron_aligndistil.errors import ConfigError"),
    ],
)
def test_a_right_import_passes(layer: str, source: str) -> None:
    assert violations(source, layer) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_cuda_is_the_business_of_backends_and_engine(path: Path) -> None:
    """Commands may ask how many GPUs there are. Everything else takes the device that its tensors are on."""
    if layer_of(path) in ("backends", "engine", "commands"):
        return
    assert re.findall(r"torch\.cuda|\.cuda\(|device=\"cuda|is_cuda", path.read_text()) == []


LIGHT = [path for path in MODULES if layer_of(path) in ("commands", "__main__", "config", "errors")]


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_help_waits_for_nothing_heavy(path: Path) -> None:
    """What ``--help`` imports brings in torch only inside functions."""
    tree = ast.parse(path.read_text())
    at_top = [name for node in tree.body for _, name in imports(node) if not isinstance(node, ast.FunctionDef)]
    heavy = ["torch", "megatron.", "matplotlib", *(f"{PACKAGE.name}.{layer}" for layer in ("engine", "ops", "data"))]
    assert [name for name in at_top if name.startswith(tuple(heavy))] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_stays_readable_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
