"""KTO from the command line, on rated responses and on preference pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.commands.test_cli import PROGRAM, metrics, succeeds
from tests.engine.tiny import make_checkpoint, make_pairs

KTO = ["train", "--algorithm.name", "kto", "--models.policy", "policy", "--batch.global_size", "8"]
KTO += ["--batch.micro_size", "2", "--optim.lr", "3e-3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, nine rated responses and eight pairs."""
    folder = tmp_path_factory.mktemp("kto")
    make_checkpoint("qwen2-tied", folder / "policy")
    rows = [
        {"prompt_tokens": [0, 3 + index], "response_tokens": [50 + index, 90 + index, 1], "label": index % 3 > 0}
        for index in range(9)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_pairs(folder / "pairs.jsonl", count=8, vocab_size=300)
    return folder


def test_rated_responses(folder: Path) -> None:
    run = ["--data.train", "rows.jsonl", "--data.eval", "rows.jsonl", "--run.dir", "rated", "--run.steps", "6"]
    said = succeeds(folder, *PROGRAM, *KTO, *run, "--nproc", "2").stdout
    assert "training data rows.jsonl: 9 examples with 45 tokens in all, from 9 records\n" in said
    *steps, evaluation = metrics(folder / "rated")
    # The policy begins as the reference.
    assert steps[0]["train/policy/kl"] == pytest.approx(0, abs=1e-4)
    assert steps[0]["train/policy/loss"] == pytest.approx(0.5, abs=1e-4)
    assert steps[-1]["train/policy/loss"] < 0.45 and steps[-1]["train/policy/kl_estimate"] != 0
    assert evaluation["eval/policy/reward_desirable"] > evaluation["eval/policy/reward_undesirable"] + 0.5
    model = AutoModelForCausalLM.from_pretrained(folder / "rated" / "policy")
    assert model(torch.tensor([[0, 7, 8]])).logits.isfinite().all()


def test_preference_pairs(folder: Path) -> None:
    run = ["--data.train", "pairs.jsonl", "--run.dir", "pairs", "--run.steps", "3", "--data.shuffle", "false"]
    said = succeeds(folder, *PROGRAM, *KTO, *run).stdout
    assert "training data pairs.jsonl: 16 examples " in said
    steps = metrics(folder / "pairs")
    assert len(steps) == 3 and all(step["train/policy/grad_norm"] > 0 for step in steps)
    assert {"train/policy/reward_desirable", "train/policy/reward_undesirable"} <= steps[0].keys()
