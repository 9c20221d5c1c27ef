"""An algorithm of one's own: the file that docs/add_an_algorithm.md shows, trained through the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine import dense
from tests.engine.tiny import make_checkpoint, make_pairs

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "add_an_algorithm.md"
PROGRAM = [sys.executable, "-m", "megatron_aligndistil", "train"]
SHARPNESS = 2.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tiny models, pairs, and the document's algorithm."""
    for seed, name in enumerate(("policy", "dpo", "reverse")):
        make_checkpoint("qwen2-tied", tmp_path / name, seed=seed)
    make_pairs(tmp_path / "pairs.jsonl", count=8, vocab_size=300)
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "rewarded_sft.py").write_text(code, encoding="utf-8")
    return tmp_path


def expected_loss(folder: Path) -> float:
    """Of the first step, by transformers in fp64."""
    models = {name: dense.load(folder / name) for name in ("policy", "dpo", "reverse")}
    total, count = 0.0, 0
    for line in (folder / "pairs.jsonl").read_text().splitlines():
        record = json.loads(line)
        prompt, response = record["prompt_tokens"], record["chosen_tokens"]
        tokens_1S = torch.tensor([prompt + response])
        with torch.no_grad():
            logps = {
                name: model(tokens_1S).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for name, model in models.items()
            }
        index_T1 = torch.tensor(response)[:, None]
        policy, dpo, reverse = (logps[name].gather(1, index_T1)[:, 0] for name in ("policy", "dpo", "reverse"))
        total -= float(((SHARPNESS * (dpo - reverse)).sigmoid() * policy).sum())
        count += len(response)
    return total / count


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_documents_algorithm_trains(folder: Path) -> None:
    settings = f"""
algorithm: {{name: rewarded_sft.py, sharpness: {SHARPNESS}}}
models: {{policy: policy, dpo: dpo, reverse: reverse}}
data: {{train: pairs.jsonl}}
batch: {{global_size: 8, micro_size: 4}}
parallel: {{tp: 2}}
optim: {{lr: 1.0e-3}}
run: {{dir: run, steps: 3}}
"""
    (folder / "config.yaml").write_text(settings)
    result = run(folder, "--config", "config.yaml")
    assert result.returncode == 0, result.stderr
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["train/policy/loss"] == pytest.approx(expected_loss(folder), rel=1e-4)
    assert metrics[-1]["train/policy/loss"] < metrics[0]["train/policy/loss"]
    assert (folder / "run" / "policy" / "model.safetensors").is_file()


def test_a_file_that_is_no_algorithm_is_told_in_one_line(folder: Path) -> None:
    (folder / "empty.py").write_text("x = 1\n")
    (folder / "broken.py").write_text("import no_such_module\n")
    needed = ["--models.policy", "policy", "--data.train", "pairs.jsonl", "--run.dir", "run"]
    for name, expected in {
        "empty.py": "defines 0 algorithms and should define one",
        "broken.py": "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
        "absent.py": "algorithm.name: there is no file absent.py; give the path of a Python file",
    }.items():
        result = run(folder, "--algorithm.name", name, *needed)
        assert result.returncode != 0 and len(result.stderr.splitlines()) == 1 and expected in result.stderr
