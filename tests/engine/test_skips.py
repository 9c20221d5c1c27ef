"""Losses and gradients that are not finite, in real runs: nothing of them reaches the weights, and the run says so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aligndistil.config import merge
from megatron_aligndistil.errors import AlignDistilError
from tests.engine.lives import run_training
from tests.engine.tiny import make_checkpoint

POISON = 299  # the token whose presence in a response makes the loss of a model not finite

ALGORITHM = f"""
from dataclasses import replace
import torch
from megatron_aligndistil.algorithms.dpo import DPO, DPOConfig


class PoisonedConfig(DPOConfig):
    name: str = "poisoned"
    value: str = "nan"
    of_gradient: bool = False


class Poisoned(DPO):
    name = "poisoned"
    Config = PoisonedConfig

    def loss(self, model, head, responses, frozen):
        output = super().loss(model, head, responses, frozen)
        if model == "dpo" or not (responses.targets_T == {POISON}).any():
            return output
        if self.config.of_gradient:
            # A value of 0 whose slope is not finite.
            return replace(output, loss_sum=output.loss_sum + (output.loss_sum - output.loss_sum.detach()).sqrt())
        return replace(output, loss_sum=output.loss_sum * float(self.config.value))
"""


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """Both directions of DPO, four pairs a step in order, on a policy and pairs without poison."""
    make_checkpoint("qwen2-tied", tmp_path / "policy")
    (tmp_path / "poisoned.py").write_text(ALGORITHM)
    return {
        "algorithm": {"name": str(tmp_path / "poisoned.py"), "direction": "both"},
        "models": {"policy": str(tmp_path / "policy")},
        "data": {"train": str(tmp_path / "pairs.jsonl"), "shuffle": False},
        "batch": {"global_size": 4},
        "run": {"dir": str(tmp_path / "run"), "save_every": 1, "keep": 9},
        "optim": {"lr": 1e-3, "weight_decay": 0.1, "warmup": 0.0},
    }


def write_pairs(folder: Path, poisoned: set[int], count: int = 12) -> None:
    records = [
        {
            "prompt_tokens": [0, 3 + index],
            "chosen_tokens": [40 + index, POISON if index in poisoned else 50, 1],
            "rejected_tokens": [60 + index, 1],
        }
        for index in range(count)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def saved(folder: Path, step: int, model: str) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, master weights, moments, their step count."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    state = load_plain_tensors(str(folder / "run" / "checkpoints" / f"step_{step:06d}" / model))
    groups = state["optimizer"].get("param_groups", [])  # not there where stages save their own
    counts = {f"step {index}": torch.tensor(group["step"]) for index, group in enumerate(groups)}
    return counts | {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys() and first
    return all(torch.equal(first[name], second[name]) for name in first)


def unchanged_steps(folder: Path, last: int) -> dict[str, list[bool]]:
    """For each model, whether steps 2, 3, ... left everything of it in the checkpoint as it was."""
    return {
        name: [same(saved(folder, step - 1, name), saved(folder, step, name)) for step in range(2, last + 1)]
        for name in ("dpo", "reverse")
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_changes_nothing(workers, base, tmp_path: Path, dtype: str) -> None:
    """Pair 6 is in step 2, on the second data parallel rank; one of two models cannot learn on it."""
    write_pairs(tmp_path, {6})
    workers.run(2, run_training, merge(base, {"precision": {"dtype": dtype}}))
    assert workers.run(1, unchanged_steps, tmp_path, 3)[0] == {"dpo": [False, False], "reverse": [True, False]}
    lines = metrics(tmp_path)
    assert [line["train/reverse/skipped"] for line in lines] == [0, 1, 1]
    assert [line["train/dpo/skipped"] for line in lines] == [0, 0, 0]
    assert ["train/reverse/loss" in line for line in lines] == [True, False, True]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert [line["train/reverse/lr"] for line in lines] == [line["train/dpo/lr"] for line in lines]

    (path,) = (tmp_path / "run" / "bad_batches").iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.name == "step_000002.jsonl"
    assert [row["tokens"] for row in rows] == [[0, 9, 46, POISON, 1], [0, 9, 66, 1]]  # both rows of the pair
    assert {key: rows[0][key] for key in ("dp_rank", "micro_batch", "row", "loss", "prompt", "response")} == {
        "dp_rank": 1,
        "micro_batch": 0,
        "row": 0,
        "loss": {"reverse": "nan"},
        "prompt": "<bos>w9",
        "response": f"w46w{POISON}<eos>",
    }


@pytest.mark.parametrize("kind", ["infinite loss", "gradient alone"])
def test_too_many_in_a_row_end_the_run(workers, base, tmp_path: Path, kind: str) -> None:
    """Only the last pipeline stage knows losses; all ranks decide the same. The first step is bad already."""
    write_pairs(tmp_path, set(range(12)))
    changes = {"value": "inf"} if kind == "infinite loss" else {"of_gradient": True}
    values = merge(base, {"algorithm": changes, "parallel": {"pp": 2}, "run": {"max_skipped": 1}})
    with pytest.raises(
        AlignDistilError, match=r"reverse was not finite at step 2, nor at the steps before it, more than 1 in"
    ) as stop:
        workers.run(2, run_training, values)
    assert "goes on with step 3 and stops again" in str(stop.value)
    assert unchanged_from_start(workers, tmp_path)
    assert [line["train/reverse/skipped"] for line in metrics(tmp_path)] == [1, 2]
    # Once more: on from the checkpoint, and the count in a row goes on.
    with pytest.raises(AlignDistilError, match=r"not finite at step 3, .* exports the weights as they are"):
        workers.run(2, run_training, values)
    # Where more may be skipped, the run comes to its end, and exports what it began with.
    assert [line["train/reverse/skipped"] for line in metrics(tmp_path)] == [1, 2, 3]
    workers.run(2, run_training, merge(values, {"run": {"max_skipped": 9}}))
    assert len(list((tmp_path / "run" / "bad_batches").iterdir())) == 3


def unchanged_from_start(workers, folder: Path) -> bool:
    return workers.run(1, unchanged_steps, folder, 2)[0]["reverse"] == [True]
