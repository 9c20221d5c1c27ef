"""KTO equals TRL's on the same models, rows and mismatched rows, whatever the layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine import dense
from tests.engine.tiny import make_checkpoint
from tests.models.tiny import MODELS
from tests.parity import with_trl
from tests.parity.steps import LAYOUTS, Step, assert_same_step, ours

MODEL = "qwen2-tied"
SETTINGS = {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.75}
# Policy and reference; the other way round the estimate of the KL is negative, and so no part of the loss.
WAYS = {"positive": ("a", "b"), "negative": ("b", "a")}
METRICS = {
    "loss": "loss",
    "kl": "kl",
    "reward_desirable": "rewards/chosen",
    "reward_undesirable": "rewards/rejected",
    "logps_desirable": "logps/chosen",
    "logps_undesirable": "logps/rejected",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and rows of either rating in an order that alternates irregularly."""
    folder = tmp_path_factory.mktemp("parity")
    for seed, name in enumerate("ab"):
        make_checkpoint(MODEL, folder / name, seed=seed)
    pairs = dense.write_pairs(folder / "pairs.jsonl", MODELS[MODEL]["vocab_size"])
    labels = [True, False, False, True, False, False, True, True]
    rows = [
        {
            "prompt_tokens": pair["prompt_tokens"],
            "response_tokens": pair["chosen_tokens" if label else "rejected_tokens"],
            "label": label,
        }
        for pair, label in zip(pairs, labels, strict=True)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Step]:
    from trl import KTOConfig, KTOTrainer

    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    examples = [
        {
            "prompt_ids": row["prompt_tokens"],
            "completion_ids": row["response_tokens"],
            "KL_completion_ids": after["response_tokens"],
            "label": row["label"],
        }
        for row, after in zip(rows, [*rows[1:], rows[0]], strict=True)
    ]
    arguments = KTOConfig(
        str(tmp_path_factory.mktemp("trl")),
        **with_trl.ARGUMENTS,
        **SETTINGS,
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
    )
    steps = {}
    for way, (policy, reference) in WAYS.items():
        trainer = KTOTrainer(
            model=with_trl.load(folder / policy),
            ref_model=with_trl.load(folder / reference),
            args=arguments,
            train_dataset=with_trl.dataset(prompt=["w3"] * 2, completion=[" w4"] * 2, label=[True, False]),
            processing_class=with_trl.load_tokenizer(folder / policy),
        )
        steps[way] = with_trl.step(trainer, examples)
    assert steps["positive"].metrics["kl"] > 1 and steps["negative"].metrics["kl"] == 0
    return steps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_trl(workers, folder: Path, theirs: dict[str, Step], layout: str) -> None:
    common: dict[str, Any] = {
        "algorithm": {"name": "kto", **SETTINGS},
        "data": {"train": str(folder / "rows.jsonl"), "shuffle": False},
        "batch": {"global_size": 8, "micro_size": 2},
    }
    runs = [
        {**common, "models": {"policy": str(folder / policy), "reference": str(folder / reference)}}
        for policy, reference in WAYS.values()
    ]
    for way, steps in zip(WAYS, ours(workers, layout, runs), strict=True):
        assert_same_step(steps["policy"], theirs[way], METRICS)
        kl = steps["policy"].metrics["kl_estimate"]
        assert kl > 1 if way == "positive" else kl < -1
