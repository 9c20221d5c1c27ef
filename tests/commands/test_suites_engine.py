"""Suites that our own engine answers and measures: on two processes, in this one, and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_aligndistil.__main__ import main
from megatron_aligndistil.commands.evaluate import EvaluateConfig, measure
from megatron_aligndistil.commands.launch import JOB_VARIABLES
from megatron_aligndistil.config import build
from megatron_aligndistil.suites.policy_shift import distinct
from tests.engine.tiny import make_checkpoint, make_pairs
from tests.suites import servers
from tests.suites.servers import Server

ROOT = Path(__file__).parents[2]
MODELS = ["--models.reference", "reference", "--models.dpo", "dpo", "--models.reward", "reward"]
LIMITS = ["--sampling.max_new_tokens", "12", "--max_length", "128", "--max_prompt_length", "64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, pairs, and prompts with summaries."""
    folder = tmp_path_factory.mktemp("suites")
    for seed, name in enumerate(("policy", "reference", "dpo")):
        make_checkpoint("qwen2-tied", folder / name, seed=seed)
    make_checkpoint("qwen2-tied", folder / "reward", seed=9, scalar=True)
    make_pairs(folder / "pairs.jsonl", count=6, vocab_size=300)
    prompts = [{"prompt": " ".join(f"w{(n * k) % 90}" for k in range(2, 6)), "completion": f"w{n}"} for n in range(7)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in prompts))
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server(servers.respond)
    yield started
    started.close()


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "megatron_aligndistil", "evaluate", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def run_here(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The same in this process, which is no process of a job, whatever it was for earlier tests."""
    monkeypatch.chdir(folder)
    for name in JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return main(["evaluate", *arguments, "--nproc", "1"])


def figures(folder: Path, suite: str) -> dict[str, dict]:
    return json.loads((folder / "report.json").read_text())["suites"][suite]["figures"]["policy"]


def texts(folder: Path) -> dict[str, list[int]]:
    """Sampled tokens by request, whichever process wrote them."""
    records = [json.loads(line) for file in folder.glob("answers*.jsonl") for line in file.read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record["reply"]["tokens"][1] for record in records}


def test_answered_and_measured_by_the_engine(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = ["--judge.endpoint", server.url, "--judge.model", "judge"]
    arguments = ["--suite", "tldr,policy_shift,reward_accuracy", "--model", "policy", *MODELS, *LIMITS, *judge]
    arguments += ["--tldr.questions", "prompts.jsonl", "--policy_shift.prompts", "prompts.jsonl"]
    arguments += ["--reward_accuracy.data", "pairs.jsonl", "--sampling.temperature", "1.0"]
    result = run(folder, *arguments, "--out", "two", "--nproc", "2")
    assert result.returncode == 0, result.stderr
    shift = figures(folder / "two", "policy_shift")
    answers = texts(folder / "two" / "policy" / "policy_shift")
    assert (
        len(answers) == 7 and len(list((folder / "two" / "policy" / "policy_shift").glob("answers.rank*.jsonl"))) == 2
    )

    # The same measured by the command's other form, from the very tokens that were sampled.
    (folder / "again.jsonl").write_text((folder / "two" / "policy" / "policy_shift" / "responses.jsonl").read_text())
    paths = {name: str(folder / name) for name in ("policy", "reference", "dpo")}
    measured = measure(build(EvaluateConfig, {"measure": "kl", "data": str(folder / "again.jsonl"), "models": paths}))
    assert measured is not None
    for column, name in {"KL from initial": "kl_reference", "KL from DPO": "kl_dpo", "entropy": "entropy"}.items():
        assert shift[column]["value"] == pytest.approx(measured[1][name].mean, rel=1e-5)
    assert shift["KL from initial"]["value"] > 0
    assert shift["length (tokens)"]["value"] == pytest.approx(sum(map(len, answers.values())) / 7)
    paths = {"models": {"reward": str(folder / "reward")}}
    summaries = str(folder / "two" / "policy" / "tldr" / "responses.jsonl")
    measured = measure(build(EvaluateConfig, {"measure": "score", "data": summaries, **paths}))
    assert measured is not None
    assert figures(folder / "two", "tldr")["TL;DR reward"]["value"] == pytest.approx(
        measured[1]["reward_score"].mean, rel=1e-5
    )
    accuracy = figures(folder / "two", "reward_accuracy")
    assert set(accuracy) == {"reward model", "DPO reward"} and accuracy["DPO reward"]["count"] == 6

    # One process, in two stages, the second half of the answers lost in between: the same samples, and nothing twice.
    assert run_here(folder, monkeypatch, *arguments, "--out", "one", "--stage", "answers") == 0
    assert not (folder / "one" / "report.md").exists()
    stored = folder / "one" / "policy" / "policy_shift" / "answers.rank0.jsonl"
    lines = stored.read_text().splitlines(keepends=True)
    stored.write_text("".join(lines[:4]) + lines[4][:30])
    before = len(server.bodies)
    assert run_here(folder, monkeypatch, *arguments, "--out", "one") == 0
    assert stored.read_text().splitlines()[:4] == [line.strip() for line in lines[:4]]
    assert texts(stored.parent) == answers
    assert len(server.bodies) - before == 14  # verdicts on 7 summaries in both orders
    assert figures(folder / "one", "policy_shift")["entropy"]["value"] == pytest.approx(
        shift["entropy"]["value"], rel=1e-5
    )


def test_distinct() -> None:
    words = ["a", "b", "a", "b", "c"]
    assert [distinct(words, size) for size in (1, 2, 3)] == [3 / 5, 3 / 4, 1.0]
    assert distinct(["a"], 2) != distinct(["a"], 2)
