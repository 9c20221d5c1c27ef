"""Packed micro-batches train as padded ones do, under every layout, and only response positions reach a loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook

from megatron_aligndistil.config import TrainConfig, build, merge
from megatron_aligndistil.engine import model as engine_model
from megatron_aligndistil.engine import preparation
from megatron_aligndistil.engine.packed import has_packed_kernel
from megatron_aligndistil.engine.trainer import train
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.ops.head import LMHead, ScalarHead
from tests.engine import dense
from tests.engine.lives import run_training
from tests.engine.tiny import make_checkpoint, make_pairs
from tests.parity.steps import Step, assert_close, steps_of

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2 sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "dp2": (2, {}),
    "tp2 pp2 vpp2 sp": (4, {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True}),
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "sft": {"name": "sft"},
    "dpo": {"name": "dpo", "direction": "both"},
    "aligndistil": {"name": "aligndistil", "r": 1.0},
    "aligndistil, official": {"name": "aligndistil", "r": 1.0, "official_compat": True},
    "kto": {"name": "kto", "beta": 0.5},
    "reward": {"name": "reward"},
    "ppo": {"name": "ppo"},
}
RUNS = {layout: ["aligndistil", "dpo"] for layout in LAYOUTS} | {"single": list(ALGORITHMS)}
for _layout in ("tp2 sp", "pp2", "dp2"):
    RUNS[_layout] = RUNS[_layout] + ["sft", "kto", "reward", "ppo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models with grouped queries, eight pairs of unlike lengths, and 24 more."""
    folder = tmp_path_factory.mktemp("packing")
    for seed, name in enumerate(("policy", "dpo", "reverse")):
        make_checkpoint("qwen2-tied", folder / name, seed=seed)
    make_checkpoint("qwen2-tied", folder / "reward", seed=3, scalar=True)
    dense.write_pairs(folder / "pairs.jsonl", vocab_size=300)
    make_pairs(folder / "more.jsonl", count=24, vocab_size=300)
    return folder


def configuration(folder: Path, algorithm: str, *, packed: bool) -> dict[str, Any]:
    names = ["policy", "dpo", "reverse"] + (["reward"] if algorithm == "ppo" else [])
    return {
        "algorithm": ALGORITHMS[algorithm],
        "models": {name: str(folder / name) for name in names} | {"reference": str(folder / "dpo")},
        "data": {"train": str(folder / "pairs.jsonl"), "max_length": 30},
        # 143 tokens in pairs, 75 in chosen responses alone.
        "batch": {"global_size": 8, "max_tokens": 36} if packed else {"global_size": 8, "micro_size": 2},
        "rollout": {"max_new_tokens": 8, "batch_size": 4},
    }


@pytest.fixture(scope="module")
def padded(workers, folder: Path) -> dict[str, dict[str, Step]]:
    """The first step of every algorithm in one process, without packing."""
    runs = [configuration(folder, algorithm, packed=False) for algorithm in ALGORITHMS]
    return dict(zip(ALGORITHMS, steps_of(workers, 1, {}, runs), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_padded_rows(workers, folder: Path, padded, layout: str) -> None:
    """Every metric, and the gradient of every parameter of every trained model."""
    runs = [configuration(folder, algorithm, packed=True) for algorithm in RUNS[layout]]
    for algorithm, steps in zip(RUNS[layout], steps_of(workers, *LAYOUTS[layout], runs), strict=True):
        expected = padded[algorithm]
        assert steps.keys() == expected.keys()
        for name, step in steps.items():
            assert step.grads.keys() == expected[name].grads.keys()
            for key, gradient in expected[name].grads.items():
                assert_close(f"{algorithm} {name} {key}", step.grads[key], gradient, 1e-5)
            found, wanted = ({k: v for k, v in each.metrics.items() if k != "lr"} for each in (step, expected[name]))
            assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5), (algorithm, name)


@contextmanager
def watched_heads() -> Iterator[list[int]]:
    """Collects the number of states that each output layer is given."""
    given: list[int] = []

    def lm_head(hidden_TH: torch.Tensor, *rest: Any) -> LMHead:
        given.append(len(hidden_TH))
        return LMHead(hidden_TH, *rest)

    def scalar_head(hidden_TH: torch.Tensor, weight_1H: torch.Tensor) -> ScalarHead:
        given.append(len(hidden_TH))
        return ScalarHead(hidden_TH, weight_1H)

    def ran(module: torch.nn.Module, _inputs: Any) -> None:
        is_output = type(module).__name__ == "ColumnParallelLinear" and module.output_size >= 300
        assert not is_output, "Megatron's own output layer would see all places"

    with patch.object(engine_model, "LMHead", lm_head), patch.object(engine_model, "ScalarHead", scalar_head):
        handle = register_module_forward_pre_hook(ran)
        yield given
        handle.remove()


def states_given(values: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Of a run of one step: states given to output layers, response positions and places of its micro-batches."""
    positions: list[int] = []
    places: list[int] = []
    frozen_outputs = preparation.frozen_outputs

    def listening(model: Any, need: Any, batches: Any, parallel: Any) -> Any:
        positions.extend(batch.responses.targets_T.numel() for batch in batches)
        places.extend(batch.tokens_BS.numel() for batch in batches)
        return frozen_outputs(model, need, batches, parallel)

    with watched_heads() as given, patch.object(preparation, "frozen_outputs", listening):
        train(build(TrainConfig, values))
    return given, positions, places


@pytest.mark.parametrize("packed", [True, False])
def test_only_response_positions_reach_an_output_layer(workers, folder: Path, tmp_path: Path, packed: bool) -> None:
    """Of three models, with gradient and without, under sequence and pipeline parallelism."""
    values = configuration(folder, "aligndistil", packed=packed)
    values |= {"run": {"dir": str(tmp_path), "steps": 1}, "precision": {"dtype": "fp32"}}
    values["parallel"] = {"tp": 2, "pp": 2, "sequence_parallel": True}
    ranks = workers.run(4, states_given, values)
    assert [given for given, _, _ in ranks[:2]] == [[], []], "the first stage has no output layer to give states to"
    for given, positions, places in ranks[2:]:
        count = len(positions) // 2  # dpo and reverse see the same micro-batches
        assert sum(positions[:count]) == sum(len(r["chosen_tokens"]) for r in dense.read_pairs(folder / "pairs.jsonl"))
        assert sorted(given) == sorted(positions + positions[:count])
        assert all(few < many for few, many in zip(positions, places, strict=True))


def metrics_of(run: Path) -> dict[int, dict[str, float]]:
    """What was written last for each step, of training and of evaluation."""
    found: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        found.setdefault(int(line["step"]), {}).update(line)
    return found


def several_steps(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "models": {name: str(folder / name) for name in ("policy", "dpo", "reverse")},
        "data": {"train": str(folder / "more.jsonl"), "eval": str(folder / "pairs.jsonl")},
        "batch": {"global_size": 8, "max_tokens": 64},
        "run": {"dir": str(out), "steps": 4, "save_every": 2, "keep": 2},
        "optim": {"lr": 1e-3},
        "precision": {"dtype": "fp32"},
        "rollout": {"max_new_tokens": 10, "batch_size": 4},
    }
    return merge(values, changes)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"run": {"recompute": "full"}}),
        (2, {"run": {"recompute": "selective"}, "parallel": {"tp": 2, "sequence_parallel": True}}),
        (2, {"parallel": {"pp": 2, "vpp": 2}}),
        (2, {}),
    ],
    ids=["full recomputation", "selective recomputation, tp2 sp", "pp2 vpp2", "dp2"],
)
def test_on_policy_runs_learn_the_same(workers, folder: Path, tmp_path: Path, world_size: int, changes) -> None:
    """Sampled responses and their updates, and an evaluation; with less padding."""
    algorithm = {"algorithm": {"name": "aligndistil", "on_policy": True, "r": 1.0}}
    whole = {"batch": {"max_tokens": None, "micro_size": 4}}
    workers.run(1, run_training, several_steps(folder, tmp_path / "padded", **merge(algorithm, whole)))
    workers.run(world_size, run_training, several_steps(folder, tmp_path / "packed", **merge(algorithm, changes)))
    padded, packed = metrics_of(tmp_path / "padded"), metrics_of(tmp_path / "packed")
    for step, line in padded.items():
        assert packed[step]["rollout/length"] == line["rollout/length"]
        for key in line:
            if key.startswith(("train/", "eval/")):
                assert packed[step][key] == pytest.approx(line[key], rel=1e-3, abs=1e-5), (key, step)
        assert 0 <= packed[step]["padding"] < line["padding"] < 1


def test_a_packed_run_goes_on_exactly(workers, folder: Path, tmp_path: Path) -> None:
    """Also with a budget that was chosen anew, to rounding."""
    values = several_steps(folder, tmp_path, algorithm={"name": "dpo"})
    workers.run(2, run_training, values)
    whole, exported = metrics_of(tmp_path), load_file(tmp_path / "dpo" / "model.safetensors")

    def go_on(max_tokens: int) -> dict[int, dict[str, float]]:
        shutil.rmtree(tmp_path / "checkpoints" / "step_000004")
        shutil.rmtree(tmp_path / "dpo")
        workers.run(2, run_training, merge(values, {"batch": {"max_tokens": max_tokens}}))
        return metrics_of(tmp_path)

    resumed = go_on(64)
    for step, line in whole.items():
        for key in ("train/dpo/loss", "train/dpo/grad_norm", "padding"):
            assert resumed[step][key] == line[key], (key, step)
    for name, tensor in load_file(tmp_path / "dpo" / "model.safetensors").items():
        assert torch.equal(tensor, exported[name]), name
    wider = go_on(128)
    for step, line in whole.items():
        assert wider[step]["train/dpo/loss"] == pytest.approx(line["train/dpo/loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("algorithm", "remedy"),
    [
        ({"name": "dpo"}, "pair of responses .* set it to [0-9]+ or more"),
        ({"name": "aligndistil", "on_policy": True}, "rollout.max_new_tokens"),
        ({"name": "kto"}, "may have 100 tokens.*data.max_length"),
    ],
)
def test_what_does_not_fit_the_budget_is_told(workers, folder: Path, tmp_path: Path, algorithm, remedy: str) -> None:
    values = several_steps(folder, tmp_path, algorithm=algorithm, batch={"max_tokens": 30})
    values["data"] |= {"max_length": 100}
    values["rollout"] |= {"max_new_tokens": 40}
    with pytest.raises(ConfigError, match=remedy):
        workers.run(1, run_training, values)


def test_transformer_engine_attends_within_rows_in_16_bits_only() -> None:
    assert has_packed_kernel(torch.bfloat16, (9, 0))
    assert not has_packed_kernel(torch.float32, (9, 0))
    assert has_packed_kernel(torch.bfloat16, (8, 0)) == (find_spec("flash_attn") is not None)
