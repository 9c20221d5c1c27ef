"""The commands as a user meets them: real processes, what they print, what they leave behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_aligndistil.commands.launch import JOB_VARIABLES
from tests.engine.tiny import make_checkpoint, make_pairs

ROOT = Path(__file__).parents[2]
PROGRAM = ("-m", "megatron_aligndistil")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
MODELS = ["--models.policy", "policy", "--models.dpo", "dpo", "--models.reverse", "reverse"]
SIZES = ["--data.train", "pairs.jsonl", "--batch.global_size", "8", "--batch.micro_size", "2", "--run.steps", "2"]
ALIGNDISTIL = ["train", "--algorithm.name", "aligndistil", *MODELS, *SIZES]
DPO = ["train", "--algorithm.name", "dpo", "--models.policy", "policy", *SIZES, "--optim.lr", "1e-3"]


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in `folder`, as a user would start it."""
    environment = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def succeeds(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The outcome of a command that has to succeed, without noise from libraries on stderr."""
    result = python(folder, *arguments)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr and "Loading weights" not in result.stderr
    return result


def metrics(folder: Path) -> list[dict[str, float]]:
    """What a run measured, without what depends on the machine's mood."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timing = {"time", "tokens_per_second", "seconds"}
    return [{key: value for key, value in record.items() if not timing & set(key.split("/"))} for record in records]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny models, one of another architecture, pairs, and a folder that holds nothing."""
    folder = tmp_path_factory.mktemp("cli")
    for seed, name in enumerate(("policy", "dpo", "reverse")):
        make_checkpoint("qwen2-tied", folder / name, seed=seed)
    make_checkpoint("llama-tied", folder / "llama")
    make_pairs(folder / "pairs.jsonl", count=16, vocab_size=300)
    (folder / "nothing").mkdir()
    return folder


@pytest.fixture(scope="module")
def dpo_run(folder: Path) -> subprocess.CompletedProcess[str]:
    """A DPO run of two processes into runs/dpo, its pairs also used for evaluation."""
    return succeeds(folder, *PROGRAM, *DPO, "--data.eval", "pairs.jsonl", "--run.dir", "runs/dpo", "--nproc", "2")


def test_help_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not to be imported for this')\n")
    began = time.monotonic()
    result = succeeds(tmp_path, *PROGRAM, "--help")
    assert time.monotonic() - began < 5  # about 0.1 s; torch alone takes longer on a busy machine
    assert all(name in result.stdout for name in ("train", "pipeline", "convert", "generate", "evaluate", "doctor"))
    keys = succeeds(tmp_path, *PROGRAM, "train", "--help").stdout
    assert "--optim.lr  (default 1e-06)" in keys and "--run.dir  (required)" in keys


def test_help_of_an_algorithm_lists_its_keys(tmp_path: Path) -> None:
    keys = succeeds(tmp_path, *PROGRAM, "train", "--algorithm.name", "dpo", "--help").stdout
    assert "--algorithm.beta  (default 0.1)" in keys and "--algorithm.direction" in keys and "--optim.lr" in keys


TWO = ["--nproc", "2"]
WRONG: dict[str, tuple[list[str], str]] = {
    "no such command": (["trian"], "there is no command 'trian'; commands: train, "),
    "misspelt key": ([*ALIGNDISTIL, "--optim.lrr", "1"], "key optim.lrr; did you mean optim.lr?"),
    "key under its long name": ([*ALIGNDISTIL, "--optim.learning_rate", "1"], "did you mean optim.lr?"),
    "misspelt key of the algorithm": ([*DPO, "--algorithm.bet", "1", *TWO], "did you mean algorithm.beta?"),
    "no such algorithm": ([*DPO, "--algorithm.name", "dpoo", *TWO], "unknown algorithm.name 'dpoo'; did you mean dpo?"),
    "keys that are needed": (["train", *TWO], "needs algorithm.name, models.policy, data.train, run.dir; set each"),
    "text for a number": ([*DPO, "--run.steps", "many"], "run.steps = 'many' cannot be used"),
    "not YAML": ([*DPO, "--optim.betas", "[0.9"], "--optim.betas [0.9: the value is not YAML"),
    "no number of processes": ([*DPO, *TWO[:1], "x"], "--nproc x is not a number of processes"),
    "no such configuration": (["train", "--config", "no.yaml"], "cannot read the configuration no.yaml"),
    "layout that does not divide": (
        [*ALIGNDISTIL, "--parallel.tp", "2", "--parallel.pp", "2", *TWO],
        "tp 2 x pp 2 = 4 does not divide the 2 processes started",
    ),
    "tp that does not divide the heads": (
        [*DPO, "--parallel.tp", "3"],
        "the model's 8 attention heads cannot be split over parallel.tp = 3; choose a divisor of 8",
    ),
    "models that differ": (
        [*ALIGNDISTIL, "--models.dpo", "llama", *TWO],
        "policy and dpo differ: model_type qwen2 and llama, ",
    ),
    "no checkpoint": (
        [*ALIGNDISTIL, "--models.policy", "nothing", *TWO],
        "nothing is no checkpoint: it has neither config.json nor metadata.json",
    ),
    "no data": ([*DPO, "--data.train", "no.jsonl"], "there is no data file or folder no.jsonl"),
    "a folder that cannot be made": (
        [*DPO, "--run.dir", "pairs.jsonl/run"],
        "run.dir pairs.jsonl/run cannot be written to",
    ),
    "existing target of a conversion": (
        ["convert", "--source", "policy", "--to", "hf", "--out", "dpo", *TWO],
        "dpo exists already; name a new folder with --out",
    ),
}


def refused(folder: Path, *arguments: str) -> str:
    """The one line that a command says on stderr when it cannot do what it was asked."""
    result = python(folder, *arguments)
    assert result.returncode != 0
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("aligndistil: "), result.stderr
    return lines[0]


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_told_in_one_line(folder: Path, case: str) -> None:
    arguments, expected = WRONG[case]
    known = "--run.dir" in arguments or arguments[:2] == ["train", "--nproc"] or arguments[0] != "train"
    assert expected in refused(folder, *PROGRAM, *arguments, *([] if known else ["--run.dir", "runs/wrong"]))
    assert not (folder / "runs" / "wrong").exists(), "what never began should not claim the folder"


@NO_GPU
def test_fp8_needs_a_gpu(folder: Path) -> None:
    arguments = [*DPO, "--precision.fp8", "hybrid", "--run.dir", "runs/fp8"]
    assert "precision.fp8 needs a GPU" in refused(folder, *PROGRAM, *arguments)


def test_an_error_of_any_one_process_is_told_once(tmp_path: Path) -> None:
    """Rank 1 fails alone, once before the processes have met and once after; rank 0 waits for it in vain."""
    (tmp_path / "failing.py").write_text(
        "import os, sys, types\n"
        "import torch.distributed as dist\n"
        "from megatron_aligndistil.commands import launch\n"
        "launch.GRACE_SECONDS = 1.0\n"
        "from megatron_aligndistil.__main__ import main\n"
        "from megatron_aligndistil.engine.parallel import process_group\n"
        "from megatron_aligndistil.errors import DataError\n"
        "def run(arguments):\n"
        "    if arguments == ['early'] and os.environ['RANK'] == '1':\n"
        "        raise DataError('rank 1 has a problem')\n"
        "    with process_group():\n"
        "        if os.environ['RANK'] == '1':\n"
        "            raise DataError('rank 1 has a problem')\n"
        "        dist.barrier()\n"
        "command = types.ModuleType('failing_command')\n"
        "command.run = run\n"
        "sys.modules['megatron_aligndistil.commands.doctor'] = command\n"
        "if 'RANK' in os.environ:\n"
        "    sys.exit(main(['doctor', *sys.argv[1:]]))\n"
        "sys.exit(launch.run_local(2, sys.argv[1:], module='failing'))\n"
    )
    for when in ("early", "late"):
        assert refused(tmp_path, "-m", "failing", when) == "aligndistil: rank 1 has a problem"


def test_a_run_gives_models_that_transformers_loads(folder: Path, dpo_run: subprocess.CompletedProcess[str]) -> None:
    lines = dpo_run.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == [
        "training data pairs.jsonl",
        "evaluation data pairs.jsonl",
    ]
    assert lines[-1] == "wrote runs/dpo/dpo"
    assert [line.split()[2] for line in dpo_run.stderr.splitlines()] == ["1/2", "2/2"]  # progress, nothing else
    model = AutoModelForCausalLM.from_pretrained(folder / "runs/dpo/dpo")
    assert model(torch.tensor([[0, 7, 8]])).logits.isfinite().all()
    tokenizers = [AutoTokenizer.from_pretrained(folder / name).get_vocab() for name in ("policy", "runs/dpo/dpo")]
    assert tokenizers[0] == tokenizers[1]
    before, after = (load_file(folder / path / "model.safetensors") for path in ("policy", "runs/dpo/dpo"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_runs_own_configuration_repeats_it(folder: Path, dpo_run: subprocess.CompletedProcess[str]) -> None:
    arguments = ["train", "--config", "runs/dpo/config.yaml", "--run.dir", "runs/again", "--nproc", "2"]
    succeeds(folder, *PROGRAM, *arguments)
    assert metrics(folder / "runs/again") == metrics(folder / "runs/dpo")
    assert len(metrics(folder / "runs/dpo")) == 3  # two steps and an evaluation
    before = sorted((folder / "runs/again").rglob("*"))
    result = succeeds(folder, *PROGRAM, *arguments[:-2])  # on one process: any layout may go on with a run
    assert result.stdout == "runs/again is already complete; delete it to train again\n" and result.stderr == ""
    assert sorted((folder / "runs/again").rglob("*")) == before


def test_a_folder_of_another_run_is_left_alone(folder: Path, dpo_run: subprocess.CompletedProcess[str]) -> None:
    arguments = ["train", "--config", "runs/dpo/config.yaml", "--optim.lr", "2e-3", "--nproc", "2"]
    said = refused(folder, *PROGRAM, *arguments)
    assert "runs/dpo holds a run with another configuration (optim.lr: 0.001 there, 0.002 here)" in said


def test_torchrun_starts_the_same_run(folder: Path, dpo_run: subprocess.CompletedProcess[str]) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    arguments = ["train", "--config", "runs/dpo/config.yaml", "--run.dir", "runs/torchrun"]
    succeeds(folder, *torchrun, *PROGRAM, *arguments)
    assert metrics(folder / "runs/torchrun") == metrics(folder / "runs/dpo")


def test_conversion_there_and_back_changes_no_bit(folder: Path) -> None:
    there = ["convert", "--source", "policy", "--to", "megatron", "--out", "megatron"]
    assert succeeds(folder, *PROGRAM, *there).stdout == "wrote megatron\n"
    succeeds(folder, *PROGRAM, "convert", "--source", "megatron", "--to", "hf", "--out", "back")
    before, after = (load_file(folder / name / "model.safetensors") for name in ("policy", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    said = succeeds(folder, str(ROOT / "tools/verify_conversion.py"), "policy", "megatron").stdout
    assert "tensors that differ: 0\n" in said


@pytest.fixture
def pipeline(folder: Path) -> dict[str, Any]:
    """A script makes the data; SFT, sampling and KL follow."""
    shutil.rmtree(folder / "work", ignore_errors=True)
    (folder / "make_data.py").write_text(
        "import os, shutil, sys\n"
        "assert 'RANK' not in os.environ, 'a script is no part of the job'\n"
        "os.makedirs(os.path.dirname(sys.argv[2]), exist_ok=True)\n"
        "shutil.copy(sys.argv[1], sys.argv[2])\n"
    )
    return {
        "dir": "work",
        "vars": {"tokens": 4},
        "stages": [
            {"name": "data", "script": ["make_data.py", "pairs.jsonl", "${dir}/data.jsonl"]},
            {
                "name": "sft",
                "train": {
                    "algorithm": {"name": "sft"},
                    "models": {"policy": "policy"},
                    "data": {"train": "${dir}/data.jsonl"},
                    "batch": {"global_size": 8, "micro_size": 8},
                    "run": {"dir": "${dir}/sft", "steps": 1},
                },
            },
            {
                "name": "sample",
                "generate": {
                    "model": "${dir}/sft/policy",
                    "prompts": "${dir}/data.jsonl",
                    "out": "${dir}/samples.jsonl",
                    "max_new_tokens": "${tokens}",
                },
            },
            {
                "name": "kl",
                "evaluate": {
                    "measure": "kl",
                    "data": "${dir}/samples.jsonl",
                    "models": {"policy": "${dir}/sft/policy", "reference": "policy"},
                    "out": "${dir}/kl.json",
                },
            },
        ],
    }


def test_a_pipeline_does_what_is_not_done(folder: Path, pipeline: dict[str, Any]) -> None:
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    command = [*PROGRAM, "pipeline", "--config", "pipeline.yaml"]

    def stages(*arguments: str) -> dict[str, str]:
        """What became of each stage; every line about one is like `[2/4] sft: done in 3 s`."""
        lines = succeeds(folder, *command, *arguments).stdout.splitlines()
        told = [line.partition("] ")[2].partition(": ") for line in lines if line.startswith("[")]
        return {name: text.split(" in ")[0] for name, _, text in told}

    assert stages() == dict.fromkeys(("data", "sft", "sample", "kl"), "done")
    samples = [json.loads(line) for line in (folder / "work/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16 and max(len(sample["response_tokens"]) for sample in samples) == 4
    first = json.loads((folder / "work/kl.json").read_text())
    assert first["kl_reference"]["count"] == 16

    assert stages() == dict.fromkeys(("data", "sft", "sample", "kl"), "done before")

    assert stages("--vars.tokens", "6") == {"data": "done before", "sft": "done before", "sample": "done", "kl": "done"}
    assert json.loads((folder / "work/kl.json").read_text())["length"]["mean"] > first["length"]["mean"]

    # A trained model is never replaced behind the user's back.
    pipeline["stages"][1]["train"]["optim"] = {"lr": 1e-4}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    assert "work/sft came from the old ones; delete" in refused(folder, *command)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"optim": {"lrr": 1}}, "stage sft: unknown configuration key optim.lrr; did you mean optim.lr?"),
        ({"algorithm": {"name": "sfft"}}, "stage sft: unknown algorithm.name 'sfft'; did you mean sft?"),
        ({"data": {"train": "${corpus}"}}, "stage sft uses ${corpus}, which vars does not have; set --vars.corpus"),
    ],
)
def test_a_pipeline_is_checked_before_it_begins(
    folder: Path, pipeline: dict[str, Any], change: dict[str, Any], expected: str
) -> None:
    pipeline["stages"][1]["train"].update(change)
    (folder / "wrong.yaml").write_text(yaml.safe_dump(pipeline))
    assert expected in refused(folder, *PROGRAM, "pipeline", "--config", "wrong.yaml")
    assert not (folder / "work").exists()
