"""bf16 training keeps updates that are too small for bf16, in fp32 master weights, and carries them over a resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_aligndistil.config import merge
from tests.engine import dense
from tests.engine.lives import run_training
from tests.engine.tiny import make_checkpoint

STEPS = 24
LR = 1e-4
# A bf16 number of at least 1/4 is 1/512 or more from its neighbours: what is below half of that is lost in bf16.
LARGE, HALF_STEP = 0.25, 2.0**-10


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.float() for f in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(f).items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """SFT at a tiny constant rate on the same eight rows every step, from weights that bf16 holds exactly."""
    folder = tmp_path_factory.mktemp("bf16")
    make_checkpoint("qwen2-tied", folder / "policy", dtype=torch.bfloat16)
    dense.write_pairs(folder / "pairs.jsonl", vocab_size=300)
    return {
        "algorithm": {"name": "sft"},
        "models": {"policy": str(folder / "policy")},
        "data": {"train": str(folder / "pairs.jsonl")},
        "batch": {"global_size": 8, "micro_size": 4},
        "run": {"steps": STEPS},
        "optim": {"lr": LR, "warmup": 0.0, "min_lr_ratio": 1.0, "decay": "constant"},
    }


@pytest.fixture(scope="module")
def in_fp32(workers, base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What fp32 training makes of the same weights."""
    folder = tmp_path_factory.mktemp("fp32")
    workers.run(1, run_training, merge(base, {"run": {"dir": str(folder)}, "precision": {"dtype": "fp32"}}))
    return weights(folder / "policy")


@pytest.mark.parametrize(("world_size", "distributed", "resumed"), [(1, False, False), (2, True, True)])
def test_small_updates_add_up(
    workers, base, in_fp32, tmp_path: Path, world_size: int, distributed: bool, resumed: bool
) -> None:
    changes = {
        "run": {"dir": str(tmp_path), "save_every": STEPS // 2},
        "precision": {"dtype": "bf16"},
        "optim": {"distributed": distributed},
    }
    workers.run(world_size, run_training, merge(base, changes))
    if resumed:  # the second half again, from the checkpoint
        shutil.rmtree(tmp_path / "policy")
        shutil.rmtree(tmp_path / "checkpoints" / f"step_{STEPS:06d}")
        workers.run(world_size, run_training, merge(base, changes))
    before, after = weights(Path(base["models"]["policy"])), weights(tmp_path / "policy")

    large = {name: tensor.abs() >= LARGE for name, tensor in before.items()}
    start, found, wanted = (torch.cat([w[name][large[name]] for name in before]) for w in (before, after, in_fp32))
    # AdamW's update is at most a few lr; by itself it changes none of these weights in bf16.
    assert torch.equal((start + 4 * LR).bfloat16().float(), start)
    assert torch.equal((start - 4 * LR).bfloat16().float(), start)
    far = (wanted - start).abs() > 1.5 * HALF_STEP
    assert far.sum() > 1000
    moved = found != start
    assert moved[far].float().mean() > 0.9
    assert (torch.sign(found - start) == torch.sign(wanted - start))[moved & far].float().mean() > 0.99
