"""PPO and RTO end to end: two steps on one rollout are a dense reference's, and a killed run goes on exactly."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from megatron_aligndistil.config import merge
from megatron_aligndistil.engine.completions import Sampling
from megatron_aligndistil.errors import ConfigError
from tests.algorithms.actor_critic import Dense, dense_step
from tests.engine import dense, lives
from tests.engine.test_against_dense import OPTIM, tensors_of
from tests.engine.test_on_policy import configuration, lines_of, run_and_die, run_training, samples
from tests.engine.tiny import make_checkpoint

NAMES = ("policy", "reference", "dpo", "reward", "critic")
SCALAR = ("reward", "critic")
CRITIC_LR, KL, BETA1 = 0.01, 0.05, 0.2
REWARDS = '''
def numbers(prompts, completions):
    """From the numbers of a response's words, and a little from how many words the prompt has."""
    return [
        sum(int(number) % 7 - 3 for number in completion.split("w")[1:]) / 4 + prompt.count("w") / 100
        for prompt, completion in zip(prompts, completions)
    ]


def wrong(prompts, completions):
    return [0.0]
'''


def numbers(prompt: Sequence[int], response: Sequence[int]) -> float:
    """The same from tokens: token n from 3 on is the word wn, the others are special."""
    return sum(token % 7 - 3 for token in response if token > 2) / 4 + sum(token > 2 for token in prompt) / 100


@dataclass(frozen=True)
class Run:
    """An algorithm's settings, where the score at the end comes from, and the weight of the DPO reward of a token."""

    algorithm: dict[str, Any]
    score: str | None
    beta1: float = 0.0


RUNS = {
    "ppo model": Run({"name": "ppo", "reward": "model", "kl": KL}, "model"),
    "ppo function": Run({"name": "ppo", "reward": "function", "kl": KL}, "function"),
    "rto": Run({"name": "rto", "beta1": BETA1, "beta2": KL}, None, BETA1),
    "rto function": Run({"name": "rto", "beta1": BETA1, "beta2": KL, "terminal": "function"}, "function", BETA1),
}
LAYOUTS = {
    "single": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three random language models and two random scalar models of one architecture, prompts, and reward functions."""
    path = tmp_path_factory.mktemp("actor_critic")
    for seed, name in enumerate(NAMES):
        make_checkpoint("qwen2-tied", path / name, seed=seed)
        if name in SCALAR:
            make_scalar(path / name)
    dense.write_pairs(path / "eight.jsonl", vocab_size=300)
    (path / "rewards.py").write_text(REWARDS)
    lines = [{"prompt_tokens": [3, 4], "response_tokens": [5, 1]}] * 8
    (path / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_scalar(folder: Path) -> None:
    """Replace a language model by a random sequence classification model of one label."""
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    model.save_pretrained(folder)


def load_scalar(folder: Path) -> PreTrainedModel:
    """As `dense.load`, for a sequence classification model."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            shape, eps = tuple(module.weight.shape), module.variance_epsilon
            module.forward = partial(rms_norm, normalized_shape=shape, weight=module.weight, eps=eps)
    return model


def state_values(model: Any, tokens: list[int]) -> Tensor:
    """The number at every token, [n], fp64."""
    return model.model(torch.tensor([tokens])).last_hidden_state[0] @ model.score.weight[0]


def settings(folder: Path, out: Path, run: Run, /, **changes: Any) -> dict[str, Any]:
    """Two steps of four prompts each on one rollout of eight."""
    models = {name: str(folder / name) for name in NAMES}
    values = configuration(
        folder,
        out,
        algorithm={**run.algorithm, "critic_lr": CRITIC_LR},
        data={"train": str(folder / "eight.jsonl"), "shuffle": False},
        batch={"global_size": 4, "micro_size": 2},
        rollout={"updates": 2, "reward": f"{folder / 'rewards.py'}:numbers"},
        run={"steps": 2},
        optim=OPTIM,
    )
    return merge(values | {"models": models}, changes)


@dataclass(frozen=True)
class Answered:
    """A prompt and its response with what is known of it before the updates."""

    prompt: list[int]
    response: list[int]
    sampled: list[float]


def chosen(model: PreTrainedModel, row: Answered) -> Tensor:
    """Log-probability of each response token, [n]."""
    logprobs = dense.state_logits(model, row.prompt, row.response).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(row.response)[:, None])[:, 0]


def dense_losses(models: dict[str, PreTrainedModel], rows: Sequence[Answered], run: Run) -> Dense:
    """Rewards by the papers, everything else by `dense_step`."""
    rewards: list[float] = []
    spans: list[slice] = []
    for row in rows:
        spans.append(slice(len(rewards), len(rewards) + len(row.response)))
        with torch.no_grad():
            each = [0.0] * len(row.response)
            if run.beta1:
                each = (run.beta1 * (chosen(models["dpo"], row) - chosen(models["reference"], row))).tolist()
            if run.score == "model":
                each[-1] += float(state_values(models["reward"], row.prompt + row.response)[-1])
            elif run.score == "function":
                each[-1] += numbers(row.prompt, row.response)
        rewards += each
    values_T = torch.cat(
        [state_values(models["critic"], row.prompt + row.response)[len(row.prompt) - 1 : -1] for row in rows]
    )
    with torch.no_grad():
        reference = torch.cat([chosen(models["reference"], row) for row in rows]).tolist()
    policy_T = torch.cat([chosen(models["policy"], row) for row in rows])
    sampled = [logprob for row in rows for logprob in row.sampled]
    return dense_step(spans, rewards, sampled, reference, values_T.tolist(), policy_T, values_T, kl=KL)


def optimiser(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    named = list(model.parameters())
    groups = [
        {"params": [p for p in named if p.dim() == 2], "weight_decay": OPTIM["weight_decay"]},
        {"params": [p for p in named if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=OPTIM["betas"], eps=OPTIM["eps"])


@pytest.mark.parametrize(
    ("name", "layout"),
    [*(("ppo model", layout) for layout in LAYOUTS), ("ppo function", "dp2"), ("rto", "tp2"), ("rto function", "pp2")],
)
def test_two_steps_on_one_rollout(workers, folder: Path, tmp_path: Path, name: str, layout: str) -> None:
    """In the second step the ratios have left 1 and some are clipped; both models' weights are followed to its end."""
    run, (world_size, parallel) = RUNS[name], LAYOUTS[layout]
    workers.run(world_size, run_training, settings(folder, tmp_path, run, parallel=parallel))

    prompts = [record["prompt_tokens"] for record in dense.read_pairs(folder / "eight.jsonl")]
    sampling = Sampling(max_new_tokens=8, seed=0, stop_tokens=frozenset({1}))
    (drawn,) = workers.run(1, samples, str(folder / "policy"), prompts, sampling)
    models = {key: load_scalar(folder / key) if key in SCALAR else dense.load(folder / key) for key in NAMES}
    with torch.no_grad():
        rows = [Answered(prompt, one.tokens, []) for prompt, one in zip(prompts, drawn, strict=True)]
        rows = [Answered(row.prompt, row.response, chosen(models["policy"], row).tolist()) for row in rows]
    optimisers = {"policy": optimiser(models["policy"], OPTIM["lr"]), "critic": optimiser(models["critic"], CRITIC_LR)}
    lines = lines_of(tmp_path)
    for line, batch in zip(lines, (rows[:4], rows[4:]), strict=True):
        found = dense_losses(models, batch, run)
        num_tokens = sum(len(row.response) for row in batch)
        for key, loss, metrics in (
            ("policy", found.policy_loss, found.policy_metrics),
            ("critic", found.critic_loss, found.critic_metrics),
        ):
            models[key].zero_grad()
            (loss / num_tokens).backward()
            parameters = list(models[key].parameters())
            norm = torch.nn.utils.clip_grad_norm_(parameters, OPTIM["clip"])
            optimisers[key].step()
            assert line[f"train/{key}/loss"] == pytest.approx(loss.item() / num_tokens, rel=1e-4, abs=1e-6)
            assert line[f"train/{key}/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
            for metric, (total, count) in metrics.items():
                assert line[f"train/{key}/{metric}"] == pytest.approx(total / count, rel=1e-4, abs=1e-6), metric
    assert 0 < lines[1]["train/policy/clip_share"] < 1
    for key in ("policy", "critic"):
        before, after = tensors_of(folder / key), tensors_of(tmp_path / key)
        for parameter, weight in models[key].named_parameters():
            change = weight.detach() - before[parameter]
            error = after[parameter].double() - weight.detach()
            assert error.norm() < 2e-4 * change.norm() + 1e-7 * weight.norm(), (key, parameter)


def test_a_killed_run_goes_on_exactly(workers, folder: Path, tmp_path: Path) -> None:
    """Killed a step after a checkpoint that holds a rollout, sampled ahead and rated, which is then taken up again.

    The first checkpoint is whole by then: a save begins when the one before it is.
    """
    changes = {
        "rollout": {"updates": 1, "ahead": True, "max_new_tokens": 4},
        "run": {"steps": 6, "save_every": 2, "keep": 9},
        "data": {"shuffle": True},
    }
    run = RUNS["ppo function"]
    workers.run(1, run_training, settings(folder, tmp_path / "whole", run, **changes))
    killed = settings(folder, tmp_path / "killed", run, **changes)
    assert lives.finish(lives.start(1, killed, run_and_die, 5)) == [-signal.SIGKILL]
    checkpoint = tmp_path / "killed" / "checkpoints" / "step_000002"
    (kept,) = json.loads((checkpoint / "progress.json").read_text())["rollouts"]
    answers = kept["completions"]
    assert all(len(each["logprobs"]) == len(each["tokens"]) and each["rating"] is not None for each in answers)
    assert lives.finish(lives.start(1, killed)) == [0]
    last = {line["step"]: line for line in lines_of(tmp_path / "killed")}
    for line in lines_of(tmp_path / "whole"):
        for key in ("policy/loss", "policy/grad_norm", "policy/approx_kl", "critic/loss", "critic/grad_norm"):
            assert last[line["step"]][f"train/{key}"] == line[f"train/{key}"], (key, line["step"])
        assert last[line["step"]]["rollout/reward"] == line["rollout/reward"]
    for name in ("policy", "critic"):
        for key, weight in tensors_of(tmp_path / "whole" / name).items():
            assert torch.equal(weight, tensors_of(tmp_path / "killed" / name)[key]), (name, key)


def test_a_reward_function_measures_other_algorithms_too(workers, folder: Path, tmp_path: Path) -> None:
    """Of training and evaluation, the same at any layout, and without a say in what is learned."""
    algorithm = {"name": "aligndistil", "on_policy": True, "teacher": "vanilla"}
    changes = {
        "data": {"eval": str(folder / "eight.jsonl")},
        "rollout": {"updates": 1, "max_new_tokens": 4, "reward": None},
        "run": {"steps": 1},
    }
    found = {}
    for name, world_size, more in (
        ("unrated", 1, {}),
        ("rated", 1, {"rollout": {"reward": f"{folder / 'rewards.py'}:numbers"}}),
        ("rated dp2", 2, {"rollout": {"reward": f"{folder / 'rewards.py'}:numbers"}}),
    ):
        values = settings(folder, tmp_path / name, RUNS["rto"], **merge(changes, more))
        workers.run(world_size, run_training, values | {"algorithm": algorithm})
        train, evaluation = lines_of(tmp_path / name)
        found[name] = train | evaluation
    assert found["rated"]["train/policy/loss"] == found["unrated"]["train/policy/loss"]
    for key in ("rollout/reward", "rollout/reward_std", "eval/rollout/reward", "eval/rollout/reward_std"):
        assert key not in found["unrated"]
        assert found["rated dp2"][key] == pytest.approx(found["rated"][key], rel=1e-6)

    prompts = [record["prompt_tokens"] for record in dense.read_pairs(folder / "eight.jsonl")][:4]
    sampling = Sampling(max_new_tokens=4, seed=0, stop_tokens=frozenset({1}))
    (drawn,) = workers.run(1, samples, str(folder / "policy"), prompts, sampling)
    numbers_B = torch.tensor([numbers(prompt, one.tokens) for prompt, one in zip(prompts, drawn, strict=True)])
    assert found["rated"]["rollout/reward"] == pytest.approx(float(numbers_B.mean()))
    assert found["rated"]["rollout/reward_std"] == pytest.approx(float(numbers_B.std(correction=0)))
    text = (tmp_path / "rated" / "samples" / "step_000001.txt").read_text()
    assert text.count(" nats, reward ") == 8


def test_what_cannot_be_is_told(workers, folder: Path, tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"reward": None}, "name it in rollout.reward"),
        ({"reward": f"{folder / 'rewards.py'}:absent"}, "has no function absent"),
        ({"reward": f"{folder / 'rewards.py'}:wrong"}, "a list of 1 for 4 completions"),
        ({"on_policy_fraction": 0.5}, "set rollout.on_policy_fraction to 1"),
    )
    for number, (rollout, message) in enumerate(cases):
        out = tmp_path / str(number)
        changes = {"rollout": {"updates": 1, **rollout}, "data": {"train": str(folder / "responses.jsonl")}}
        with pytest.raises(ConfigError, match=message):
            workers.run(2, run_training, settings(folder, out, RUNS["ppo function"], **changes))
        assert not (out / "policy").exists()
