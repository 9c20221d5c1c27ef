"""Checkpoints: Megatron's distributed format for training, and finding out what a path holds.

A checkpoint folder ``step_000100`` holds one distributed checkpoint a trained model, ``<name>/``, and
``progress.json``. Inside ``<name>/``, ``hf/`` keeps config.json and the tokenizer, so that the folder alone says what
the model is. A folder that is being written is called ``step_000100.partial`` and is renamed when it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model

from megatron_aligndistil.engine.hf import draw_score, load_weights
from megatron_aligndistil.engine.optimiser import Trained
from megatron_aligndistil.engine.parallel import Parallel, on_first_rank
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.hf_folder import copy_companions

# Every parameter's optimiser state is saved by itself, so that a checkpoint loads under any layout.
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}

_OUTPUT = "output_layer.weight"


def is_distributed(path: str | Path) -> bool:
    """Whether `path` is a model in Megatron's distributed format."""
    return (Path(path) / "metadata.json").is_file()


def description_folder(path: str | Path) -> Path:
    """The folder with config.json and tokenizer of a checkpoint in either format."""
    path = Path(path)
    if is_distributed(path):
        return path / "hf"
    if (path / "config.json").is_file():
        return path
    if not path.exists():
        raise CheckpointError(
            f"there is no checkpoint at {path}; give a Hugging Face folder or a Megatron distributed checkpoint"
        )
    inside = sorted(child.name for child in path.iterdir() if is_distributed(child)) if path.is_dir() else []
    hint = f"; it holds the models {', '.join(inside)}: name one of them" if inside else ""
    raise CheckpointError(f"{path} is no checkpoint: it has neither config.json nor metadata.json{hint}")


def read_architecture(path: str | Path, expects: Literal["lm", "scalar", "any"] = "lm") -> Architecture:
    """The architecture of a checkpoint in either format.

    Raises CheckpointError where the model does not end in what the caller `expects`: an output layer over the
    vocabulary, or one row.
    """
    arch = Architecture.from_folder(description_folder(path))
    if expects == "lm" and arch.head == "scalar":
        raise CheckpointError(
            f"{path} is a reward model (sequence classification), and a language model is needed in its place"
        )
    if expects == "scalar" and arch.head == "lm":
        raise CheckpointError(
            f"{path} is a language model, and a reward model (sequence classification with one label) is needed in its "
            f"place; `algorithm.name: reward` trains one"
        )
    return arch


def _sharded_model(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    # Chunks of one stage hold different layers of one model; their keys carry global layer numbers. Extra states (FP8
    # scales, which the first steps find again) are left out: Megatron's layers and Transformer Engine's do not have the
    # same ones, and a checkpoint saved with one loads with the other.
    return {
        f"model{index}": {
            key: value
            for key, value in unwrap_model(chunk).sharded_state_dict().items()
            if not key.endswith("_extra_state")
        }
        for index, chunk in enumerate(chunks)
    }


def load_model(
    chunks: Sequence[torch.nn.Module], path: str | Path, arch: Architecture, parallel: Parallel, seed: int = 0
) -> None:
    """Fill this rank's chunks from a Hugging Face folder or a distributed checkpoint saved under any layout.

    A scalar model may take its body from a language model: its one row is then drawn from `seed`.
    """
    if not is_distributed(path):
        load_weights(chunks, path, arch, parallel, seed)
        return
    sharded = _sharded_model(chunks)
    drawn = read_architecture(path, "any").head != arch.head
    if drawn:
        assert arch.head == "scalar", "who reads an architecture says what it must be"
        for state in sharded.values():
            state.pop(_OUTPUT, None)
    loaded = _load(sharded, Path(path))
    for index, chunk in enumerate(chunks):
        _fill(chunk, loaded[f"model{index}"], {_OUTPUT} if drawn else set())
    if drawn:
        draw_score(chunks, arch, parallel, seed)


def _fill(chunk: torch.nn.Module, state: dict[str, Any], left_out: set[str] | None = None) -> None:
    result = unwrap_model(chunk).load_state_dict(state, strict=False)
    missing = [
        key for key in result.missing_keys if not key.endswith("_extra_state") and key not in (left_out or set())
    ]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"the checkpoint does not fit the model: missing {missing}, unexpected {result.unexpected_keys}"
        )


def _load(sharded: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        # Some of Megatron's optimiser states are leaves with gradient, which must not be written in place.
        with torch.no_grad():
            return dist_checkpointing.load(sharded, str(path))
    except Exception as error:
        raise CheckpointError(f"cannot read the distributed checkpoint {path}: {error}") from error


def save_model(chunks: Sequence[torch.nn.Module], path: Path, source: str | Path, arch: Architecture) -> None:
    """Save a model without optimiser in the distributed format, with the description found at `source`."""
    _save(_sharded_model(chunks), path, description_folder(source), chunks, arch)


def _save(
    sharded: dict[str, Any], path: Path, description: Path, chunks: Sequence[torch.nn.Module], arch: Architecture
) -> None:
    on_first_rank(partial(path.mkdir, parents=True, exist_ok=True))
    dist_checkpointing.save(sharded, str(path))

    def describe() -> None:
        (path / "hf").mkdir(exist_ok=True)
        dtype = next(unwrap_model(chunks[0]).parameters()).dtype
        copy_companions(description, path / "hf", arch, dtype)

    on_first_rank(describe)


def save_training(
    folder: Path,
    step: int,
    trained: Sequence[Trained],
    sources: Mapping[str, str],
    keep: int,
    rollout: Any = None,
) -> Path:
    """Write ``folder/step_N``, complete or absent, with everything needed to go on; drop all but the newest `keep`.

    Arguments:
        sources: for each model, the checkpoint that has its description.
        rollout: what has been sampled for later steps, as JSON can hold it.
    """
    final = folder / f"step_{step:06d}"
    unfinished = final.with_suffix(".partial")
    on_first_rank(shutil.rmtree, unfinished, True)
    for item in trained:
        sharded = _sharded_model(item.model.chunks)
        sharded["optimizer"] = item.optimizer.sharded_state_dict(sharded, metadata=_OPTIMIZER_FORMAT)
        sharded["scheduler"] = item.scheduler.state_dict()
        description = description_folder(sources[item.name])
        _save(sharded, unfinished / item.name, description, item.model.chunks, item.model.arch)

    def publish() -> None:
        progress = {"step": step, "models": [item.name for item in trained], "rollout": rollout}
        (unfinished / "progress.json").write_text(json.dumps(progress))
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old)

    on_first_rank(publish)
    return final


def _complete(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("step_*/progress.json") if path.parent.suffix != ".partial")


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    found = _complete(folder)
    return found[-1] if found else None


def resume_training(checkpoint: Path, trained: Sequence[Trained]) -> tuple[int, Any]:
    """Load models, optimisers and schedules saved under any layout; returns the step reached and its `rollout`."""
    for item in trained:
        item.prepare_loading()
        sharded = _sharded_model(item.model.chunks)
        sharded["optimizer"] = item.optimizer.sharded_state_dict(sharded, is_loading=True, metadata=_OPTIMIZER_FORMAT)
        sharded["scheduler"] = item.scheduler.state_dict()
        loaded = _load(sharded, checkpoint / item.name)
        for index, chunk in enumerate(item.model.chunks):
            _fill(chunk, loaded[f"model{index}"])
        item.load_optimizer(loaded["optimizer"])
        item.load_scheduler(loaded["scheduler"])
    dist.barrier()
    progress = json.loads((checkpoint / "progress.json").read_text())
    return progress["step"], progress.get("rollout")
