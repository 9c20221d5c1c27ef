"""Gradients as the optimiser gets them equal a dense fp64 reference's, tensor by tensor, under every layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil import algorithms
from megatron_aligndistil.config import DataConfig, OptimConfig, ParallelConfig, PrecisionConfig
from megatron_aligndistil.data.dataset import load_dataset
from megatron_aligndistil.data.loader import GlobalBatches
from megatron_aligndistil.data.tokenizer import load_tokenizer
from megatron_aligndistil.engine.checkpoint import load_model, read_architecture
from megatron_aligndistil.engine.hf import global_parameters
from megatron_aligndistil.engine.model import build_model
from megatron_aligndistil.engine.optimiser import make_trained
from megatron_aligndistil.engine.parallel import Parallel, parallel_session
from megatron_aligndistil.engine.schedule import Model, frozen_outputs, losses
from megatron_aligndistil.models import mapping
from megatron_aligndistil.models.architecture import Architecture
from tests.engine import dense
from tests.engine.tiny import make_checkpoint
from tests.models.tiny import MODELS

DISTIL: dict[str, Any] = {"teacher": "adaptive", "beta0": 0.1, "beta": 0.08, "r": 10.0, "eps": 1e-3}
COPY = "the last stage's copy of the embedding"
LAYOUTS: dict[str, tuple[int, ParallelConfig, bool]] = {
    "single": (1, ParallelConfig(), True),
    "tp2": (2, ParallelConfig(tp=2), True),
    "tp2 sp": (2, ParallelConfig(tp=2, sequence_parallel=True), True),
    "pp2": (2, ParallelConfig(pp=2), True),
    "pp2 vpp2": (2, ParallelConfig(pp=2, vpp=2), True),
    "tp2 pp2 sp": (4, ParallelConfig(tp=2, pp=2, sequence_parallel=True), True),
    "tp2 pp2 vpp2 sp": (4, ParallelConfig(tp=2, pp=2, vpp=2, sequence_parallel=True), True),
    "dp2": (2, ParallelConfig(), True),
    "dp2, plain optimiser": (2, ParallelConfig(), False),
    "dp2 pp2": (4, ParallelConfig(pp=2), True),
}


def gradients(folder: str, layout: ParallelConfig, distributed: bool) -> dict[str, Tensor]:
    """This stage's gradients after one AlignDistil step's backward, whole, under transformers' names."""
    with parallel_session(layout) as parallel:
        arch = read_architecture(f"{folder}/policy")

        def load(name: str) -> list[torch.nn.Module]:
            chunks = build_model(arch, parallel, PrecisionConfig(dtype="fp32"))
            load_model(chunks, f"{folder}/{name}", arch, parallel)
            return list(chunks)

        dataset, _ = load_dataset(
            DataConfig(train=f"{folder}/pairs.jsonl"),
            f"{folder}/pairs.jsonl",
            load_tokenizer(f"{folder}/policy"),
            "responses",
        )
        batches = GlobalBatches(
            dataset,
            global_size=len(dataset),
            micro_size=2,
            pad_id=0,
            dp_rank=parallel.dp_rank,
            dp_size=parallel.dp,
            pad_multiple=parallel.tp,
        ).at(0)
        algorithm = algorithms.build({"name": "aligndistil", **DISTIL})
        frozen = {
            name: frozen_outputs(Model(load(name), arch), need, batches, parallel)
            for name, need in algorithm.frozen.items()
        }
        given = [{name: outputs[index] for name, outputs in frozen.items()} for index in range(len(batches))]
        trained = make_trained("policy", load("policy"), arch, OptimConfig(distributed=distributed), 1, parallel)
        trained.zero_grad()
        losses(trained.model, partial(algorithm.loss, "policy"), batches, given, parallel, backward=True)
        found = whole_gradients(trained.model.chunks, arch, parallel, distributed)
        trained.release()
        return found


def whole_gradients(chunks, arch: Architecture, parallel: Parallel, distributed: bool) -> dict[str, Tensor]:
    """The gradient buffers of this stage, gathered over data parallel (each rank has reduced its part) and TP ranks."""
    if distributed:
        for bucket in (bucket for chunk in chunks for group in chunk.bucket_groups for bucket in group.buckets):
            mine = bucket.grad_data.chunk(parallel.dp)[parallel.dp_rank].clone()
            dist.all_gather_into_tensor(bucket.grad_data, mine, group=parallel.dp_group)
    found: dict[str, Tensor] = {}
    for name, parameter in global_parameters(chunks):
        gradient = parameter.main_grad.contiguous()
        shards = [torch.empty_like(gradient) for _ in range(parallel.tp)]
        dist.all_gather(shards, gradient, group=parallel.tp_group)
        if mapping.is_replicated(name, arch):
            assert all(torch.equal(shard, shards[0]) for shard in shards), f"{name} differs between TP ranks"
        if mapping.is_copy(name, arch):
            found[COPY] = torch.cat(shards)[: arch.vocab_size]
        found |= mapping.write_full(name, arch, shards)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for architecture in ("qwen2-tied", "llama-untied", "qwen3-tied"):
        folder = found[architecture] = tmp_path_factory.mktemp(architecture)
        for seed, name in enumerate(("policy", "dpo", "reverse")):
            make_checkpoint(architecture, folder / name, seed=seed)
        dense.write_pairs(folder / "pairs.jsonl", MODELS[architecture]["vocab_size"])
    return found


@pytest.fixture(scope="module")
def expected(folders) -> dict[str, dict[str, Tensor]]:
    """The reference's gradients by architecture."""
    found = {}
    for architecture, folder in folders.items():
        records = dense.read_pairs(folder / "pairs.jsonl")
        models = {name: dense.load(folder / name) for name in ("policy", "dpo", "reverse")}
        dense.aligndistil(models, records, **DISTIL).backward()
        found[architecture] = {name: p.grad for name, p in models["policy"].named_parameters()}
    return found


# Norms of queries and keys are whole on every tensor parallel rank, and each rank uses them on heads of its own.
RUNS = [(architecture, layout) for architecture in ("qwen2-tied", "llama-untied") for layout in LAYOUTS]
RUNS += [("qwen3-tied", layout) for layout in ("tp2", "tp2 pp2 sp")]


@pytest.mark.parametrize(("architecture", "layout"), RUNS)
def test_gradients(workers, folders, expected, architecture: str, layout: str) -> None:
    world_size, config, distributed = LAYOUTS[layout]
    ranks = workers.run(world_size, gradients, str(folders[architecture]), config, distributed)
    names = {name for rank in ranks for name in rank} - {COPY}
    assert names == expected[architecture].keys()
    has_copy = architecture.endswith("-tied") and config.pp > 1
    assert any(COPY in rank for rank in ranks) == has_copy
    for rank in ranks:
        for name, gradient in rank.items():
            true = expected[architecture]["model.embed_tokens.weight" if name == COPY else name]
            error = (gradient.double() - true).norm() / true.norm()
            assert error < 2e-5, f"{name}: relative error {error:.1e}"
