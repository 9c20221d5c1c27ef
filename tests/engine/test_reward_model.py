"""A reward model: gradients of a dense fp64 reference, scores of transformers, a resume that changes no step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megatron_aligndistil.config import DataConfig, ParallelConfig, PrecisionConfig, merge
from megatron_aligndistil.data.dataset import load_dataset
from megatron_aligndistil.data.loader import GlobalBatches
from megatron_aligndistil.data.tokenizer import load_tokenizer
from megatron_aligndistil.engine.checkpoint import load_model, read_architecture
from megatron_aligndistil.engine.model import build_model
from megatron_aligndistil.engine.parallel import parallel_session
from megatron_aligndistil.engine.schedule import Model, frozen_outputs
from tests.engine import dense
from tests.engine.lives import run_training
from tests.engine.tiny import make_checkpoint, make_pairs
from tests.models.tiny import MODELS
from tests.parity.steps import watch_all

CENTER = 0.01
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "tp2": (2, {"parallel": {"tp": 2}}),
    "tp2 sp": (2, {"parallel": {"tp": 2, "sequence_parallel": True}}),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "pp2 vpp2": (2, {"parallel": {"pp": 2, "vpp": 2}}),
    "dp2": (2, {}),
    "dp2, plain optimiser": (2, {"optim": {"distributed": False}}),
    "tp2 pp2 sp": (4, {"parallel": {"tp": 2, "pp": 2, "sequence_parallel": True}}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each architecture a language model, a reward model, and pairs; the tied one's rows end in any token."""
    found = {}
    for name in ("qwen2-tied", "llama-untied"):
        folder = found[name] = tmp_path_factory.mktemp(name)
        make_checkpoint(name, folder / "policy")
        make_checkpoint(name, folder / "reward", seed=1, scalar=True)
        dense.write_pairs(folder / "pairs.jsonl", MODELS[name]["vocab_size"])
        make_pairs(folder / "more.jsonl", 8, MODELS[name]["vocab_size"])
    return found


def configuration(folder: Path, **models: str) -> dict[str, Any]:
    return {
        "algorithm": {"name": "reward", "center": CENTER},
        "models": {"policy": str(folder / "policy")} | {name: str(folder / path) for name, path in models.items()},
        "data": {"train": str(folder / "pairs.jsonl")},
        "batch": {"global_size": 8, "micro_size": 2},
        "precision": {"dtype": "fp32"},
    }


@pytest.fixture(scope="module")
def expected(folders) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """The reference's loss and gradients by architecture."""
    found = {}
    for name, folder in folders.items():
        model = dense.load(folder / "reward", AutoModelForSequenceClassification)
        loss = dense.reward({"policy": model}, dense.read_pairs(folder / "pairs.jsonl"), center=CENTER)
        loss.backward()
        found[name] = loss.item(), {key: parameter.grad for key, parameter in model.named_parameters()}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ["qwen2-tied", "llama-untied"])
def test_gradients(workers, folders, expected, architecture: str, layout: str) -> None:
    world_size, changes = LAYOUTS[layout]
    values = merge(configuration(folders[architecture], reward="reward"), changes)
    steps = [rank[0]["reward"] for rank in workers.run(world_size, watch_all, [values])]
    loss, gradients = expected[architecture]
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert {name for step in steps for name in step.grads} == gradients.keys()
    for step in steps:
        for name, gradient in step.grads.items():
            error = (gradient.double() - gradients[name]).norm() / gradients[name].norm()
            assert error < 2e-5, f"{name}: relative error {error:.1e}"
        assert step.metrics["grad_norm"] == pytest.approx(norm, rel=2e-5)
    assert [step.metrics["loss"] for step in steps if "loss" in step.metrics][0] == pytest.approx(loss, rel=1e-5)


def scores_of(folder: str, data: str, layout: ParallelConfig) -> list[float]:
    """Ours, of the chosen rows, then the rejected; on stages before the last nothing."""
    with parallel_session(layout) as parallel:
        arch = read_architecture(folder, "scalar")
        chunks = build_model(arch, parallel, PrecisionConfig(dtype="fp32"))
        load_model(chunks, folder, arch, parallel)
        dataset, _ = load_dataset(DataConfig(train=data), data, load_tokenizer(folder), "pairs")
        batches = GlobalBatches(
            dataset, global_size=8, micro_size=8, pad_id=1, shuffle=False, pad_multiple=parallel.tp
        ).at(0)
        (frozen,) = frozen_outputs(Model(chunks, arch), "score", batches, parallel)
        return [] if frozen.score_B is None else frozen.score_B.tolist()


@pytest.mark.parametrize("architecture", ["qwen2-tied", "llama-untied"])
def test_transformers_gives_the_same_scores(workers, folders, architecture: str, tmp_path: Path) -> None:
    """Trained from a language model; rows padded on the right, the chosen ones with an end of sequence."""
    folder = folders[architecture]
    data = str(folder / "more.jsonl")
    values = merge(configuration(folder), {"data": {"train": data}, "optim": {"lr": 1e-2}})
    run = {"dir": str(tmp_path / "run"), "steps": 2}
    workers.run(2, run_training, {**values, "run": run, "parallel": {"pp": 2}})
    exported = tmp_path / "run" / "reward"
    model, report = AutoModelForSequenceClassification.from_pretrained(
        exported, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0, "not the end of sequence, which is 1"
    pairs = dense.read_pairs(folder / "more.jsonl")
    rows = [pair["prompt_tokens"] + pair[name] for name in ("chosen_tokens", "rejected_tokens") for pair in pairs]
    with torch.no_grad():
        theirs = model.eval()(**tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")).logits
    assert theirs.std() > 0.1
    for layout in (ParallelConfig(tp=2, sequence_parallel=True), ParallelConfig(pp=2)):
        for ours in filter(None, workers.run(2, scores_of, str(exported), data, layout)):
            assert ours == pytest.approx(theirs[:, 0].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("dtype", "parallel"), [("bf16", {"tp": 2, "sequence_parallel": True}), ("fp32", {"pp": 2})], ids=["tp2 sp", "pp2"]
)
def test_resumed_steps_are_the_same(workers, folders, tmp_path: Path, dtype: str, parallel: dict[str, Any]) -> None:
    run = {"dir": str(tmp_path), "steps": 4, "save_every": 2, "keep": 2}
    values = merge(configuration(folders["llama-untied"]), {"run": run, "parallel": parallel})
    values = merge(values, {"precision": {"dtype": dtype}, "optim": {"lr": 1e-3, "weight_decay": 0.1}})
    workers.run(2, run_training, values)
    whole, exported = _metrics(tmp_path), _tensors(tmp_path / "reward")
    shutil.rmtree(tmp_path / "checkpoints" / "step_000004")
    shutil.rmtree(tmp_path / "reward")
    workers.run(2, run_training, values)
    resumed, found = _metrics(tmp_path), _tensors(tmp_path / "reward")
    assert list(resumed) == [1, 2, 3, 4]
    for step, line in whole.items():
        for key in ("loss", "grad_norm", "lr", "margin"):
            assert resumed[step][f"train/reward/{key}"] == line[f"train/reward/{key}"], f"{key} of step {step}"
    assert found.keys() == exported.keys() and "score.weight" in found
    assert all(torch.equal(found[name], tensor) for name, tensor in exported.items())


def _metrics(folder: Path) -> dict[int, dict[str, float]]:
    """The last line of each step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_a_larger_step_makes_the_chosen_one_win(workers, folders, tmp_path: Path) -> None:
    """Learning goes the right way: after a few steps every pair of the batch is told apart."""
    values = merge(configuration(folders["qwen2-tied"]), {"run": {"dir": str(tmp_path), "steps": 12}})
    workers.run(1, run_training, merge(values, {"optim": {"lr": 3e-3, "decay": "constant"}}))
    assert _metrics(tmp_path)[12]["train/reward/accuracy"] == 1.0
