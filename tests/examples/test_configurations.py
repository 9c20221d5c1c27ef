"""Every configuration under examples/ loads; what is in examples/launch is no configuration (test_launches.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_aligndistil import algorithms
from megatron_aligndistil.commands.pipeline import PipelineConfig, read_stages
from megatron_aligndistil.config import TrainConfig, build, read_yaml

ROOT = Path(__file__).parents[2]
PATHS = [path for path in sorted((ROOT / "examples").glob("**/*.yaml")) if path.parent.name != "launch"]
FILES = {str(path.relative_to(ROOT)): read_yaml(path) for path in PATHS}
PIPELINES = [name for name, content in FILES.items() if "dir" in content and "stages" in content]
RUNS = [name for name, content in FILES.items() if "algorithm" in content]


def included(stages: list[dict[str, Any]]) -> Iterator[str]:
    """The files that stages include, directly or not."""
    for stage in stages:
        if "include" in stage:
            yield stage["include"]
            yield from included(FILES[stage["include"]]["stages"])


@pytest.mark.parametrize("name", [*PIPELINES, *RUNS])
def test_configuration_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where a user starts them: paths of included files and scripts begin there
    if name in RUNS:
        algorithms.build(build(TrainConfig, FILES[name]).algorithm)
        return
    stages = read_stages(build(PipelineConfig, FILES[name]))
    assert len(stages) >= 3
    for stage in stages:
        if stage.kind == "script":
            assert (ROOT / stage.settings[0]).is_file(), f"{stage.name} runs {stage.settings[0]}"


def test_every_file_is_of_a_kind_that_is_checked() -> None:
    """A file is a pipeline, a training configuration, part of a pipeline, or what a script of a pipeline reads."""
    parts = {part for name in PIPELINES for part in included(FILES[name]["stages"])}
    scripts = [str(stage.get("script")) for name in [*PIPELINES, *parts] for stage in FILES[name]["stages"]]
    read_by_scripts = {name for name in FILES if any(name in script for script in scripts)}
    assert PIPELINES and set(FILES) <= {*PIPELINES, *RUNS, *parts, *read_by_scripts}
