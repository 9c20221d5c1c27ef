"""A run that goes on from a checkpoint takes the very steps of one that was never stopped: several of them, exactly.

One step after the resume would not do: the loss of that step depends on the weights alone, and only the next one shows
whether the optimiser's moments and step count came back too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_aligndistil.config import merge
from tests.engine import dense
from tests.engine.lives import run_training
from tests.engine.tiny import make_checkpoint

STEPS, CUT = 6, 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("resume")
    make_checkpoint("qwen2-tied", folder / "policy")
    dense.write_pairs(folder / "pairs.jsonl", vocab_size=300)
    return {
        "algorithm": {"name": "dpo"},
        "models": {"policy": str(folder / "policy")},
        "data": {"train": str(folder / "pairs.jsonl")},
        "batch": {"global_size": 4, "micro_size": 2},
        "run": {"steps": STEPS, "save_every": CUT, "keep": STEPS},
        "optim": {"lr": 1e-3, "weight_decay": 0.1},
    }


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"precision": {"dtype": "fp32"}}),
        (2, {"precision": {"dtype": "bf16"}}),
        (2, {"precision": {"dtype": "fp32"}, "optim": {"distributed": False}}),
        (2, {"precision": {"dtype": "bf16"}, "optim": {"distributed": False}, "parallel": {"tp": 2}}),
        (2, {"precision": {"dtype": "bf16"}, "parallel": {"pp": 2, "vpp": 2}}),
    ],
    ids=["single fp32", "dp2 bf16", "dp2 fp32 plain optimiser", "tp2 bf16 plain optimiser", "pp2 interleaved bf16"],
)
def test_resumed_steps_are_the_same(workers, base, tmp_path: Path, world_size: int, changes: dict[str, Any]) -> None:
    values = merge(merge(base, changes), {"run": {"dir": str(tmp_path)}})
    workers.run(world_size, run_training, values)
    whole, exported = metrics(tmp_path), weights(tmp_path)
    cut_short(tmp_path)
    workers.run(world_size, run_training, values)
    resumed = metrics(tmp_path)
    assert list(resumed) == list(range(1, STEPS + 1))
    for step, line in whole.items():
        for key in ("train/dpo/loss", "train/dpo/grad_norm", "train/dpo/lr"):
            assert resumed[step][key] == line[key], f"{key} of step {step}"
    found = weights(tmp_path)
    assert found.keys() == exported.keys()
    for name, tensor in exported.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("first", "second"), [({"tp": 2}, {"pp": 2}), ({"pp": 2, "vpp": 2}, {}), ({}, {"tp": 2, "sequence_parallel": True})]
)
def test_another_layout_goes_on(workers, base, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    values = merge(base, {"run": {"dir": str(tmp_path)}, "precision": {"dtype": "fp32"}, "optim": {"eps": 1e-3}})
    workers.run(2, run_training, merge(values, {"parallel": first}))
    whole, exported = metrics(tmp_path), weights(tmp_path)
    cut_short(tmp_path)
    workers.run(2, run_training, merge(values, {"parallel": second}))
    resumed, found = metrics(tmp_path), weights(tmp_path)
    for step, line in whole.items():
        for key in ("train/dpo/loss", "train/dpo/grad_norm", "train/dpo/lr"):
            assert resumed[step][key] == pytest.approx(line[key], rel=1e-4), f"{key} of step {step}"
    for name, tensor in exported.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5)


def cut_short(folder: Path) -> None:
    """Make the run look as if it had ended after its first checkpoint."""
    for step in range(2 * CUT, STEPS + 1, CUT):
        shutil.rmtree(folder / "checkpoints" / f"step_{step:06d}")
    shutil.rmtree(folder / "dpo")


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    """The last line written for each step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {int(line["step"]): line for line in lines}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "dpo").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
