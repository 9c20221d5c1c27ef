"""The launchers in examples/launch, and every command line that they and the set-ups show."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from megatron_aligndistil import algorithms
from megatron_aligndistil.commands import convert, evaluate, generate
from megatron_aligndistil.commands.launch import JOB_VARIABLES
from megatron_aligndistil.commands.options import parse, take
from megatron_aligndistil.commands.pipeline import PipelineConfig, read_stages
from megatron_aligndistil.config import TrainConfig

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
SCHEMAS = {
    "train": TrainConfig,
    "pipeline": PipelineConfig,
    "generate": generate.GenerateConfig,
    "evaluate": evaluate.EvaluateConfig,
    "convert": convert.ConvertConfig,
}
# What stands before our own arguments, by hand or behind a launcher.
PROGRAM = re.compile(r"(?:aligndistil|-m megatron_aligndistil|examples/launch/\w+\.sh)\s+(?=\w+ )")
SHOWN = [*sorted((ROOT / "examples" / "setups").iterdir()), *sorted(LAUNCH.iterdir())]


def commands_of(path: Path) -> list[list[str]]:
    """Our arguments in every command line of a file: comments, code blocks and scripts alike."""
    text = path.read_text(encoding="utf-8")
    lines = [line.lstrip("# ") for line in re.sub(r"\\\n[#\s]*", " ", text).splitlines()]
    found = [shlex.split(line[match.end() :], comments=True) for line in lines for match in PROGRAM.finditer(line)]
    return [arguments for arguments in found if arguments[0] in SCHEMAS]


def check_command(arguments: list[str]) -> None:
    """Raise ConfigError where a command would refuse its arguments before doing anything."""
    command, *rest = arguments
    _, rest = take(rest, "--nproc")
    config: Any = parse(SCHEMAS[command], rest)
    if command == "pipeline":
        read_stages(config)
    elif command == "train":
        algorithms.build(config.algorithm)


@pytest.mark.parametrize("path", [path for path in SHOWN if path.is_file()], ids=lambda path: path.name)
def test_shown_commands_are_understood(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for arguments in commands_of(path):
        check_command(arguments)


def test_commands_are_found() -> None:
    """The check above would pass on no command at all."""
    assert len(commands_of(LAUNCH / "README.md")) == 2
    assert len(commands_of(ROOT / "examples" / "setups" / "README.md")) == 2
    assert commands_of(LAUNCH / "slurm.sh")[0][:2] == ["pipeline", "--config"]
    assert commands_of(ROOT / "examples" / "setups" / "qwen2.5-7b_tldr.yaml")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def bash(script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher in the project's folder, with this Python's torchrun in the path unless `variables` say else."""
    inherited = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**inherited, "PATH": path, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_torchrun_script_starts_the_job() -> None:
    """A real torchrun, of one node with one process."""
    nodes = {"HEAD_NODE": "127.0.0.1", "NUM_NODES": "1", "NODE_RANK": "0", "PROCESSES": "1", "PORT": "0"}
    result = bash(LAUNCH / "torchrun.sh", "train", "--help", **nodes)
    assert result.returncode == 0, result.stderr
    assert "usage: aligndistil train" in result.stdout
    refused = bash(LAUNCH / "torchrun.sh", "train", NUM_NODES="1")
    assert refused.returncode != 0 and "HEAD_NODE" in refused.stderr and "set it to" in refused.stderr


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A project's folder, and in place of Slurm's commands, which are not here, and of torchrun stand-ins.

    srun runs its command once, as on the second of two nodes; torchrun writes its arguments down and fails.
    """
    replaced = {
        "scontrol": '[ "$1" = show ] && printf "node7\\nnode8\\n" || echo "$@" > "$RECORD/requeued"',
        "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift && SLURM_NODEID=1 exec "$@"',
        "torchrun": 'printf "%s\\n" "$@" > "$RECORD/started"; exit 3',
    }
    for name, body in replaced.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


@pytest.mark.parametrize(("left", "requeued"), [(100, True), (5000, False)], ids=["time is up", "failed early"])
def test_slurm_script(cluster: Path, left: int, requeued: bool) -> None:
    slurm = {
        "SLURM_SUBMIT_DIR": str(cluster),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_END_TIME": str(int(time.time()) + left),
    }
    command = ["pipeline", "--config", "with space.yaml"]
    result = bash(LAUNCH / "slurm.sh", *command, **slurm, RECORD=str(cluster), PATH=f"{cluster}:{os.environ['PATH']}")
    assert result.returncode == 3, result.stderr
    options = get_args_parser().parse_args((cluster / "started").read_text().splitlines())
    assert (options.nnodes, options.node_rank, options.nproc_per_node) == ("2", 1, "8")
    assert (options.master_addr, options.master_port, options.max_restarts) == ("node7", 29500, 0)
    assert options.module and [options.training_script, *options.training_script_args] == [
        "megatron_aligndistil",
        *command,
    ]
    assert (cluster / "requeued").exists() == requeued
    if requeued:
        assert (cluster / "requeued").read_text().split() == ["requeue", "42"]


def test_slurm_signals_in_time_to_save() -> None:
    """Slurm's signal comes before torchrun gives up on a process that saves."""
    (seconds,) = re.findall(r"#SBATCH --signal=TERM@(\d+)", (LAUNCH / "slurm.sh").read_text())
    (patience,) = re.findall(r"SHUTDOWN_TIMEOUT:-(\d+)", (LAUNCH / "torchrun.sh").read_text())
    assert int(patience) < int(seconds)


def test_kubernetes_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts fit together, and the command in it is one that we understand."""
    monkeypatch.chdir(ROOT)
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    spec, name = job["spec"], job["metadata"]["name"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    variables = {item["name"]: item.get("value") for item in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(variables["NUM_NODES"])
    # Kubernetes labels a Job's pods with its name, and calls the first one NAME-0.
    assert "NODE_RANK" in variables
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert variables["HEAD_NODE"] == f"{name}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["PROCESSES"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (patience,) = re.findall(r"SHUTDOWN_TIMEOUT:-(\d+)", (LAUNCH / "torchrun.sh").read_text())
    assert int(patience) < pod["terminationGracePeriodSeconds"]
    assert (ROOT / container["command"][0]).is_file()
    check_command(container["args"])
