"""Reward accuracy and KL on a dataset: figures worked out with transformers, at several layouts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megatron_aligndistil.commands.evaluate import EvaluateConfig, evaluate
from megatron_aligndistil.config import build
from tests.engine.tiny import make_checkpoint, make_pairs

NAMES = ("policy", "reference", "dpo", "reverse")
LAYOUTS = {"single": (1, {}), "tp2": (2, {"tp": 2}), "pp2": (2, {"pp": 2}), "dp2": (2, {})}


def run_evaluation(values: dict) -> None:
    evaluate(build(EvaluateConfig, values))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five models, 7 pairs (no multiple of any batch size here) and as many responses."""
    path = tmp_path_factory.mktemp("evaluation")
    for seed, name in enumerate(NAMES):
        make_checkpoint("qwen2-tied", path / name, seed=seed)
    make_checkpoint("qwen2-tied", path / "reward", seed=9, scalar=True)
    make_pairs(path / "pairs.jsonl", count=7, vocab_size=300)
    records = [json.loads(line) for line in (path / "pairs.jsonl").read_text().splitlines()]
    with (path / "responses.jsonl").open("w") as file:
        for record in records:
            file.write(
                json.dumps({"prompt_tokens": record["prompt_tokens"], "response_tokens": record["chosen_tokens"]})
                + "\n"
            )
    return path


def logprobs(folder: Path, name: str, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probabilities [n, V] at the states that predict the response."""
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].double()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def mean_and_stderr(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


@pytest.fixture(scope="module")
def expected_accuracy(folder: Path) -> dict[str, tuple[float, float]]:
    found: dict[str, list[float]] = {}
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float64).eval()
    for line in (folder / "pairs.jsonl").read_text().splitlines():
        record = json.loads(line)
        score = {
            (name, side): float(
                logprobs(folder, name, record["prompt_tokens"], record[f"{side}_tokens"])
                .gather(1, torch.tensor(record[f"{side}_tokens"])[:, None])
                .sum()
            )
            for name in NAMES
            for side in ("chosen", "rejected")
        }
        for name, (plus, minus) in {
            "policy_reward": ("policy", "reference"),
            "dpo_reward": ("dpo", "reference"),
            "reverse_reward": ("reference", "reverse"),
            "contrastive_reward": ("dpo", "reverse"),
        }.items():
            margin = (score[plus, "chosen"] - score[minus, "chosen"]) - (
                score[plus, "rejected"] - score[minus, "rejected"]
            )
            found.setdefault(name, []).append(float(margin > 0))
        with torch.no_grad():
            chosen, rejected = (
                reward(torch.tensor([record["prompt_tokens"] + record[f"{side}_tokens"]])).logits.item()
                for side in ("chosen", "rejected")
            )
        found.setdefault("reward_model", []).append(float(chosen > rejected))
    return {name: mean_and_stderr(values) for name, values in found.items()}


@pytest.fixture(scope="module")
def expected_kl(folder: Path) -> dict[str, tuple[float, float]]:
    found: dict[str, list[float]] = {}
    for line in (folder / "responses.jsonl").read_text().splitlines():
        record = json.loads(line)
        each = {name: logprobs(folder, name, record["prompt_tokens"], record["response_tokens"]) for name in NAMES}
        policy = each.pop("policy")
        for name, other in each.items():
            found.setdefault(f"kl_{name}", []).append(float((policy.exp() * (policy - other)).sum()))
        found.setdefault("entropy", []).append(float(-(policy.exp() * policy).sum(-1).mean()))
        found.setdefault("length", []).append(float(len(record["response_tokens"])))
    return {name: mean_and_stderr(values) for name, values in found.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("measure", ["accuracy", "kl"])
def test_figures(workers, folder, tmp_path, request, measure: str, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    expected = request.getfixturevalue(f"expected_{measure}")
    values = {
        "measure": measure,
        "data": str(folder / ("pairs.jsonl" if measure == "accuracy" else "responses.jsonl")),
        "models": {name: str(folder / name) for name in (*NAMES, *(["reward"] if measure == "accuracy" else []))},
        "out": str(tmp_path / "out.json"),
        "micro_size": 2,
        "parallel": parallel,
        "precision": {"dtype": "fp32"},
    }
    workers.run(world_size, run_evaluation, values)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found.keys() == expected.keys()
    for name, (mean, stderr) in expected.items():
        assert found[name]["count"] == 7
        np.testing.assert_allclose(found[name]["mean"], mean, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(found[name]["stderr"], stderr, rtol=1e-3, atol=1e-9, err_msg=name)
