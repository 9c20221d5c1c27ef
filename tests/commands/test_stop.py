"""SIGTERM, as schedulers send it before a time limit: saved, told, not taken for done, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from megatron_aligndistil.commands.launch import JOB_VARIABLES
from tests.engine.lives import steps_done, wait_until
from tests.engine.tiny import make_checkpoint, make_pairs

STEPS = 40


def start(folder: Path) -> subprocess.Popen[str]:
    """A pipeline of one stage on two processes."""
    environment = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "megatron_aligndistil", "pipeline", "--config", "pipeline.yaml"]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_pipeline_is_stopped_and_goes_on(tmp_path: Path) -> None:
    make_checkpoint("qwen2-tied", tmp_path / "policy")
    make_pairs(tmp_path / "pairs.jsonl", count=16, vocab_size=300)
    stage = {
        "algorithm": {"name": "dpo"},
        "models": {"policy": "policy"},
        "data": {"train": "pairs.jsonl"},
        "batch": {"global_size": 8, "micro_size": 2},
        "run": {"dir": "runs/dpo", "steps": STEPS},
    }
    pipeline = {"dir": "runs", "processes": 2, "stages": [{"name": "dpo", "train": stage}]}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    run = tmp_path / "runs" / "dpo"
    first = start(tmp_path)
    assert wait_until(lambda: steps_done(run) >= 3, [])
    first.send_signal(signal.SIGTERM)
    _, told = first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM
    (saved,) = (run / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step_"))
    assert 3 <= step < STEPS
    sentence = f"stopped by SIGTERM after step {step} of {STEPS}; the same command goes on from runs/dpo/checkpoints/"
    assert told.count(sentence + saved.name) == 1 and "Traceback" not in told
    assert json.loads((tmp_path / "runs" / "pipeline.json").read_text())["dpo"].startswith("begun")
    second = start(tmp_path)
    _, told = second.communicate(timeout=120)
    assert second.returncode == 0, told
    assert f"going on from runs/dpo/checkpoints/{saved.name}" in told
    written = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert written == list(range(1, STEPS + 1))
