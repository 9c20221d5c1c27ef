"""The folder of a run: its resolved configuration, and whose run it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_aligndistil.algorithms.base import Algorithm
from megatron_aligndistil.config import TrainConfig, write_yaml
from megatron_aligndistil.errors import ConfigError

# Settings that may differ between a run and its continuation.
_MAY_CHANGE = {("run", key) for key in ("log_every", "eval_every", "save_every", "keep", "wandb", "recompute")}
_MAY_CHANGE |= {("parallel", key) for key in ("tp", "pp", "vpp", "sequence_parallel")} | {("batch", "micro_size")}


def check_free(folder: Path, config: TrainConfig, algorithm: Algorithm) -> None:
    """Raise ConfigError when the folder belongs to a different run."""
    path = folder / "config.yaml"
    if path.is_file():
        changed = _changes(yaml.safe_load(path.read_text(encoding="utf-8")), _resolved(config, algorithm))
        if changed:
            raise ConfigError(
                f"{folder} holds a run with another configuration ({', '.join(changed)}); "
                "choose another run.dir, or delete that folder"
            )


def claim(folder: Path, config: TrainConfig, algorithm: Algorithm) -> None:
    """Write the resolved configuration, which makes the folder this run's."""
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(_resolved(config, algorithm), folder / "config.yaml")


def _resolved(config: TrainConfig, algorithm: Algorithm) -> dict[str, Any]:
    return config.model_dump(mode="json") | {"algorithm": algorithm.config.model_dump(mode="json")}


def is_complete(folder: Path, algorithm: Algorithm) -> bool:
    """Whether every model of the run has been exported."""
    return all((folder / name / "config.json").is_file() for name in algorithm.trained)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    changed = []
    for section in new:
        for key in new[section]:
            before, after = (old.get(section) or {}).get(key), new[section][key]
            if before != after and (section, key) not in _MAY_CHANGE:
                changed.append(f"{section}.{key}: {before} there, {after} here")
    return changed
