"""The trainer's first step is that of a dense fp64 reference: loss, gradient norm, and every exported weight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_aligndistil.config import merge
from tests.engine import dense
from tests.engine.lives import run_training
from tests.engine.tiny import make_checkpoint
from tests.models.tiny import MODELS

# AdamW's first step is lr · g / (|g| + eps): with a large eps it does not blow up the rounding of tiny gradients.
OPTIM: dict[str, Any] = {
    "lr": 0.02,
    "eps": 0.01,
    "clip": 0.25,
    "betas": (0.9, 0.95),
    "weight_decay": 0.1,
    "warmup": 0.0,
    "min_lr_ratio": 1.0,
    "decay": "constant",
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
}
TEACHERS = ("adaptive", "contrastive", "vanilla", "vanilla_adaptive")
DISTIL = {"beta0": 0.1, "beta": 0.08, "r": 10.0, "eps": 1e-3}


@dataclass(frozen=True)
class Case:
    """An algorithm's configuration, its dense loss, and the name of the model that it trains."""

    algorithm: dict[str, Any]
    loss: dense.Loss
    name: str = "policy"


def distil(teacher: str, compat: bool = False) -> Case:
    algorithm = {"name": "aligndistil", "teacher": teacher, "official_compat": compat, **DISTIL}
    return Case(algorithm, partial(dense.aligndistil, teacher=teacher, compat=compat, **DISTIL))


CASES = {
    "sft": Case({"name": "sft"}, dense.sft),
    "dpo": Case(
        {"name": "dpo", "beta": 0.3},
        partial(dense.dpo, beta=0.3, winner="chosen_tokens", loser="rejected_tokens"),
        "dpo",
    ),
    "reverse dpo": Case(
        {"name": "dpo", "beta": 0.3, "direction": "reverse"},
        partial(dense.dpo, beta=0.3, winner="rejected_tokens", loser="chosen_tokens"),
        "reverse",
    ),
    **{teacher: distil(teacher) for teacher in TEACHERS},
    "adaptive, official": distil("adaptive", compat=True),
    "vanilla, official": distil("vanilla", compat=True),
}
# Every case with tied embeddings; one of each kind untied, with grouped queries and heads wider than hidden / heads.
RUNS = [("qwen2-tied", case) for case in CASES]
RUNS += [("llama-untied", case) for case in ("sft", "dpo", "adaptive", "adaptive, official")]


@dataclass(frozen=True)
class Material:
    """Four random models of one architecture and pairs to train on."""

    folder: Path
    records: list[dense.Record]

    def model(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Material]:
    found = {}
    for architecture in ("qwen2-tied", "llama-untied"):
        folder = tmp_path_factory.mktemp(architecture)
        for seed, name in enumerate(("policy", "reference", "dpo", "reverse")):
            make_checkpoint(architecture, folder / name, seed=seed)
        records = dense.write_pairs(folder / "pairs.jsonl", MODELS[architecture]["vocab_size"])
        found[architecture] = Material(folder, records)
    return found


@pytest.fixture(scope="module")
def expected(material):
    """The dense reference's first step, by architecture and case."""
    steps: dict[tuple[str, str], dense.Step] = {}

    def get(architecture: str, case: str) -> dense.Step:
        if (architecture, case) not in steps:
            given = material[architecture]
            models = {name: dense.load(given.model(name)) for name in ("policy", "reference", "dpo", "reverse")}
            steps[architecture, case] = dense.first_step(models, given.records, CASES[case].loss, OPTIM)
        return steps[architecture, case]

    return get


def configuration(given: Material, case: Case, folder: Path) -> dict[str, Any]:
    return {
        "algorithm": case.algorithm,
        "models": {name: str(given.model(name)) for name in ("policy", "reference", "dpo", "reverse")},
        "data": {"train": str(given.folder / "pairs.jsonl")},
        "batch": {"global_size": len(given.records), "micro_size": 2},
        "run": {"dir": str(folder), "steps": 1},
        "optim": OPTIM,
        "precision": {"dtype": "fp32"},
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("architecture", "case"), RUNS)
def test_first_step(workers, material, expected, tmp_path: Path, architecture: str, case: str, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    given, name = material[architecture], CASES[case].name
    values = merge(configuration(given, CASES[case], tmp_path / "run"), {"parallel": parallel})
    workers.run(world_size, run_training, values)

    step = expected(architecture, case)
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics[f"train/{name}/loss"] == pytest.approx(step.loss, rel=1e-5)
    assert metrics[f"train/{name}/grad_norm"] == pytest.approx(step.grad_norm, rel=2e-5)
    assert step.grad_norm > 1.5 * OPTIM["clip"], "clipping should be at work"

    before, after = tensors_of(given.model("policy")), tensors_of(tmp_path / "run" / name)
    assert after.keys() == before.keys() == step.weights.keys()
    for key, weight in step.weights.items():
        change, found = weight - before[key], after[key].double() - before[key].double()
        assert change.abs().max() > 0.02 * OPTIM["lr"], key
        # An exported fp32 weight is itself off by up to 6e-8 of its size.
        assert (found - change).norm() < 5e-5 * change.norm() + 6e-8 * weight.norm(), key
