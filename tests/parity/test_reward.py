"""The reward model equals TRL's RewardTrainer on the same model and pairs, whatever the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from tests.engine import dense
from tests.engine.tiny import make_checkpoint
from tests.models.tiny import MODELS
from tests.parity import with_trl
from tests.parity.steps import LAYOUTS, Step, assert_same_step, ours

MODEL = "qwen2-tied"
ALGORITHMS: dict[str, dict[str, Any]] = {
    "plain": {"name": "reward"},
    "centred": {"name": "reward", "center": 0.01},
}
METRICS = {"loss": "loss", "accuracy": "accuracy", "margin": "margin"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model for its tokenizer, a reward model, and pairs in which one token, for padding, does not occur."""
    folder = tmp_path_factory.mktemp("parity")
    pairs = dense.write_pairs(folder / "pairs.jsonl", MODELS[MODEL]["vocab_size"])
    seen = {token for pair in pairs for tokens in pair.values() for token in tokens}
    make_checkpoint(MODEL, folder / "policy")
    pad = next(token for token in range(3, 300) if token not in seen)
    make_checkpoint(MODEL, folder / "reward", seed=1, scalar=True, pad_token_id=pad)
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Step]:
    from trl import RewardConfig, RewardTrainer

    examples = [
        {f"{name}_ids": pair["prompt_tokens"] + pair[f"{name}_tokens"] for name in ("chosen", "rejected")}
        for pair in dense.read_pairs(folder / "pairs.jsonl")
    ]
    found = {}
    for name, section in ALGORITHMS.items():
        model = with_trl.load(folder / "reward", AutoModelForSequenceClassification)
        tokenizer = with_trl.load_tokenizer(folder / "policy")
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
        settings = {**with_trl.ARGUMENTS, "center_rewards_coefficient": section.get("center")}
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(str(tmp_path_factory.mktemp("trl")), **settings),
            train_dataset=with_trl.dataset(**with_trl.PAIR),
            processing_class=tokenizer,
        )
        found[name] = with_trl.step(trainer, examples)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_trl(workers, folder: Path, theirs: dict[str, Step], layout: str) -> None:
    common = {
        "models": {name: str(folder / name) for name in ("policy", "reward")},
        "data": {"train": str(folder / "pairs.jsonl")},
        "batch": {"global_size": 8, "micro_size": 2},
    }
    found = ours(workers, layout, [{**common, "algorithm": section} for section in ALGORITHMS.values()])
    for name, steps in zip(ALGORITHMS, found, strict=True):
        assert_same_step(steps["reward"], theirs[name], METRICS)
