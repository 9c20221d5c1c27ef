"""Checkpoints that are written while training goes on: what is in them, which are kept, and what goes wrong."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aligndistil.commands.convert import ConvertConfig, convert
from megatron_aligndistil.config import ParallelConfig, PrecisionConfig, TrainConfig, build, merge
from megatron_aligndistil.engine import kept
from megatron_aligndistil.engine.checkpoint import read_architecture, resume_training, take_snapshot
from megatron_aligndistil.engine.hf import draw_weights
from megatron_aligndistil.engine.model import build_model
from megatron_aligndistil.engine.optimiser import Trained, make_trained
from megatron_aligndistil.engine.parallel import parallel_session
from megatron_aligndistil.engine.trainer import train
from megatron_aligndistil.errors import CheckpointError
from tests.engine import dense, lives
from tests.engine.tiny import make_checkpoint

STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("saving")
    make_checkpoint("qwen2-tied", folder / "policy")
    make_checkpoint("qwen2-untied", folder / "another")
    dense.write_pairs(folder / "pairs.jsonl", vocab_size=300)
    return {
        "algorithm": {"name": "dpo"},
        "models": {"policy": str(folder / "policy")},
        "data": {"train": str(folder / "pairs.jsonl")},
        "batch": {"global_size": 4, "micro_size": 2},
        "run": {"dir": str(folder / "run"), "steps": STEPS, "save_every": 2},
        "optim": {"lr": 1e-3, "weight_decay": 0.1},
    }


def run_training(values: dict[str, Any]) -> int:
    """Train; returns the exit code that the process would have."""
    try:
        train(build(TrainConfig, values))
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def run_until(values: dict[str, Any], step: int) -> int:
    """Train and be sent SIGTERM, on the first rank alone, when so many steps have been written down."""

    def ask() -> None:
        while lives.steps_done(Path(values["run"]["dir"])) < step:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ["RANK"] == "0":
        threading.Thread(target=ask, daemon=True).start()
    return run_training(values)


# What a snapshot is


@pytest.mark.parametrize("distributed", [True, False])
def test_later_steps_are_not_in_the_files(workers, base, tmp_path: Path, distributed: bool) -> None:
    settings = {"lr": 0.1, "weight_decay": 0.1, "distributed": distributed}
    workers.run(2, _snapshot_then_step, base["models"]["policy"], settings, str(tmp_path / "step_000001"))


def _snapshot_then_step(path: str, settings: dict[str, Any], folder: str) -> None:
    import torch.distributed as dist

    config = build(
        TrainConfig, {"algorithm": {}, "models": {"policy": path}, "data": {"train": ""}, "run": {"dir": ""}}
    )
    optim = config.optim.model_copy(update=settings)
    arch = read_architecture(path)
    with parallel_session(ParallelConfig()) as parallel:

        def fresh(seed: int) -> Trained:
            chunks = build_model(arch, parallel, PrecisionConfig(dtype="bf16"))
            draw_weights(chunks, arch, parallel, seed)
            return make_trained("policy", chunks, arch, optim, 10, parallel)

        first, second = fresh(0), fresh(1)
        _update(first)
        Path(folder, "policy").mkdir(parents=True, exist_ok=True)
        snapshot = take_snapshot(first, Path(folder) / "policy", path)
        expected = _state(first)
        _update(first)
        assert any(not torch.equal(a, b) for a, b in zip(_state(first), expected, strict=True))
        parts: list[Any] = [None, None]
        dist.all_gather_object(parts, snapshot.write())
        if dist.get_rank() == 0:
            snapshot.finish(parts)
            kept.write_progress(Path(folder), {"step": 1})
        dist.barrier()
        resume_training(Path(folder), [second])
        assert all(torch.equal(a, b) for a, b in zip(_state(second), expected, strict=True))


def _update(item: Trained) -> None:
    item.zero_grad()
    for chunk in item.model.chunks:
        for number, parameter in enumerate(chunk.parameters()):
            parameter.main_grad.fill_(0.01 * (number + 1))  # type: ignore[attr-defined]
    item.step([])


def _state(item: Trained) -> list[torch.Tensor]:
    """Copies of weights, master weights, moments and step counts."""
    tensors = [parameter for chunk in item.model.chunks for parameter in chunk.parameters()]
    for part in getattr(item.optimizer, "chained_optimizers", [item.optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                tensors += [parameter, *(value for _, value in sorted(part.optimizer.state[parameter].items()))]
    return [tensor.detach().clone() for tensor in tensors]


# Which checkpoints stay


def test_the_best_stays_beside_the_last(workers, base, tmp_path: Path) -> None:
    run = {"dir": str(tmp_path), "eval_every": 2, "keep": 1, "best": "highest eval/dpo/loss"}
    values = merge(base, {"run": run, "data": {"eval": base["data"]["train"]}})
    workers.run(2, run_training, merge(values, {"parallel": {"pp": 2}}))
    losses = {int(line["step"]): line["eval/dpo/loss"] for line in lives.lines(tmp_path) if "eval/dpo/loss" in line}
    chosen = max(losses, key=lambda step: losses[step])
    assert chosen != STEPS  # the loss falls, so the highest is not the last
    folder = tmp_path / "checkpoints"
    assert [kept.step_of(path) for path in kept.complete(folder)] == [chosen, STEPS]
    assert (folder / "best").resolve() == folder / f"step_{chosen:06d}"
    workers.run(1, _to_hf, str(folder / "best" / "dpo"), str(tmp_path / "hf"))
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def _to_hf(source: str, out: str) -> None:
    convert(build(ConvertConfig, {"source": source, "to": "hf", "out": out}))


# A request to stop


def test_sigterm_saves_and_the_run_goes_on_elsewhere(workers, base, tmp_path: Path) -> None:
    changes = {"run": {"save_every": STEPS, "eval_every": 1}, "data": {"eval": base["data"]["train"]}}
    values = merge(merge(base, changes), {"precision": {"dtype": "bf16"}})
    whole, stopped = (merge(values, {"run": {"dir": str(tmp_path / name)}}) for name in ("whole", "stopped"))
    assert workers.run(2, run_training, whole) == [0, 0]
    assert workers.run(2, run_until, stopped, 2) == [143, 143]
    found = kept.latest(tmp_path / "stopped" / "checkpoints")
    assert found is not None and 2 <= kept.step_of(found) < STEPS
    assert kept.read_progress(found)["evaluation"] is None  # left for the next start
    assert workers.run(2, run_training, stopped) == [0, 0]
    assert lives.lines(tmp_path / "stopped") == lives.lines(tmp_path / "whole")


def test_a_rollout_in_use_is_kept(workers, base, tmp_path: Path) -> None:
    values = merge(
        base,
        {
            "algorithm": {"name": "aligndistil", "on_policy": True},
            "models": {"dpo": base["models"]["policy"], "reverse": base["models"]["policy"]},
            "rollout": {"max_new_tokens": 4, "updates": 4, "ahead": True},
            "run": {"save_every": STEPS, "steps": 8},
        },
    )
    whole, stopped = (merge(values, {"run": {"dir": str(tmp_path / name)}}) for name in ("whole", "stopped"))
    assert workers.run(2, run_training, whole) == [0, 0]
    assert workers.run(2, run_until, stopped, 1) == [143, 143]
    assert workers.run(2, run_training, stopped) == [0, 0]
    assert _without_speed(tmp_path / "stopped") == _without_speed(tmp_path / "whole")


def _without_speed(folder: Path) -> list[dict[str, float]]:
    return [
        {key: value for key, value in line.items() if "tokens_per_second" not in key} for line in lives.lines(folder)
    ]


# What goes wrong


@pytest.fixture(scope="module")
def unfinished(base) -> dict[str, Any]:
    return merge(base, {"run": {"save_every": 1, "keep": 2, "steps": 40}, "parallel": {"tp": 2}})


@pytest.fixture(scope="module")
def stopped(workers, unfinished) -> Path:
    """A run with two checkpoints that has not come to its end."""
    values = unfinished
    assert workers.run(2, run_until, values, 4) == [143, 143]
    return Path(values["run"]["dir"])


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("dpo/__1_0.distcp", _truncate, "has .* bytes and was written with"),
        ("dpo/__0_0.distcp", _flip, "its checksum is not"),
        ("dpo/.metadata", _flip, "its checksum is not"),
        ("dpo/common.pt", Path.unlink, "is missing"),
        ("dpo/manifest.json", _truncate, "is not the list of files"),
        ("progress.json", _flip, "is not what was written"),
    ],
)
def test_a_damaged_file_is_named(
    workers, unfinished, stopped: Path, file: str, damage: Callable[[Path], None], says: str
) -> None:
    older, newest = kept.complete(stopped / "checkpoints")
    path = newest / file
    content = path.read_bytes()
    damage(path)
    try:
        with pytest.raises(CheckpointError, match=rf"{path} .*{says}.*; delete {newest} to go on from {older}"):
            workers.run(2, run_training, unfinished)
    finally:
        path.write_bytes(content)


class Malicious:
    """Runs code where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_loading_runs_nothing(workers, base, stopped: Path, tmp_path: Path, file: str) -> None:
    model = kept.complete(stopped / "checkpoints")[0] / "dpo"
    copy = tmp_path / "model"
    _copy_without_manifest(model, copy)
    with (copy / file).open("wb") as stream:
        if file == "common.pt":
            torch.save({"optimizer": Malicious(tmp_path / "trace")}, stream)
        else:
            pickle.dump(Malicious(tmp_path / "trace"), stream)
    with pytest.raises(CheckpointError, match=f"{copy} cannot be read: {file} names posix.mkdir, and reading it would"):
        workers.run(1, _to_hf, str(copy), str(tmp_path / "hf"))
    assert not (tmp_path / "trace").exists()


def test_another_architecture_is_told(workers, base, stopped: Path, tmp_path: Path) -> None:
    newest = kept.complete(stopped / "checkpoints")[-1]
    copy = tmp_path / "model"
    _copy_without_manifest(newest / "dpo", copy)
    config = (copy / "hf" / "config.json").read_text()
    (copy / "hf" / "config.json").write_text(config.replace('"intermediate_size": 48', '"intermediate_size": 64'))
    with pytest.raises(CheckpointError, match="linear_fc1.weight is 4x96x32 there and 4x128x32 here, "):
        workers.run(1, _to_hf, str(copy), str(tmp_path / "hf"))


def _copy_without_manifest(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target)
    (target / "manifest.json").unlink()


def test_a_full_disk_ends_nothing(workers, base, tmp_path: Path) -> None:
    values = merge(base, {"run": {"dir": str(tmp_path), "save_every": 1, "steps": 12}, "parallel": {"tp": 2}})
    workers.run(2, run_until, values, 1)
    before = kept.complete(tmp_path / "checkpoints")
    step = kept.step_of(before[-1])
    said = tmp_path / "said"
    assert workers.run(2, with_little_room, str(said), run_until, values, step + 2) == [143, 143]
    assert kept.complete(tmp_path / "checkpoints") == before
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    told = said.read_text()
    assert told.count(f"the checkpoint of step {step + 1} could not be saved (File too large: ") == 1
    assert f"the last complete one is {before[-1]}" in told
    assert f"the same command goes on from {before[-1]}" in told
    single = merge(values, {"parallel": {"tp": 1}})
    with pytest.raises(OSError, match="File too large"):
        workers.run(1, with_little_room, str(said), run_training, single)  # the exported model has no room either
    assert lives.steps_done(tmp_path) == 12
    assert workers.run(1, run_training, single) == [0]
    assert [line["step"] for line in lives.lines(tmp_path)] == list(range(1, 13))


def with_little_room(said: str, function: Callable[..., int], *args: Any) -> int:
    """Call a function where no file can have more than 100 KB; what it says goes to the file `said`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with Path(said).open("a") as file, redirect_stderr(file):
            return function(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
