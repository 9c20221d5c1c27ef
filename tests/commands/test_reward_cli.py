"""Reward models from the command line: trained, measured and checked, and refused where they are no use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from tests.commands.test_cli import PROGRAM, ROOT, metrics, refused, succeeds
from tests.engine.tiny import make_checkpoint, make_pairs

SIZES = ["--data.train", "pairs.jsonl", "--batch.global_size", "8", "--batch.micro_size", "2"]
REWARD = ["train", "--algorithm.name", "reward", "--models.policy", "sft", *SIZES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, pairs, and the run of a reward model on them at tp 2."""
    folder = tmp_path_factory.mktemp("reward_cli")
    make_checkpoint("qwen2-tied", folder / "sft")
    make_pairs(folder / "pairs.jsonl", count=16, vocab_size=300)
    run = ["--run.dir", "runs/reward", "--run.steps", "8", "--optim.lr", "3e-3", "--parallel.tp", "2", "--nproc", "2"]
    result = succeeds(folder, *PROGRAM, *REWARD, *run, "--data.eval", "pairs.jsonl")
    assert "wrote runs/reward/reward" in result.stdout
    return folder


def test_it_learns_and_transformers_loads_it(folder: Path) -> None:
    lines = metrics(folder / "runs" / "reward")
    assert lines[-1]["eval/reward/accuracy"] > 0.85 > lines[0]["train/reward/accuracy"]
    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder / "runs" / "reward" / "reward", output_loading_info=True
    )
    assert not any(report.values()) and model.score.weight.shape == (1, 32)


def test_its_accuracy_is_measured(folder: Path) -> None:
    arguments = ["evaluate", "--measure", "accuracy", "--data", "pairs.jsonl", "--out", "accuracy.json"]
    models = ["--models.reward", "runs/reward/reward"]
    succeeds(folder, *PROGRAM, *arguments, *models, "--parallel.pp", "2", "--nproc", "2")
    (found,) = [json.loads((folder / "accuracy.json").read_text())["reward_model"]]
    assert found["count"] == 16
    assert found["mean"] == pytest.approx(metrics(folder / "runs" / "reward")[-1]["eval/reward/accuracy"])


def test_the_checkpoint_of_the_run_is_what_was_exported(folder: Path) -> None:
    trained = "runs/reward/checkpoints/step_000008/reward"
    said = succeeds(folder, str(ROOT / "tools" / "verify_conversion.py"), "runs/reward/reward", trained).stdout
    assert "tensors that differ: 0" in said


WRONG = {
    "a reward model as policy": (
        ["train", "--algorithm.name", "dpo", "--models.policy", "runs/reward/reward", *SIZES],
        "runs/reward/reward is a reward model (sequence classification), and a language model is needed",
    ),
    "sampling from a reward model": (
        ["generate", "--model", "runs/reward/reward", "--prompts", "pairs.jsonl", "--out", "x.jsonl"],
        "runs/reward/reward is a reward model (sequence classification), and a language model is needed",
    ),
    "divergence of a reward model": (
        ["evaluate", "--measure", "kl", "--data", "pairs.jsonl", "--models.policy", "sft", "--models.reward", "sft"],
        "measure kl compares language models; leave models.reward out",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_sense_is_told_in_one_line(folder: Path, case: str) -> None:
    arguments, expected = WRONG[case]
    run = ["--run.dir", "runs/wrong"] if arguments[0] == "train" else []
    assert expected in refused(folder, *PROGRAM, *arguments, *run, "--nproc", "1")
    assert not (folder / "runs" / "wrong").exists()
