"""DPO with its options and SimPO equal TRL's, and TDPO a dense reference, on one model and batch under every layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.engine import dense
from tests.engine.tiny import make_checkpoint
from tests.models.tiny import MODELS
from tests.parity import with_trl
from tests.parity.steps import LAYOUTS, Step, assert_same_step, ours
from tests.workers import Workers

MODEL = "qwen2-tied"
ALGORITHMS: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": 0.1, "direction": "both"},
    "cdpo": {"name": "dpo", "beta": 0.1, "label_smoothing": 0.2},
    "ipo": {"name": "dpo", "beta": 0.1, "loss": "ipo"},
    "sft": {"name": "dpo", "beta": 0.1, "sft_weight": 0.5},
    "simpo": {"name": "simpo", "beta": 2.5, "gamma_beta_ratio": 0.5},
    "tdpo1": {"name": "tdpo", "variant": "tdpo1", "beta": 0.1},
    "tdpo2": {"name": "tdpo", "variant": "tdpo2", "beta": 0.1, "alpha": 0.5},
}
# Ours by TRL's names.
METRICS = {
    "loss": "loss",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
}
SUMMED = {"logps_chosen": "logps/chosen", "logps_rejected": "logps/rejected"}  # TRL's for SimPO are means


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `policy` and `reference`, and pairs.jsonl."""
    folder = tmp_path_factory.mktemp("parity")
    for seed, name in enumerate(("policy", "reference")):
        make_checkpoint(MODEL, folder / name, seed=seed)
    dense.write_pairs(folder / "pairs.jsonl", MODELS[MODEL]["vocab_size"])
    return folder


@pytest.fixture(scope="module")
def found(workers: Workers, folder: Path) -> Any:
    """Our steps under a layout: algorithm -> trained model -> step."""
    common = {
        "models": {name: str(folder / name) for name in ("policy", "reference")},
        "data": {"train": str(folder / "pairs.jsonl"), "shuffle": False},
        "batch": {"global_size": 8, "micro_size": 2},
    }
    runs = [{**common, "algorithm": section} for section in ALGORITHMS.values()]
    known: dict[str, dict[str, dict[str, Step]]] = {}

    def get(layout: str) -> dict[str, dict[str, Step]]:
        if layout not in known:
            known[layout] = dict(zip(ALGORITHMS, ours(workers, layout, runs), strict=True))
        return known[layout]

    return get


# --- TRL ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Step]:
    """TRL's steps by algorithm and trained model."""
    out = tmp_path_factory.mktemp("trl")
    records = dense.read_pairs(folder / "pairs.jsonl")
    swapped = [{**r, "chosen_tokens": r["rejected_tokens"], "rejected_tokens": r["chosen_tokens"]} for r in records]
    pairs = with_trl.dpo_examples(records)
    sigmoid = with_trl.dpo_trainer(folder, out, beta=0.1)
    ipo = with_trl.dpo_trainer(folder, out, beta=0.1, loss_type="ipo")
    # The loss of cDPO is no longer there by itself; of one pair alone, nothing of the optimal transport is left.
    cdpo = with_trl.dpo_trainer(folder, out, beta=0.1, loss_type="aot", label_smoothing=0.2)
    # The mean over the chosen tokens of a batch is ours, over those of a pair, for one pair.
    sft = with_trl.dpo_trainer(folder, out, beta=0.1, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    simpo = with_trl.cpo_trainer(folder, out, beta=2.5, loss_type="simpo", simpo_gamma=1.25, cpo_alpha=0.0)
    return {
        ("dpo", "dpo"): with_trl.step(sigmoid, pairs),
        ("dpo", "reverse"): with_trl.step(sigmoid, with_trl.dpo_examples(swapped)),
        ("cdpo", "dpo"): with_trl.mean_steps(cdpo, pairs),
        ("ipo", "dpo"): with_trl.step(ipo, pairs),
        ("sft", "dpo"): with_trl.mean_steps(sft, pairs),
        ("simpo", "policy"): with_trl.step(simpo, with_trl.cpo_examples(records)),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_trl(found: Any, trl: dict[tuple[str, str], Step], layout: str) -> None:
    steps = found(layout)
    for (algorithm, model), expected in trl.items():
        metrics = METRICS if algorithm == "simpo" else METRICS | SUMMED
        assert_same_step(steps[algorithm][model], expected, metrics)


# --- TDPO, from the paper ---------------------------------------------------------------------------------------------


def tdpo(
    models: dict[str, PreTrainedModel], records: Sequence[dense.Record], variant: str
) -> tuple[Tensor, dict[str, float]]:
    """The mean of -log σ(u - δ), with u and δ of Zeng 2024, and the means of the two sequential divergences."""
    beta, alpha = 0.1, 0.5
    losses, divergences = [], []
    for record in records:
        log_ratio, divergence = {}, {}
        for which in ("chosen", "rejected"):
            prompt, response = record["prompt_tokens"], record[f"{which}_tokens"]
            own = dense.state_logits(models["policy"], prompt, response).log_softmax(-1)
            with torch.no_grad():
                reference = dense.state_logits(models["reference"], prompt, response).log_softmax(-1)
            log_ratio[which] = sum(own[t, token] - reference[t, token] for t, token in enumerate(response))
            divergence[which] = (reference.exp() * (reference - own)).sum()
        u = beta * (log_ratio["chosen"] - log_ratio["rejected"])
        if variant == "tdpo1":
            delta = beta * divergence["rejected"] - beta * divergence["chosen"]
        else:
            delta = alpha * (beta * divergence["rejected"] - beta * divergence["chosen"].detach())
        losses.append((1 + (delta - u).exp()).log())
        divergences.append(torch.stack([divergence["chosen"], divergence["rejected"]]).detach())
    kl_chosen, kl_rejected = torch.stack(divergences).mean(0).tolist()
    return torch.stack(losses).mean(), {"kl_chosen": kl_chosen, "kl_rejected": kl_rejected}


@pytest.fixture(scope="module")
def paper(folder: Path) -> dict[str, Step]:
    """The reference's step of both variants."""
    records = dense.read_pairs(folder / "pairs.jsonl")
    models = {name: dense.load(folder / name) for name in ("policy", "reference")}
    steps = {}
    for variant in ("tdpo1", "tdpo2"):
        models["policy"].zero_grad()
        loss, metrics = tdpo(models, records, variant)
        loss.backward()
        grads = {name: parameter.grad.clone() for name, parameter in models["policy"].named_parameters()}
        steps[variant] = Step({"loss": loss.item(), **metrics}, grads)
    return steps


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_tdpo_equals_the_paper(found: Any, paper: dict[str, Step], variant: str, layout: str) -> None:
    names = {name: name for name in ("loss", "kl_chosen", "kl_rejected")}
    assert_same_step(found(layout)[variant]["policy"], paper[variant], names)
