"""A pipeline split over two nodes whose cable is pulled in the middle of a run."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_aligndistil.config import TrainConfig, build
from megatron_aligndistil.engine import kept
from megatron_aligndistil.engine.trainer import train
from tests.engine.tiny import make_checkpoint, make_pairs
from tests.two_nodes.nodes import Node, two_nodes, unavailable

STEPS, SAVE_EVERY = 40, 8
NOTICED_SECONDS = 90.0  # 30 s of silence are waited for; the rest is for a busy machine

pytestmark = pytest.mark.slow


def settings(folder: Path, run: str) -> dict[str, Any]:
    return {
        "algorithm": {"name": "dpo"},
        "models": {"policy": str(folder / "policy")},
        "data": {"train": str(folder / "pairs.jsonl")},
        "batch": {"global_size": 8, "micro_size": 2},
        "optim": {"lr": 1e-3},
        "parallel": {"pp": 2},
        "precision": {"dtype": "fp32"},
        "run": {"dir": str(folder / run), "steps": STEPS, "save_every": SAVE_EVERY},
    }


def train_here(values: dict[str, Any]) -> None:
    train(build(TrainConfig, values))


def start(nodes: Sequence[Node], folder: Path) -> list[subprocess.Popen[str]]:
    """The same command on both nodes."""
    return [node.start(folder, ["train", "--config", "run.yaml"]) for node in nodes]


def wait(processes: Sequence[subprocess.Popen[str]], seconds: float) -> list[str]:
    """What each node printed, once all have ended."""
    deadline = time.monotonic() + seconds
    return [process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0] for process in processes]


def wait_for(path: Path, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Until a file is there; the processes that are to write it must not end before."""
    while not path.exists():
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, ended[0].communicate()[0]
        time.sleep(0.05)


def losses(run: Path) -> dict[int, float]:
    """The loss of each step, the last one written where a step was taken twice."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {int(line["step"]): line["train/dpo/loss"] for line in lines if "train/dpo/loss" in line}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in (run / "dpo").glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_pulled_cable_ends_the_run_and_it_goes_on(workers, tmp_path: Path) -> None:
    if reason := unavailable():
        pytest.skip(f"two nodes cannot be made here: {reason}")
    make_checkpoint("qwen2-tied", tmp_path / "policy")
    make_pairs(tmp_path / "pairs.jsonl", count=64, vocab_size=300)
    (tmp_path / "run.yaml").write_text(json.dumps(settings(tmp_path, "run")))
    checkpoints = tmp_path / "run" / "checkpoints"
    processes: list[subprocess.Popen[str]] = []
    with two_nodes() as nodes:
        try:
            processes = start(nodes, tmp_path)
            wait_for(checkpoints / f"step_{SAVE_EVERY:06d}" / kept.PROGRESS_FILE, processes)
            nodes[0].set_link(up=False)
            pulled = time.monotonic()
            # While the nodes wait for each other: the run as it would have been, on this machine alone.
            workers.run(2, train_here, settings(tmp_path, "undisturbed"))
            said = wait(processes, NOTICED_SECONDS - (time.monotonic() - pulled))
            check_end(processes, said)
            reached = kept.latest(checkpoints)
            assert reached is not None and kept.step_of(reached) < STEPS
            for checkpoint in kept.complete(checkpoints):
                assert kept.read_progress(checkpoint)["step"] == kept.step_of(checkpoint)

            nodes[0].set_link(up=True)
            processes = start(nodes, tmp_path)
            said = wait(processes, 120)
            assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    assert f"going on from {reached}" in " ".join(said)
    whole, resumed = losses(tmp_path / "undisturbed"), losses(tmp_path / "run")
    assert resumed == whole and sorted(resumed) == list(range(1, STEPS + 1))
    expected, found = weights(tmp_path / "undisturbed"), weights(tmp_path / "run")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def check_end(processes: Sequence[subprocess.Popen[str]], said: Sequence[str]) -> None:
    """Both nodes have ended in failure, each with one sentence of ours on what has gone and what to do."""
    for process, text in zip(processes, said, strict=True):
        assert process.returncode not in (0, None), text
        sentences = [line for line in text.splitlines() if line.startswith("aligndistil: ")]
        assert len(sentences) == 1 and "gone" in sentences[0] and "goes on" in sentences[0], text
