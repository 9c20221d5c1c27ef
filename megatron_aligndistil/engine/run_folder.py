"""The folder of a run: its resolved configuration, and whose run it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_aligndistil.algorithms.base import Algorithm
from megatron_aligndistil.config import TrainConfig, write_yaml
from megatron_aligndistil.errors import ConfigError

# Settings that may differ between a run and its continuation.
_MAY_CHANGE = {("run", key) for key in ("log_every", "eval_every", "save_every", "keep", "best", "wandb", "recompute")}
_MAY_CHANGE |= {("run", "max_skipped"), ("run", "hang_timeout")}
_MAY_CHANGE |= {("parallel", key) for key in ("tp", "pp", "vpp", "sequence_parallel")}
_MAY_CHANGE |= {("data", key) for key in ("cache", "workers")}
_MAY_CHANGE |= {("batch", key) for key in ("micro_size", "max_tokens")}


def check_free(folder: Path, config: TrainConfig, algorithm: Algorithm) -> None:
    """Raise ConfigError when the folder belongs to a different run, or nothing can be written there."""
    path = folder / "config.yaml"
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"run.dir {folder} cannot be written to: {there} is not a folder that may be; choose another")
    if path.is_file():
        changed = _changes(yaml.safe_load(path.read_text(encoding="utf-8")), _resolved(config, algorithm))
        if changed:
            raise ConfigError(
                f"{folder} holds a run with another configuration ({', '.join(changed)}); "
                "choose another run.dir, or delete that folder"
            )


def claim(folder: Path, config: TrainConfig, algorithm: Algorithm) -> None:
    """Write the resolved configuration, which makes the folder this run's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_yaml(_resolved(config, algorithm), folder / "config.yaml")
    except OSError as error:
        raise ConfigError(f"run.dir {folder} cannot be written to: {error.strerror}; choose another") from error


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
