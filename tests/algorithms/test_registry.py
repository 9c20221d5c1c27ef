"""Algorithms by name, and what a wrong configuration is told."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_aligndistil import algorithms
from megatron_aligndistil.errors import ConfigError


def test_every_algorithm_loads_and_its_configuration_round_trips() -> None:
    assert {"aligndistil", "dpo", "sft"} <= set(algorithms.available())
    for name in algorithms.available():
        algorithm = algorithms.build({"name": name})
        assert algorithm.name == name
        resolved = algorithm.config.model_dump(mode="json")
        assert resolved["name"] == name
        assert algorithms.build(resolved).config == algorithm.config


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, r"needs algorithm\.name; known: aligndistil, dpo"),
        ({"name": "aligndistill"}, r"unknown algorithm\.name 'aligndistill'; did you mean aligndistil\?"),
        ({"name": "zzz"}, r"unknown algorithm\.name 'zzz'; known: aligndistil"),
        ({"name": "base"}, r"unknown algorithm\.name 'base'"),
        ({"name": "_pairs"}, r"unknown algorithm\.name '_pairs'"),
        ({"name": 3}, r"unknown algorithm\.name '3'"),
        ({"name": "dpo", "betta": 0.2}, r"algorithm\.betta; did you mean algorithm\.beta\?"),
        ({"name": "dpo", "beta": -1}, r"algorithm\.beta = -1"),
        ({"name": "aligndistil", "eps": 0}, r"algorithm\.eps = 0"),
    ],
)
def test_wrong_sections_get_one_sentence(section: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        algorithms.build(section)


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; from megatron_aligndistil import algorithms; print(algorithms.available()); "
        "raise SystemExit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
