"""Runs in which one process dies or stands still, through the command line."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine.tiny import make_checkpoint, make_pairs

PROGRAM = [sys.executable, "-m", "megatron_aligndistil", "train"]

ALGORITHM = """
import os, signal, time
from megatron_aligndistil.algorithms.sft import SFT, SFTConfig


class FaultyConfig(SFTConfig):
    name: str = "faulty"
    fault: str = "sleep"


class Faulty(SFT):
    name = "faulty"
    Config = FaultyConfig
    calls = 0

    def loss(self, model, head, responses, frozen):
        Faulty.calls += 1
        if Faulty.calls == 3 and os.environ["RANK"] == "1":
            sleep_on() if self.config.fault == "sleep" else os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, head, responses, frozen)


def sleep_on():
    time.sleep(1000)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_checkpoint("qwen2-tied", folder / "policy")
    make_pairs(folder / "pairs.jsonl", count=16, vocab_size=300)
    (folder / "faulty.py").write_text(ALGORITHM)
    return folder


def run(folder: Path, fault: str, *arguments: str) -> tuple[int, str, float]:
    """Exit code, stderr, and seconds."""
    began = time.monotonic()
    settings = ["--algorithm.name", "faulty.py", "--models.policy", "policy", "--data.train", "pairs.jsonl"]
    settings += ["--batch.global_size", "4", "--batch.micro_size", "2", "--nproc", "2", "--run.dir", fault]
    result = subprocess.run(
        [*PROGRAM, *settings, "--algorithm.fault", fault, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.returncode, result.stderr, time.monotonic() - began


def test_a_hang_ends_with_a_table_of_where_each_process_stands(folder: Path) -> None:
    code, stderr, _ = run(folder, "sleep", "--run.hang_timeout", "4")
    assert code == 1 and "Traceback" not in stderr
    assert "no process has got on for" in stderr and "(run.hang_timeout)" in stderr
    stands = dict(re.findall(r"  rank (\d) on \S+: step 3, update of policy\n +(.*)", stderr))
    assert re.search(r"faulty.py:\d+ sleep_on < faulty.py:\d+ loss < engine/schedule.py:\d+ ", stands["1"])
    assert stands["0"].startswith("torch.distributed ") and "engine/trainer.py" in stands["0"]


def test_a_process_that_dies_is_named_and_ends_the_others(folder: Path) -> None:
    code, stderr, seconds = run(folder, "kill")
    assert code == 128 + 9 and seconds < 60 and "Traceback" not in stderr
    assert "the process of rank 1 was ended by SIGKILL" in stderr
    assert re.search(r"aligndistil: rank 1 on \S+, last seen \d s ago at .*, has ended without a word", stderr)
