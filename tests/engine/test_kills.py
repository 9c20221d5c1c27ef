"""A run killed at random moments, again and again, and started anew with the same command, is as one never killed.

ALIGNDISTIL_KILLS says how many times (3 when not given); with `-s` each kill is told.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.engine import lives
from tests.engine.tiny import make_checkpoint, make_pairs

KILLS = int(os.environ.get("ALIGNDISTIL_KILLS", "3"))
STEPS = 6 * max(KILLS, 4)
MODELS = ("dpo", "reverse")


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kills")
    make_checkpoint("qwen2-tied", folder / "policy")
    make_pairs(folder / "pairs.jsonl", 32, vocab_size=300)
    return {
        "algorithm": {"name": "dpo", "direction": "both"},
        "models": {"policy": str(folder / "policy")},
        "data": {"train": str(folder / "pairs.jsonl"), "eval": str(folder / "pairs.jsonl")},
        "batch": {"global_size": 4, "micro_size": 2},
        "run": {"dir": str(folder / "whole"), "steps": STEPS, "save_every": 3, "eval_every": 6},
        "optim": {"lr": 1e-3, "weight_decay": 0.1},
    }


def test_as_if_never_killed(values: dict[str, Any]) -> None:
    whole = Path(values["run"]["dir"])
    assert lives.finish(lives.start(2, values), 5.0 * STEPS) == [0, 0]
    killed = whole.with_name("killed")
    values = {**values, "run": {**values["run"], "dir": str(killed)}}
    draw = random.Random(os.environ.get("ALIGNDISTIL_KILLS_SEED", "0"))
    for number in range(KILLS):
        _kill_once(lives.start(2, values), killed, number, draw)
    assert lives.finish(lives.start(2, values), 5.0 * STEPS) == [0, 0]
    assert lives.lines(killed) == lives.lines(whole)
    for name in MODELS:
        found, expected = (load_file(folder / name / "model.safetensors") for folder in (killed, whole))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    checkpoints = {
        folder: sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (killed, whole)
    }
    assert checkpoints[killed] == checkpoints[whole]
    assert _on_board(killed) == _on_board(whole)


def _kill_once(processes: list[Any], folder: Path, number: int, draw: random.Random) -> None:
    """Every third time while a checkpoint is being written, else a random time after a random step; one rank or all."""
    checkpoints, during_save = folder / "checkpoints", number % 3 == 0
    step = lives.steps_done(folder) + draw.randrange(6)
    if during_save:
        lives.wait_until(lambda: any(checkpoints.glob("*.partial/*/*")), processes)
    else:
        lives.wait_until(lambda: lives.steps_done(folder) >= step, processes)
    time.sleep(draw.random() * (0.01 if during_save else 0.1))
    ranks = draw.choice([[0], [1], [0, 1]])
    lives.kill(processes, ranks)
    left = ", ".join(sorted(path.name for path in checkpoints.iterdir())) if checkpoints.exists() else "nothing"
    print(f"kill {number + 1}: ranks {ranks} {'during a save' if during_save else f'after step {step}'}; left: {left}")


def _checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def _on_board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    tags = [tag for tag in board.Tags()["scalars"] if tag.startswith(("train", "eval"))]
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}
