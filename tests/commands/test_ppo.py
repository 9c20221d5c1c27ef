"""PPO from the command line, rewarded by a Python function in a file of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.commands.test_cli import PROGRAM, metrics, python, succeeds
from tests.engine.tiny import make_checkpoint

PPO = ["train", "--algorithm.name", "ppo", "--algorithm.reward", "function", "--algorithm.critic_lr", "3e-3"]
PPO += ["--models.policy", "policy", "--data.train", "prompts.jsonl", "--rollout.max_new_tokens", "6"]
PPO += ["--rollout.samples", "4", "--batch.global_size", "64", "--batch.micro_size", "16", "--optim.lr", "4e-3"]
REWARDS = """
def even(prompts, completions, **_):
    numbers = [[int(number) for number in text.split("w")[1:]] for text in completions]
    return [sum(number % 2 == 0 for number in each) / max(len(each), 1) for each in numbers]

def broken(prompts, completions, **_):
    return [len(text) / 0 for text in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, 16 prompts and reward functions."""
    folder = tmp_path_factory.mktemp("ppo")
    make_checkpoint("qwen2-tied", folder / "policy")
    prompts = [json.dumps({"prompt_tokens": [0, 3 + index]}) for index in range(16)]
    (folder / "prompts.jsonl").write_text("\n".join(prompts))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def test_a_function_is_learned(folder: Path) -> None:
    """From about one even word in two; one deviation of a step's mean is 0.03."""
    run = ["--rollout.reward", "rewards.py:even", "--run.steps", "12", "--run.dir", "run", "--nproc", "2"]
    succeeds(folder, *PROGRAM, *PPO, *run)
    steps = metrics(folder / "run")
    assert len(steps) == 12
    first, last = ([step["rollout/reward"] for step in part] for part in (steps[:4], steps[-4:]))
    assert sum(last) / 4 > sum(first) / 4 + 0.08
    for step in steps:
        assert step["train/policy/reward"] == pytest.approx(step["rollout/reward"], abs=1e-6)
    AutoModelForCausalLM.from_pretrained(folder / "run" / "policy")
    assert AutoModelForSequenceClassification.from_pretrained(folder / "run" / "critic").config.num_labels == 1


def test_a_broken_function_is_told_once(folder: Path) -> None:
    run = ["--rollout.reward", "rewards.py:broken", "--run.dir", "broken", "--nproc", "2"]
    result = python(folder, *PROGRAM, *PPO, *run)
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("aligndistil: ")]
    assert len(said) == 1 and "Traceback" not in result.stderr
    assert "the reward function rewards.py:broken failed: ZeroDivisionError" in said[0]
