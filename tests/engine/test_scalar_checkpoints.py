"""Checkpoints of models with one row for an output layer, in both formats, and started from language models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aligndistil.algorithms.base import Algorithm
from megatron_aligndistil.commands.convert import ConvertConfig, convert
from megatron_aligndistil.config import ModelsConfig, ParallelConfig, PrecisionConfig, build
from megatron_aligndistil.engine.checkpoint import description_folder, load_model, read_architecture
from megatron_aligndistil.engine.hf import global_parameters, save_folder, stored_dtype
from megatron_aligndistil.engine.model import build_model
from megatron_aligndistil.engine.parallel import parallel_session
from megatron_aligndistil.engine.sources import find_sources
from megatron_aligndistil.errors import CheckpointError, ConfigError
from megatron_aligndistil.models.architecture import require_same
from tests.engine.test_hf import assert_same, tensors_of
from tests.engine.tiny import make_checkpoint
from tests.models.tiny import make

LAYOUTS = {
    "one": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tp=2)),
    "pp2": (2, ParallelConfig(pp=2)),
    "tp2 pp2": (4, ParallelConfig(tp=2, pp=2)),
}


def run_conversion(values: dict[str, Any]) -> None:
    convert(build(ConvertConfig, values))


@pytest.mark.parametrize("name", ["qwen2-tied", "llama-untied"])
def test_conversion_and_back_is_bit_for_bit(workers, name: str, tmp_path: Path) -> None:
    source, between, target = (tmp_path / part for part in ("source", "between", "target"))
    make(name, source, torch.bfloat16, scalar=True, pad_token_id=7)
    to = {"source": str(source), "to": "megatron", "out": str(between), "parallel": {"tp": 2}}
    workers.run(2, run_conversion, to)
    assert stored_dtype(between) == "bf16" and read_architecture(between, "scalar").head == "scalar"
    back = {"source": str(between), "to": "hf", "out": str(target), "parallel": {"pp": 2}}
    workers.run(2, run_conversion, back)
    assert_same(tensors_of(target), tensors_of(source))
    assert json.loads((target / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def start(source: str, target: str, layout: ParallelConfig, seed: int) -> None:
    """A scalar model made of what lies at `source`, as a folder."""
    with parallel_session(layout) as parallel:
        arch = read_architecture(source, "any").scalar()
        chunks = build_model(arch, parallel, PrecisionConfig(dtype="fp32"))
        for _, parameter in global_parameters(chunks):
            parameter.data.fill_(float("nan"))
        load_model(chunks, source, arch, parallel, seed)
        save_folder(chunks, arch, description_folder(source), target, parallel=parallel)


@pytest.mark.parametrize("name", ["qwen2-tied", "llama-untied"])
def test_a_language_model_gives_the_body_and_the_seed_the_row(workers, name: str, tmp_path: Path) -> None:
    folder, distributed = tmp_path / "lm", tmp_path / "distributed"
    make(name, folder)
    workers.run(2, run_conversion, {"source": str(folder), "to": "megatron", "out": str(distributed)})
    made = {}
    for source in (folder, distributed):
        for layout in ("one", "tp2 pp2"):
            target = tmp_path / f"{source.name} {layout}"
            world_size, config = LAYOUTS[layout]
            workers.run(world_size, start, str(source), str(target), config, 5)
            made[target.name] = tensors_of(target)
    first = made.pop("lm one")
    for other in made.values():
        assert_same(other, first)
    body = {key: tensor for key, tensor in tensors_of(folder).items() if key != "lm_head.weight"}
    score = first.pop("score.weight")
    assert_same(first, body)
    assert score.shape == (1, 32) and 0.005 < score.std() < 0.05
    workers.run(1, start, str(folder), str(tmp_path / "other"), ParallelConfig(), 6)
    assert not torch.equal(tensors_of(tmp_path / "other")["score.weight"], score)


def test_a_reward_checkpoint_is_read_whole_whatever_the_format(workers, tmp_path: Path) -> None:
    folder, distributed = tmp_path / "reward", tmp_path / "distributed"
    make("qwen2-tied", folder, scalar=True)
    workers.run(2, run_conversion, {"source": str(folder), "to": "megatron", "out": str(distributed)})
    for source, layout in ((folder, "pp2"), (distributed, "tp2")):
        target = tmp_path / layout
        workers.run(2, start, str(source), str(target), LAYOUTS[layout][1], 5)
        assert_same(tensors_of(target), tensors_of(folder))


def test_the_body_is_compared_and_the_head_is_not(tmp_path: Path) -> None:
    make("qwen2-tied", tmp_path / "lm")
    make("qwen2-tied", tmp_path / "reward", scalar=True)
    make("qwen2-tied", tmp_path / "wider", scalar=True, intermediate_size=64)
    models = {name: read_architecture(tmp_path / name, "any") for name in ("lm", "reward", "wider")}
    require_same({name: models[name] for name in ("lm", "reward")})
    with pytest.raises(CheckpointError, match="lm and wider differ: ffn_hidden_size 48 and 64;"):
        require_same(models)


def test_a_model_of_the_wrong_kind_is_told_in_one_sentence(tmp_path: Path) -> None:
    make("llama-untied", tmp_path / "lm")
    make("llama-untied", tmp_path / "reward", scalar=True)
    make("llama-untied", tmp_path / "topics", scalar=True, num_labels=3)
    with pytest.raises(CheckpointError, match="reward is a reward model .* language model is needed"):
        read_architecture(tmp_path / "reward")
    with pytest.raises(CheckpointError, match="lm is a language model, and a reward model .* `algorithm.name: reward`"):
        read_architecture(tmp_path / "lm", "scalar")
    with pytest.raises(CheckpointError, match=r"config.json has 3 labels, and only sequence classification with 1"):
        read_architecture(tmp_path / "topics", "any")


class ActorCritic(Algorithm):
    """A policy with a critic; nothing of it is computed here."""

    name = "actor_critic"
    data = "prompts"
    trained = ("policy", "critic")  # type: ignore[assignment]
    frozen = {"reference": "logprobs", "reward": "score", "policy": "logprobs"}  # type: ignore[assignment]

    def head(self, model: str):
        return "values" if model == "critic" else "lm"

    def loss(self, model, head, responses, frozen):
        raise NotImplementedError


def test_where_models_start_from(tmp_path: Path) -> None:
    make_checkpoint("qwen2-tied", tmp_path / "sft")
    for name in ("reward", "critic"):
        make_checkpoint("qwen2-tied", tmp_path / name, scalar=True)
    algorithm = ActorCritic(None)
    paths = {name: str(tmp_path / name) for name in ("sft", "reward", "critic")}

    def found(**models: str) -> dict[str, str]:
        config = ModelsConfig(policy=paths["sft"], **{name: paths[path] for name, path in models.items()})
        return {name: Path(source.path).name for name, source in find_sources(config, algorithm).items()}

    rest = {"policy": "sft", "reference": "sft", "reward": "reward"}
    assert found(reward="reward") == {"critic": "reward", **rest}
    assert found(reward="reward", critic="critic") == {"critic": "critic", **rest}
    assert found(reward="reward", critic="sft") == {"critic": "sft", **rest}
    with pytest.raises(ConfigError, match="actor_critic needs a frozen reward model; set models.reward"):
        found()
    with pytest.raises(CheckpointError, match="sft is a language model"):
        found(reward="sft")
    scalar = find_sources(ModelsConfig(policy=paths["sft"], reward=paths["reward"], critic=paths["sft"]), algorithm)
    assert {name: source.arch.head for name, source in scalar.items()} == {
        "policy": "lm",
        "critic": "scalar",
        "reference": "lm",
        "reward": "scalar",
    }
