"""Checkpoints: Megatron's distributed format for training, and finding out what a path holds.

A checkpoint folder ``step_000100`` holds one distributed checkpoint a trained model, ``<name>/``, and
``progress.json``. Inside ``<name>/``, ``hf/`` keeps config.json and the tokenizer, so that the folder alone says what
the model is, and ``manifest.json`` the checksums of all else. Nothing else has state: batches are a function of the
seed and the step, samples of the seed, the step and the weights, and no layer draws random numbers.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint import CheckpointException

from megatron_aligndistil.engine import kept, manifest
from megatron_aligndistil.engine.hf import draw_score, load_weights
from megatron_aligndistil.engine.optimiser import Trained
from megatron_aligndistil.engine.parallel import Parallel, on_first_rank
from megatron_aligndistil.engine.snapshot import Snapshot
from megatron_aligndistil.engine.weights_only import check_common, read_metadata, weights_only
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models.architecture import Architecture, require_same
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

    A scalar model may take its body from a language model: its one row is then drawn from `seed`. A distributed
    checkpoint's files are compared with their checksums first. Raises CheckpointError on every rank alike.
    """
    if not is_distributed(path):
        load_weights(chunks, path, arch, parallel, seed)
        return
    there = read_architecture(path, "any")
    require_same({"the model": arch, str(path): there})
    manifest.check([Path(path)])
    sharded = _sharded_model(chunks)
    drawn = there.head != arch.head
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
        backend = json.loads((path / "metadata.json").read_text(encoding="utf-8"))["sharded_backend"]
        if backend != "torch_dist":
            raise CheckpointError(f"{path} has Megatron's format {backend!r}, and only torch_dist can be read")
        read_metadata(path)
        check_common(path)
        # Some of Megatron's optimiser states are leaves with gradient, which must not be written in place.
        with torch.no_grad(), weights_only():
            return dist_checkpointing.load(sharded, str(path))
    except (Exception, CheckpointException) as error:
        # torch gathers what every rank has to say, in an exception that is no Exception; the first is enough.
        failures = error.failures if isinstance(error, CheckpointException) else {}
        reason = next(iter(failures.values()))[0] if failures else error
        if isinstance(reason, CheckpointError):
            raise CheckpointError(f"{path} does not fit the model: {reason}") from error
        raise manifest.DamagedCheckpoint(f"{path} cannot be read: {reason}") from error


def save_model(chunks: Sequence[torch.nn.Module], path: Path, source: str | Path, arch: Architecture) -> None:
    """Save a model without optimiser in the distributed format, with the description found at `source`."""
    on_first_rank(partial(path.mkdir, parents=True, exist_ok=True))
    describe = partial(_describe, description_folder(source), arch, chunks)
    snapshot = Snapshot(_sharded_model(chunks), path, describe, copy=False)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, snapshot.write())
    on_first_rank(lambda: snapshot.finish(parts))


def _describe(description: Path, arch: Architecture, chunks: Sequence[torch.nn.Module], target: Path) -> None:
    """Write config.json and the tokenizer into `target`."""
    copy_companions(description, target, arch, next(unwrap_model(chunks[0]).parameters()).dtype)


def take_snapshot(item: Trained, folder: Path, source: str) -> Snapshot:
    """Everything of one model under training that is needed to go on, copied as it is now, to be written to `folder`.

    `source` is the checkpoint that has its description. Collectives: those of Megatron, which gathers the states of its
    distributed optimiser on the first data parallel rank, and of :class:`Snapshot`.
    """
    sharded = _training_state(item)
    return Snapshot(sharded, folder, partial(_describe, description_folder(source), item.model.arch, item.model.chunks))


def _training_state(item: Trained, is_loading: bool = False) -> dict[str, Any]:
    item.prepare_states()
    sharded = _sharded_model(item.model.chunks)
    with _short_collections():
        sharded["optimizer"] = item.optimizer.sharded_state_dict(
            sharded, is_loading=is_loading, metadata=_OPTIMIZER_FORMAT
        )
    sharded["scheduler"] = item.scheduler.state_dict()
    if not is_loading:
        sharded["skips"] = item.skips.state()
    return sharded


@contextmanager
def _short_collections() -> Iterator[None]:
    """Inside, Python's collector passes over what is there already.

    Megatron-Core 0.16.1 runs it for every state dict; with all of torch to walk it takes most of the time of a save.
    """
    frozen_before = gc.get_freeze_count() > 0
    if not frozen_before:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen_before:
            gc.unfreeze()


def resume_training(checkpoint: Path, trained: Sequence[Trained]) -> dict[str, Any]:
    """Load models, optimisers and schedules saved under any layout; returns what ``progress.json`` says.

    Raises CheckpointError on every rank alike, where a file is damaged with the older checkpoint that can be used.
    """
    try:
        progress = on_first_rank(kept.read_progress, checkpoint)
        manifest.check([checkpoint / item.name for item in trained])
        for item in trained:
            _resume(checkpoint / item.name, item)
    except manifest.DamagedCheckpoint as error:
        older = kept.latest(checkpoint.parent, before=checkpoint)
        rest = f"go on from {older}" if older else "begin again; there is no older checkpoint"
        raise CheckpointError(f"{error}; delete {checkpoint} to {rest}") from error
    return progress


def _resume(path: Path, item: Trained) -> None:
    require_same({f"the model {item.name}": item.model.arch, str(path): read_architecture(path, "any")})
    loaded = _load(_training_state(item, is_loading=True), path)
    for index, chunk in enumerate(item.model.chunks):
        _fill(chunk, loaded[f"model{index}"])
    item.load_optimizer(loaded["optimizer"])
    item.load_scheduler(loaded["scheduler"])
    item.skips.load(loaded.get("skips"))
