"""Between Hugging Face folders and a Megatron model spread over processes: read, write, or draw its weights."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_aligndistil.engine.parallel import Parallel
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models import mapping
from megatron_aligndistil.models.architecture import Architecture, read_config, require_same
from megatron_aligndistil.models.hf_folder import INDEX_FILE, SINGLE_FILE, HFFolder, copy_companions
from megatron_aligndistil.models.layout import Shape
from megatron_aligndistil.models.safetensors_writer import SafetensorsWriter, num_bytes

_LAYERS = "decoder.layers."
# One file of an export: tensor name -> (shape, dtype).
FilePlan = dict[str, tuple[Shape, torch.dtype]]


def global_parameters(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters under names with global layer numbers (Megatron counts each chunk's layers from 0).

    Arguments:
        chunks: the model's chunks on this rank; DDP and Float16Module wrappers are looked through.
    """
    for chunk in chunks:
        model = unwrap_model(chunk)
        for name, parameter in model.named_parameters():
            if name.startswith(_LAYERS):
                local, rest = name.removeprefix(_LAYERS).split(".", 1)
                name = f"{_LAYERS}{model.decoder.layers[int(local)].layer_number - 1}.{rest}"
            yield name, parameter


def stored_dtype(path: str | Path) -> Literal["fp32", "bf16", "fp16"]:
    """The `precision.dtype` that holds a checkpoint's weights exactly: their own where all share one, else fp32.

    Arguments:
        path: a Hugging Face folder, whose files say it (config.json may be wrong), or a distributed checkpoint, whose
            description was written with it.
    """
    description = Path(path) / "hf"
    if (description / "config.json").is_file():
        config = read_config(description)
        found = {str(config.get("dtype") or config.get("torch_dtype"))}
    else:
        found = HFFolder(path).dtypes()
    if found in ({"BF16"}, {"bfloat16"}):
        return "bf16"
    return "fp16" if found in ({"F16"}, {"float16"}) else "fp32"


@torch.no_grad()
def load_weights(
    chunks: Sequence[nn.Module], folder: str | Path, arch: Architecture, parallel: Parallel, seed: int = 0
) -> None:
    """Fill this rank's parameters from a Hugging Face folder, reading only its own slices, one parameter at a time.

    A scalar model may take its body from a language model's folder: its one row is then drawn from `seed`.

    Values are cast to each parameter's dtype. The last stage's copy of a tied embedding is filled too. No collectives.
    An optimiser that already exists does not learn of it: its fp32 master weights must be reloaded.

    Raises:
        CheckpointError: the folder has no safetensors, or a tensor is missing, misshapen or not the model's; raised
            before any parameter changes, alike on every rank.
    """
    source = HFFolder(folder)
    described = Architecture.from_folder(folder)
    if described.head == arch.head:
        source.check(arch)
        _fill(chunks, arch, parallel, source.get)
        return
    assert arch.head == "scalar", "who reads an architecture says what it must be"
    source.check(replace(arch, head="lm", tied_embeddings=described.tied_embeddings))
    drawn = _drawer(arch, seed)
    _fill(chunks, arch, parallel, lambda name: drawn(name) if name == mapping.SCORE else source.get(name))


@torch.no_grad()
def draw_weights(chunks: Sequence[nn.Module], arch: Architecture, parallel: Parallel, seed: int) -> None:
    """Draw weights from scratch: norms 1, biases 0, all else normal with the architecture's standard deviation.

    Every Hugging Face tensor has a seed of its own, made of `seed` and its name, and each rank keeps its slice of it:
    the model is the same under any layout. No collectives.
    """
    _fill(chunks, arch, parallel, _drawer(arch, seed))


@torch.no_grad()
def draw_score(chunks: Sequence[nn.Module], arch: Architecture, parallel: Parallel, seed: int) -> None:
    """Draw the one row of a scalar model as :func:`draw_weights` does, and leave its body."""
    output = [pair for pair in global_parameters(chunks) if mapping.SCORE in mapping.hf_sources(pair[0], arch)]
    _fill_these(output, arch, parallel, _drawer(arch, seed))


def _drawer(arch: Architecture, seed: int) -> Callable[[str], Tensor]:
    """Hugging Face name -> the tensor that `seed` gives."""
    shapes = mapping.hf_tensors(arch)

    @lru_cache(maxsize=3)  # the fused query, key and value take their rows in turns
    def get(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.empty(shape).normal_(0.0, arch.init_std, generator=generator)

    return get


def _fill(chunks: Sequence[nn.Module], arch: Architecture, parallel: Parallel, get: Callable[[str], Any]) -> None:
    _fill_these(global_parameters(chunks), arch, parallel, get)


def _fill_these(
    parameters: Iterable[tuple[str, nn.Parameter]], arch: Architecture, parallel: Parallel, get: Callable[[str], Any]
) -> None:
    for name, parameter in parameters:
        shard = mapping.read_shard(name, arch, parallel.tp_rank, parallel.tp, get)
        assert shard.shape == parameter.shape, f"{name}: Megatron has {parameter.shape}, the mapping {shard.shape}"
        parameter.copy_(shard)


@torch.no_grad()
def save_folder(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    source_folder: str | Path,
    target_folder: str | Path,
    *,
    parallel: Parallel,
    max_shard_bytes: float = 5e9,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model as a Hugging Face folder that transformers loads; every rank must call it.

    Each pipeline stage's first rank writes its own files, one tensor at a time: nothing beyond one parameter is
    gathered anywhere. A model on one stage that fits in one file becomes `model.safetensors`, any other gets numbered
    files and an index. Written beside the target and renamed at the end: a checkpoint already there stays whole until
    then. All ranks must see one file system.

    Arguments:
        source_folder: where config.json, the tokenizer and all else that is not weights come from.
        max_shard_bytes: largest file, unless a single tensor is larger.
        dtype: of the written weights; the parameters' own when not given.

    Collectives: per parameter one gather over the tensor parallel group (first data parallel rank only); object gathers
    and barriers over all three groups.

    Raises:
        CheckpointError: the target exists and is no checkpoint, or the source describes another architecture.
    """
    source, target = Path(source_folder), Path(target_folder)
    _check_target(target)
    require_same({"the model": arch, str(source): Architecture.from_folder(source)})
    partial = target.with_name(target.name + ".partial")
    is_writer = parallel.tp_rank == 0 and parallel.dp_rank == 0
    is_first = is_writer and parallel.pp_rank == 0
    files = _plan(chunks, arch, max_shard_bytes, dtype)
    stages: list[list[FilePlan]] = [[] for _ in range(parallel.pp)]
    dist.all_gather_object(stages, files, group=parallel.pp_group)
    names = _file_names(stages)
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(parallel.pp_group)
    if parallel.dp_rank == 0:
        tensors = _tensors(chunks, arch, parallel)
        for file, plan in zip(names[parallel.pp_rank], files, strict=True):
            if not is_writer:
                break
            with SafetensorsWriter(partial / file, plan) as writer:
                for name, tensor in itertools.islice(tensors, len(plan)):
                    writer.write(name, tensor.to(plan[name][1]))
        for _ in tensors:  # where nothing is written: take part in the gathers
            pass
        dist.barrier(parallel.pp_group)
    if is_first:
        _write_index(partial, names, stages)
        copy_companions(source, partial, arch, dtype or next(iter(stages[0][0].values()))[1])
        _replace(target, partial)
    # The first rank's stage, then tensor parallel peers, then data parallel ranks: nobody returns before it is done.
    for group in (parallel.pp_group, parallel.tp_group, parallel.dp_group):
        dist.barrier(group)


def _plan(
    chunks: Sequence[nn.Module], arch: Architecture, max_shard_bytes: float, dtype: torch.dtype | None
) -> list[FilePlan]:
    """This stage's files: tensors in the order of its parameters, a new file where the next one would be too large."""
    files: list[FilePlan] = []
    size = 0
    for name, parameter in global_parameters(chunks):
        if mapping.is_copy(name, arch):
            continue
        for tensor, shape in mapping.hf_sources(name, arch).items():
            kind = dtype or parameter.dtype
            size += num_bytes(shape, kind)
            if not files or size > max_shard_bytes:
                files.append({})
                size = num_bytes(shape, kind)
            files[-1][tensor] = (shape, kind)
    return files


def _file_names(stages: list[list[FilePlan]]) -> list[list[str]]:
    """The name of every file of every stage, numbered through."""
    total = sum(map(len, stages))
    if total == 1:
        return [[SINGLE_FILE] * len(files) for files in stages]
    numbers = iter(range(1, total + 1))
    return [[f"model-{next(numbers):05d}-of-{total:05d}.safetensors" for _ in files] for files in stages]


def _tensors(chunks: Sequence[nn.Module], arch: Architecture, parallel: Parallel) -> Iterator[tuple[str, Tensor]]:
    """Gather one parameter after another; the first tensor parallel rank is given its Hugging Face tensors.

    Every tensor parallel rank must run it to its end.
    """
    for name, parameter in global_parameters(chunks):
        if mapping.is_copy(name, arch):
            continue
        value = parameter.detach()
        shards = [value] if mapping.is_replicated(name, arch) else _gather(value, parallel)
        if parallel.tp_rank == 0:
            yield from mapping.write_full(name, arch, shards).items()


def _gather(value: Tensor, parallel: Parallel) -> list[Tensor]:
    """The shards of one parameter on the tensor parallel group's first rank, in rank order; nothing elsewhere."""
    if parallel.tp == 1:
        return [value]
    value = value.contiguous()  # gloo sends storage, not strides
    shards = [torch.empty_like(value) for _ in range(parallel.tp)] if parallel.tp_rank == 0 else None
    dist.gather(value, shards, dst=dist.get_global_rank(parallel.tp_group, 0), group=parallel.tp_group)
    return shards or []


def _write_index(folder: Path, names: list[list[str]], stages: list[list[FilePlan]]) -> None:
    """The index that transformers reads, unless there is but one file."""
    if names[0] == [SINGLE_FILE]:
        return
    named = [pair for files in zip(names, stages, strict=True) for pair in zip(*files, strict=True)]
    size = sum(num_bytes(*kind) for _, plan in named for kind in plan.values())
    weight_map = {tensor: name for name, plan in named for tensor in plan}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check_target(target: Path) -> None:
    """Replacing a checkpoint is fine; replacing anything else would destroy it."""
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / "config.json").is_file())):
        raise CheckpointError(
            f"{target} exists and is not a checkpoint folder, so it is not replaced; choose another name"
        )


def _replace(target: Path, partial: Path) -> None:
    """Put the finished folder where it belongs."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
