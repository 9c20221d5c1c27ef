"""The paper's tables: figures, claims and the report."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples" / name) for name in ("paper", "common", "demo")]

import claims  # noqa: E402
import corpus  # noqa: E402
import page  # noqa: E402
import paper  # noqa: E402
import scoring  # noqa: E402
import settings  # noqa: E402
from methods import Setting  # noqa: E402
from records import read_json, write_jsonl  # noqa: E402

from tests.examples.paper_runs import gathered, write_model  # noqa: E402


@pytest.fixture
def setting(here: Path) -> Setting:
    made = settings.demo(None)
    for name in ("train", "test_pairs"):
        Path(made.variables[name]).parent.mkdir(parents=True, exist_ok=True)
    return made


def test_figures_of_runs_worked_by_hand(setting: Setting) -> None:
    found = gathered(setting)
    off_policy = found["methods"]["off_policy"]
    assert off_policy["mean"]["reward"] == {"mean": pytest.approx(1 / 4), "stderr": 0.0, "count": 3}  # s = 1: 1/√16
    assert off_policy["mean"]["kl_reference"]["mean"] == pytest.approx(8.0)
    assert off_policy["mean"]["kl_reference"]["stderr"] == pytest.approx(1 / math.sqrt(3))
    assert off_policy["mean"]["win_rate"]["mean"] == 1.0
    assert found["methods"]["dpo"]["mean"]["win_rate"]["mean"] == 0.75  # one won, one tied
    assert found["models"]["initial"]["win_rate"]["mean"] == 0.5
    assert off_policy["tried"][0]["seconds_per_step"] == 1.0 and off_policy["tried"][1]["failed"]
    assert found["accuracy"]["true_reward"]["test"]["mean"] == pytest.approx(3.5 / 4)
    assert "reverse_reward" not in found["accuracy"] and "reward_model" not in found["accuracy"]
    within = off_policy["within"]
    assert within["5"] is None and within["10"]["reward"]["mean"] == pytest.approx(0.25) and within["20"]["lr"] == 3e-4
    assert found["methods"]["vanilla"]["within"] == dict.fromkeys(("2.5", "5", "10", "20"))


def test_claims_worked_by_hand(setting: Setting) -> None:
    found = gathered(setting)
    verdicts = {claim.sentence: claim.verdict for claim in claims.claims(found)}
    assert verdicts["AlignDistil off-policy has more reward than DPO"] == "agrees"
    assert verdicts["AlignDistil off-policy has more reward than PPO"] == "does not agree"
    assert verdicts["the contrastive reward is more accurate than the DPO reward on test pairs"] == "agrees"
    assert verdicts["reward rises from constant 1 to 2"] == "cannot be told"
    assert verdicts["length rises from constant 1 to 2"] == "agrees"
    # At KL 8, half way between constants of 7 and 9: 13 tokens against the 10 of the adaptive coefficient.
    assert claims.at_kl(found, 8.0, "length")["mean"] == pytest.approx(13.0)
    assert claims.at_kl(found, 30.0, "length") is None
    shorter = "the adaptive coefficient is shorter than a constant at the same KL from DPO (between two of them)"
    assert verdicts[shorter] == "agrees"
    assert not any("KTO" in sentence or "on-policy" in sentence for sentence in verdicts)


@pytest.mark.parametrize(
    ("mean", "error", "verdict"),
    [(0.3, 0.1, "agrees"), (0.2, 0.1, "cannot be told"), (-0.3, 0.1, "does not agree"), (0.0, 0.0, "cannot be told")],
)
def test_a_verdict_asks_for_two_standard_errors(mean: float, error: float, verdict: str) -> None:
    assert claims.Claim(1, "", {"mean": mean, "stderr": error, "count": 3}).verdict == verdict


def test_the_report_of_runs_worked_by_hand(setting: Setting, here: Path) -> None:
    found = gathered(setting)
    (here / "out").mkdir()
    (here / "out" / "reading.md").write_text("What a person says.")
    paper.write(setting, found, here / "out")
    text = (here / "out" / "report.md").read_text()
    images = re.findall(r"!\[.*\]\((.*)\)", text)
    assert set(images) == {path.name for path in (here / "out").glob("*.png")} and len(images) == 4
    assert read_json(here / "out" / "paper.json")["claims"][0]["verdict"] == "agrees"
    assert "What a person says." in text
    rows = [
        "| AlignDistil, off-policy | 0.0003 | r 10 | 0.250 ± 0.000 | 8.0 ± 0.6 | 8.0 ± 0.6 | 10.0 ± 0.0 | 100% "
        "| 100% |",
        "| AlignDistil, off-policy | – | – | 0.250 (KL 8.0) | 0.250 (KL 8.0) |",
        "| contrastive DPO reward | 75.0 ± 1.0 | 75.0 ± 1.0 | 74.71 | 71.29 | 0.250 ± 0.000 | 19.45 |",
        "| constant 1.5 | 0.000 ± 0.000 | 9.0 ± 0.6 | 14.0 ± 0.0 | 19.49 | 20.71 | 2973 |",
        "| DPO | 75.0 ± 0.0 | 0.000 ± 0.000 | 85.7 | 1.67 |",
        "| DPO | 0.001 | beta 0.1 | diverged | – | – |",
        "| DPO | 0.0003 | beta 0.1 | **0.000 ± 0.250** | 4.0 ± 0.1 | 10.0 ± 0.0 |",
    ]
    assert [row for row in rows if row not in text] == []
    assert str(here) not in text


def test_the_report_of_part_of_the_methods(setting: Setting, here: Path) -> None:
    found = gathered(setting)
    found["methods"] = {"dpo": found["methods"]["dpo"]}
    paper.write(setting, found, here / "out")
    text = (here / "out" / "report.md").read_text()
    assert "## Table 1" in text and "## Table 3" not in text
    assert page.table_3(found)[1] == []


# Judges


def test_a_judge_scores_prompt_and_response_once(here: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = corpus.train_tokenizer(["A good dog ran.", "A bad cat sat."])
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(here / "judge")
    tokenizer.save_pretrained(here / "judge")
    write_jsonl(here / "prompts.jsonl", [{"prompt": "A good dog"}, {"prompt": "A bad cat"}])
    write_model(here / "model", [" sat.", " ran."], 1.0)

    scorer = scoring.Scorer("judge")
    found = scorer.rewards(here / "model", "prompts.jsonl")
    for text, score in zip(("A good dog sat.", "A bad cat ran."), found, strict=True):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        assert score == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-6)
    (here / "judge" / "model.safetensors").unlink()
    assert scoring.Scorer("judge").rewards(here / "model", "prompts.jsonl") == found  # kept, not judged again
