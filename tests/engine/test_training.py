"""Every layout, precision and way of cutting a batch trains as one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_aligndistil.config import merge
from tests.engine.lives import run_training
from tests.engine.tiny import make_checkpoint, make_pairs

STEPS = 3
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel": {"tp": 2}}),
    "tp4": (4, {"parallel": {"tp": 4}}),
    "tp2 sequence parallel": (2, {"parallel": {"tp": 2, "sequence_parallel": True}}),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "pp4": (4, {"parallel": {"pp": 4}}),
    "pp2 interleaved": (2, {"parallel": {"pp": 2, "vpp": 2}}),
    "tp2 pp2": (4, {"parallel": {"tp": 2, "pp": 2}}),
    "tp2 pp2 sequence parallel interleaved": (4, {"parallel": {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True}}),
    "dp2": (2, {}),
    "dp2 plain optimiser": (2, {"optim": {"distributed": False}}),
    "dp2 tp2": (4, {"parallel": {"tp": 2}}),
    "dp2 pp2": (4, {"parallel": {"pp": 2}}),
    "micro-batches of 4": (1, {"batch": {"micro_size": 4}}),
    "full recomputation": (1, {"run": {"recompute": "full"}}),
    "selective recomputation, tp2": (2, {"run": {"recompute": "selective"}, "parallel": {"tp": 2}}),
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "sft": {"name": "sft"},
    "dpo": {"name": "dpo", "direction": "both"},
    "aligndistil": {"name": "aligndistil", "teacher": "adaptive"},
    "on-policy aligndistil": {"name": "aligndistil", "on_policy": True},
    "reinforce": {"name": "reinforce"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration with tiny random models and pairs of random tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    for seed, name in enumerate(("policy", "dpo", "reverse")):
        make_checkpoint("qwen2-tied", folder / name, seed=seed)
    make_pairs(folder / "pairs.jsonl", count=24, vocab_size=300)
    return {
        "models": {name: str(folder / name) for name in ("policy", "dpo", "reverse")},
        "data": {"train": str(folder / "pairs.jsonl")},
        "batch": {"global_size": 8, "micro_size": 2},
        "run": {"steps": STEPS},
        "optim": {"lr": 1e-3, "clip": 1.0},
        "precision": {"dtype": "fp32"},
        "rollout": {"max_new_tokens": 10, "batch_size": 4},
    }


def trained(
    workers, base: dict[str, Any], folder: Path, world_size: int, changes: dict[str, Any]
) -> list[dict[str, float]]:
    """Metrics of each step of a run on `world_size` processes."""
    values = merge(merge(base, changes), {"run": {"dir": str(folder)}})
    workers.run(world_size, run_training, values)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(workers, base, tmp_path_factory):
    """Metrics of one process, by algorithm and precision."""
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}

    def get(algorithm: str, dtype: str = "fp32") -> list[dict[str, float]]:
        if (algorithm, dtype) not in runs:
            changes = {"algorithm": ALGORITHMS[algorithm], "precision": {"dtype": dtype}}
            runs[algorithm, dtype] = trained(workers, base, tmp_path_factory.mktemp("alone"), 1, changes)
        return runs[algorithm, dtype]

    return get


def compare(expected: list[dict[str, float]], found: list[dict[str, float]], rtol: float) -> None:
    assert len(found) == len(expected) == STEPS
    for one, other in zip(expected, found, strict=True):
        keys = {key for key in one if key.startswith("train/")}
        assert keys == {key for key in other if key.startswith("train/")}
        assert any(key.endswith("grad_norm") for key in keys)
        for key in keys:
            np.testing.assert_allclose(
                other[key], one[key], rtol=rtol, atol=rtol * 0.1, err_msg=f"{key}, step {one['step']}"
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", ["aligndistil"])
def test_layouts_equal_one_process(workers, base, alone, tmp_path: Path, algorithm: str, layout: str) -> None:
    world_size, changes = LAYOUTS[layout]
    found = trained(workers, base, tmp_path, world_size, merge(changes, {"algorithm": ALGORITHMS[algorithm]}))
    compare(alone(algorithm), found, rtol=2e-4)


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_other_algorithms_under_tp_pp_and_dp(workers, base, alone, tmp_path: Path, algorithm: str) -> None:
    for name in ("tp2 pp2", "dp2"):
        world_size, changes = LAYOUTS[name]
        changes = merge(changes, {"algorithm": ALGORITHMS[algorithm]})
        compare(alone(algorithm), trained(workers, base, tmp_path / name, world_size, changes), rtol=2e-4)


@pytest.mark.parametrize("layout", ["tp2", "tp2 sequence parallel", "pp2", "tp2 pp2", "dp2", "dp2 tp2"])
@pytest.mark.parametrize("algorithm", ["on-policy aligndistil", "reinforce"])
def test_on_policy_layouts_equal_one_process(workers, base, alone, tmp_path: Path, algorithm: str, layout: str) -> None:
    """The same samples from the very weights being trained, and the same updates on them."""
    world_size, changes = LAYOUTS[layout]
    found = trained(workers, base, tmp_path, world_size, merge(changes, {"algorithm": ALGORITHMS[algorithm]}))
    expected = alone(algorithm)
    compare(expected, found, rtol=1e-3)
    for key in ("rollout/length", "rollout/truncated"):
        assert [line[key] for line in found] == [line[key] for line in expected]


@pytest.mark.parametrize("layout", ["tp2 sequence parallel", "pp2", "dp2"])
def test_bf16_with_fp32_master_weights(workers, base, alone, tmp_path: Path, layout: str) -> None:
    world_size, changes = LAYOUTS[layout]
    changes = merge(changes, {"algorithm": ALGORITHMS["aligndistil"], "precision": {"dtype": "bf16"}})
    compare(alone("aligndistil", "bf16"), trained(workers, base, tmp_path, world_size, changes), rtol=0.05)


def test_a_resumed_run_equals_one_that_was_not_stopped(workers, base, alone, tmp_path: Path) -> None:
    """Saved at tp 2 after each step, cut back to step 2, gone on at pp 2."""
    import shutil

    settings = {"algorithm": ALGORITHMS["dpo"], "run": {"save_every": 1, "keep": 3}}
    trained(workers, base, tmp_path, 2, merge(settings, {"parallel": {"tp": 2}}))
    shutil.rmtree(tmp_path / "checkpoints" / "step_000003")
    for name in ("dpo", "reverse"):
        shutil.rmtree(tmp_path / name)
    found = trained(workers, base, tmp_path, 2, merge(settings, {"parallel": {"pp": 2}}))
    compare(alone("dpo"), found, rtol=2e-4)
    exported = {path.name for path in (tmp_path / "dpo").iterdir()}
    assert exported & {"model.safetensors", "model.safetensors.index.json"}
