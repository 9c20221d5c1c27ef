"""``aligndistil pipeline``: a YAML file of stages, run one after another in the same processes, each once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml
from pydantic import Field

from megatron_aligndistil import algorithms
from megatron_aligndistil.commands import convert, evaluate, generate, inspect
from megatron_aligndistil.commands.launch import JOB_VARIABLES
from megatron_aligndistil.commands.options import describe, parse, processes_for, run_on_processes, take, wants_help
from megatron_aligndistil.config import Section, TrainConfig, build, merge, read_yaml
from megatron_aligndistil.errors import AlignDistilError, ConfigError

_USAGE = """usage: aligndistil pipeline --config FILE [--nproc N] [--vars.NAME VALUE ...]

Runs the stages of FILE in order. A stage is a name and one of: train, generate, evaluate, inspect, convert (with the
keys of that command) or script (a Python file and its arguments); `include: FILE` stands for another file's stages.
${NAME} stands for a value of `vars`, ${dir} for the pipeline's folder. `defaults` is laid under every stage. Stages
that are done are skipped, unless their settings or an earlier stage changed.
"""


class PipelineConfig(Section):
    dir: str
    """Folder of the pipeline; ${dir} in stages."""
    vars: dict[str, str | int | float] = {}
    """Values for ${NAME} in stages; they may use ${dir}."""
    processes: int | None = Field(None, ge=1)
    """Processes to start without torchrun; one a GPU, else the largest tp x pp, when not given."""
    defaults: dict[str, Any] = {}
    """Sections laid under every stage that has them, such as `parallel` or `precision`."""
    stages: list[dict[str, Any]]
    """The stages in order."""


@dataclass(frozen=True)
class Stage:
    """One stage with its settings checked."""

    name: str
    kind: str
    settings: Any
    fingerprint: str


_SCHEMAS: dict[str, type[Section]] = {
    "train": TrainConfig,
    "generate": generate.GenerateConfig,
    "evaluate": evaluate.EvaluateConfig,
    "inspect": inspect.InspectConfig,
    "convert": convert.ConvertConfig,
}


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if wants_help(arguments):
        print(_USAGE + "\nkeys:\n" + describe(PipelineConfig))
        return 0
    nproc, rest = take(arguments, "--nproc")
    config = parse(PipelineConfig, rest)
    stages = read_stages(config)
    if nproc is None and config.processes:
        nproc = str(config.processes)
    layouts = [stage.settings.parallel for stage in stages if stage.kind != "script"]
    largest = max((layout.tp * layout.pp for layout in layouts), default=1)
    return run_on_processes("pipeline", rest, nproc, lambda: processes_for(largest), lambda: _run_all(config, stages))


def read_stages(config: PipelineConfig) -> list[Stage]:
    """Every stage with variables filled in, checked before any work. Raises ConfigError naming the stage."""
    values = {name: Template(str(value)).safe_substitute(dir=config.dir) for name, value in config.vars.items()}
    values["dir"] = config.dir
    stages: list[Stage] = []
    fingerprint = ""
    for number, raw in enumerate(_included(config.stages), 1):
        name = str(raw.get("name", ""))
        kinds = [key for key in raw if key != "name"]
        if not name or len(kinds) != 1 or kinds[0] not in {*_SCHEMAS, "script"}:
            raise ConfigError(
                f"stage {number} ({name or 'unnamed'}) needs a name and one of {', '.join(_SCHEMAS)}, script"
            )
        if name in {stage.name for stage in stages}:
            raise ConfigError(f"two stages are called {name}; what is done is kept by name, so give each its own")
        kind = kinds[0]
        filled = _fill(raw[kind], values, name)
        fingerprint = hashlib.sha256(
            (fingerprint + yaml.safe_dump([kind, filled, config.defaults])).encode()
        ).hexdigest()
        stages.append(Stage(name, kind, _settings(kind, filled, config.defaults, name), fingerprint))
    return stages


def _included(stages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The stages, with those of another file in the place of each `include: FILE`."""
    for stage in stages:
        if list(stage) == ["include"]:
            yield from _included(read_yaml(stage["include"]).get("stages") or [])
        else:
            yield stage


def _fill(value: Any, values: dict[str, Any], stage: str) -> Any:
    if isinstance(value, dict):
        return {key: _fill(item, values, stage) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, values, stage) for item in value]
    if isinstance(value, str):
        try:
            return Template(value).substitute(values)
        except KeyError as error:
            raise ConfigError(
                f"stage {stage} uses ${{{error.args[0]}}}, which vars does not have; set --vars.{error.args[0]}"
            ) from None
        except ValueError:
            raise ConfigError(f"stage {stage}: '{value}' has a $ that no ${{NAME}} follows; write $$ for $") from None
    return value


def _settings(kind: str, filled: Any, defaults: dict[str, Any], name: str) -> Any:
    if kind == "script":
        if not isinstance(filled, list) or not filled:
            raise ConfigError(f"stage {name}: script is a list, the Python file and its arguments")
        return [str(part) for part in filled]
    schema = _SCHEMAS[kind]
    under = {key: value for key, value in defaults.items() if key in schema.model_fields}
    try:
        settings = build(schema, merge(under, filled or {}))
        if isinstance(settings, TrainConfig):
            algorithms.build(settings.algorithm)
        elif isinstance(settings, evaluate.EvaluateConfig):
            evaluate.check(settings)
        elif isinstance(settings, inspect.InspectConfig):
            inspect.check(settings)
    except ConfigError as error:
        raise ConfigError(f"stage {name}: {error}") from None
    return settings


def _run_all(config: PipelineConfig, stages: list[Stage]) -> None:
    import torch.distributed as dist

    from megatron_aligndistil.engine.parallel import on_first_rank, process_group

    record = Path(config.dir) / "pipeline.json"
    with process_group():
        done: dict[str, str] = on_first_rank(_read_record, record)
        _refuse_stale(stages, done)
        for number, stage in enumerate(stages, 1):
            title = f"[{number}/{len(stages)}] {stage.name}"
            if done.get(stage.name) == stage.fingerprint:
                _say(f"{title}: done before")
                continue
            _say(f"{title}: {stage.kind}")
            done[stage.name] = _begun(stage)
            on_first_rank(_write_record, record, done)
            began = time.monotonic()
            if stage.kind == "script":
                on_first_rank(_run_script, stage)
            else:
                _WORK[stage.kind](stage.settings)
            dist.barrier()
            done[stage.name] = stage.fingerprint
            on_first_rank(_write_record, record, done)
            _say(f"{title}: done in {time.monotonic() - began:.0f} s")


def _begun(stage: Stage) -> str:
    """What the record says of a stage that is under way, or was cut short."""
    return f"begun {stage.fingerprint}"


def _refuse_stale(stages: list[Stage], done: dict[str, str]) -> None:
    """Raise ConfigError where a model is there that other settings or inputs made: it is not ours to delete."""
    stale = [
        stage.settings.run.dir
        for stage in stages
        if stage.kind == "train" and done.get(stage.name) not in (None, _begun(stage), stage.fingerprint)
    ]
    folders = [folder for folder in stale if Path(folder).exists()]
    if folders:
        raise ConfigError(
            f"the settings of a stage have changed, and {', '.join(folders)} came from the old ones; "
            "delete what is to be trained again, or give the pipeline another dir"
        )


def _train(config: TrainConfig) -> None:
    from megatron_aligndistil.engine.trainer import train

    train(config)


_WORK: dict[str, Callable[[Any], None]] = {
    "train": _train,
    "generate": generate.generate,
    "evaluate": evaluate.evaluate,
    "inspect": inspect.inspect,
    "convert": convert.convert,
}


def _run_script(stage: Stage) -> None:
    # The script is a job of its own: with these variables it would wait for processes that are not there.
    environment = {key: value for key, value in os.environ.items() if key not in JOB_VARIABLES}
    code = subprocess.run([sys.executable, *stage.settings], env=environment, check=False).returncode
    if code:
        raise AlignDistilError(f"stage {stage.name}: {' '.join(stage.settings)} ended with exit code {code}")


def _read_record(path: Path) -> dict[str, str]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _write_record(path: Path, done: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(done, indent=2))


def _say(text: str) -> None:
    import torch.distributed as dist

    if dist.get_rank() == 0:
        print(text, flush=True)
