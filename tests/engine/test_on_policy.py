"""On-policy training: its first step is a dense reference's, its options do what they say, and a killed run goes on."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aligndistil.config import ParallelConfig, PrecisionConfig, merge
from megatron_aligndistil.engine import trainer
from megatron_aligndistil.engine.checkpoint import load_model, read_architecture
from megatron_aligndistil.engine.completions import Completion, Sampling
from megatron_aligndistil.engine.generate import MegatronSampler
from megatron_aligndistil.engine.model import build_model
from megatron_aligndistil.engine.parallel import parallel_session
from megatron_aligndistil.engine.schedule import Model
from megatron_aligndistil.errors import ConfigError
from tests.engine import dense, lives
from tests.engine.lives import run_training
from tests.engine.test_against_dense import DISTIL, OPTIM, tensors_of
from tests.engine.tiny import make_checkpoint, make_pairs

NAMES = ("policy", "dpo", "reverse")
LOSSES: dict[str, tuple[dict[str, Any], dense.Loss]] = {
    "aligndistil": (
        {"name": "aligndistil", "on_policy": True, **DISTIL},
        partial(dense.aligndistil, teacher="adaptive", **DISTIL),
    ),
    **{
        level: (
            {"name": "reinforce", "level": level, "beta0": 0.5, "beta": 0.2},
            partial(dense.reinforce, level=level, beta0=0.5, beta=0.2),
        )
        for level in ("token", "sentence")
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three random models of one architecture, eight prompts for the reference, and 32 pairs."""
    path = tmp_path_factory.mktemp("on_policy")
    for seed, name in enumerate(NAMES):
        make_checkpoint("qwen2-tied", path / name, seed=seed)
    dense.write_pairs(path / "eight.jsonl", vocab_size=300)
    make_pairs(path / "pairs.jsonl", count=32, vocab_size=300)
    return path


def configuration(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "algorithm": changes.pop("algorithm", {"name": "aligndistil", "on_policy": True}),
        "models": {name: str(folder / name) for name in NAMES},
        "data": {"train": str(folder / "pairs.jsonl")},
        "batch": {"global_size": 8, "micro_size": 2},
        "rollout": {"max_new_tokens": 8, "batch_size": 3},
        "run": {"dir": str(out), "steps": 4},
        "optim": {"lr": 1e-3},
        "precision": {"dtype": "fp32"},
    }
    return merge(values, changes)


def lines_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def samples(folder: str, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion | None]:
    with parallel_session(ParallelConfig()) as parallel:
        arch = read_architecture(folder)
        chunks = build_model(arch, parallel, PrecisionConfig(dtype="fp32"))
        load_model(chunks, folder, arch, parallel)
        return MegatronSampler(Model(chunks, arch), parallel, 4, str).generate(prompts, sampling)


@pytest.mark.parametrize(("world_size", "layout"), [(1, {}), (4, {"tp": 2, "pp": 2}), (2, {"pp": 2, "vpp": 2})])
@pytest.mark.parametrize("name", LOSSES)
def test_first_step(workers, folder: Path, tmp_path: Path, name: str, world_size: int, layout: dict[str, int]) -> None:
    """Loss, gradient norm and every updated weight on the samples that the run draws, against plain fp64 autograd."""
    algorithm, loss = LOSSES[name]
    values = configuration(
        folder,
        tmp_path,
        algorithm=algorithm,
        data={"train": str(folder / "eight.jsonl"), "shuffle": False},
        run={"steps": 1},
        optim=OPTIM,
        parallel=layout,
    )
    workers.run(world_size, run_training, values)

    prompts = [record["prompt_tokens"] for record in dense.read_pairs(folder / "eight.jsonl")]
    sampling = Sampling(max_new_tokens=8, seed=0, stop_tokens=frozenset({1}))
    (drawn,) = workers.run(1, samples, str(folder / "policy"), prompts, sampling)
    records = [
        {"prompt_tokens": prompt, "chosen_tokens": completion.tokens}
        for prompt, completion in zip(prompts, drawn, strict=True)
    ]
    models = {key: dense.load(folder / key) for key in NAMES}
    step = dense.first_step(models, records, loss, OPTIM)
    (line,) = lines_of(tmp_path)
    assert line["train/policy/loss"] == pytest.approx(step.loss, rel=2e-5)
    assert line["train/policy/grad_norm"] == pytest.approx(step.grad_norm, rel=5e-5)
    before, after = tensors_of(folder / "policy"), tensors_of(tmp_path / "policy")
    for key, weight in step.weights.items():
        change, found = weight - before[key], after[key].double() - before[key].double()
        assert (found - change).norm() < 1e-4 * change.norm() + 6e-8 * weight.norm(), key


def test_several_samples_and_updates(workers, folder: Path, tmp_path: Path) -> None:
    """Two answers a prompt and two updates a rollout: the same under data parallelism, and as stale as it says."""
    changes = {
        "rollout": {"samples": 2, "updates": 2},
        "run": {"steps": 5},
        "data": {"eval": str(folder / "eight.jsonl")},
    }
    runs = {}
    for name, world_size in (("alone", 1), ("dp2", 2)):
        workers.run(world_size, run_training, configuration(folder, tmp_path / name, **changes))
        runs[name] = [line for line in lines_of(tmp_path / name) if "train/policy/loss" in line]
    assert [line["rollout/staleness"] for line in runs["alone"]] == [0, 1, 0, 1, 0]
    for one, other in zip(runs["alone"], runs["dp2"], strict=True):
        assert other["train/policy/loss"] == pytest.approx(one["train/policy/loss"], rel=1e-4)
        assert other["rollout/length"] == one["rollout/length"]
    text = (tmp_path / "alone" / "samples" / "step_000005.txt").read_text()
    assert text == (tmp_path / "dp2" / "samples" / "step_000005.txt").read_text()
    assert text.count("--- prompt") == text.count("--- response") == 8


def test_mixing_goes_from_off_policy_to_on_policy(workers, folder: Path, tmp_path: Path) -> None:
    given = configuration(folder, tmp_path / "given", algorithm={"name": "aligndistil"})
    sampled = configuration(folder, tmp_path / "sampled")
    workers.run(1, run_training, given)
    workers.run(1, run_training, sampled)
    for fraction, same in ((0.0, "given"), (1.0, "sampled"), (0.5, None)):
        run = tmp_path / f"mixed {fraction}"
        workers.run(1, run_training, configuration(folder, run, rollout={"on_policy_fraction": fraction}))
        for line, one, other in zip(
            lines_of(run), lines_of(tmp_path / "given"), lines_of(tmp_path / "sampled"), strict=True
        ):
            loss, bounds = line["train/policy/loss"], {"given": one, "sampled": other}
            if same is not None:
                assert loss == bounds[same]["train/policy/loss"]
            else:
                assert loss not in [bound["train/policy/loss"] for bound in bounds.values()]


def test_sampling_one_rollout_ahead(workers, folder: Path, tmp_path: Path) -> None:
    """The first two rollouts are drawn with the initial weights, each later one with those before the last update."""
    ahead = {"rollout": {"ahead": True}, "optim": {"lr": 0.01}}
    runs = {}
    for name, world_size, changes in (
        ("alone", 1, ahead),
        ("tp2", 2, merge(ahead, {"parallel": {"tp": 2}})),
        ("pp2", 2, merge(ahead, {"parallel": {"pp": 2}})),
        ("dp2", 2, ahead),
        ("still", 1, {"optim": {"lr": 1e-12}}),
    ):
        workers.run(world_size, run_training, configuration(folder, tmp_path / name, **changes))
        runs[name] = lines_of(tmp_path / name)
    assert [line["rollout/staleness"] for line in runs["alone"]] == [0, 1, 1, 1]
    for name in ("tp2", "pp2", "dp2"):
        for one, other in zip(runs["alone"], runs[name], strict=True):
            assert other["train/policy/loss"] == pytest.approx(one["train/policy/loss"], rel=1e-3), name
            assert other["train/policy/reward_token"] == pytest.approx(one["train/policy/reward_token"], rel=1e-3), name
    # The sampled reward depends on the samples and on frozen models: it tells which samples they were.
    drawn = {name: [line["train/policy/reward_token"] for line in lines] for name, lines in runs.items()}
    assert drawn["alone"][:2] == pytest.approx(drawn["still"][:2], rel=1e-5)
    assert drawn["alone"][2] != pytest.approx(drawn["still"][2], rel=1e-2)


def run_and_die(values: dict[str, Any], step: int) -> None:
    """A run whose processes are killed when they have sampled the batch of a step and not yet scored it."""
    score, count = trainer.prepare, 0

    def dying(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(*args)

    trainer.prepare = dying  # the process does not outlive it
    run_training(values)


@pytest.mark.parametrize(
    ("updates", "save_every", "killed_at", "ahead"), [(1, 2, 4, False), (2, 3, 6, False), (1, 2, 5, True)]
)
def test_a_run_killed_between_rollout_and_update_goes_on_exactly(
    folder: Path, tmp_path: Path, updates: int, save_every: int, killed_at: int, ahead: bool
) -> None:
    """With updates 2 and a checkpoint every 3 steps, the run goes on in the middle of a rollout."""
    changes = {
        "rollout": {"updates": updates, "ahead": ahead},
        "run": {"steps": 6, "save_every": save_every},
        "parallel": {"tp": 2},
    }
    assert lives.finish(lives.start(2, configuration(folder, tmp_path / "whole", **changes))) == [0, 0]
    killed = configuration(folder, tmp_path / "killed", **changes)
    assert lives.finish(lives.start(2, killed, run_and_die, killed_at)) == [-signal.SIGKILL] * 2
    assert not (tmp_path / "killed" / "policy").exists()
    assert lives.finish(lives.start(2, killed)) == [0, 0]
    last = {line["step"]: line for line in lines_of(tmp_path / "killed")}
    for line in lines_of(tmp_path / "whole"):
        for key in ("train/policy/loss", "train/policy/grad_norm", "rollout/length"):
            assert last[line["step"]][key] == line[key], (key, line["step"])
    for key, weight in tensors_of(tmp_path / "whole" / "policy").items():
        assert torch.equal(weight, tensors_of(tmp_path / "killed" / "policy")[key]), key


def test_what_cannot_be_is_told(workers, folder: Path, tmp_path: Path) -> None:
    for rollout, message in (
        ({"samples": 3}, "multiple of 3"),
        ({"samples": 2, "on_policy_fraction": 0.5}, "rollout.samples"),
        ({"max_new_tokens": 1000}, "positions"),
    ):
        values = configuration(folder, tmp_path / "bad", rollout=rollout, run={"save_every": 1})
        with pytest.raises(ConfigError, match=message):
            workers.run(1, run_training, values)
        assert not (tmp_path / "bad" / "policy").exists()
