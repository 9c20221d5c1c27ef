"""An independent reference for a training step: whole logits in fp64, plain autograd, straight from the equations.

Nothing here comes from the package: rows are token lists run one at a time without padding, positions are counted by
hand, and models are transformers'.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, rms_norm
from transformers import AutoModelForCausalLM, PreTrainedModel

Models = Mapping[str, PreTrainedModel]
Record = Mapping[str, list[int]]
Loss = Callable[[Models, Sequence[Record]], Tensor]

# One token of prompt, one of response, both at once, and rows of every length; the longest row is a chosen response.
_LENGTHS = [(1, 5, 3), (4, 1, 7), (1, 1, 1), (6, 9, 2), (3, 2, 11), (2, 14, 6), (9, 4, 1), (1, 12, 10)]


def write_pairs(path: Path, vocab_size: int) -> list[Record]:
    """Write eight preference pairs of random tokens as JSONL; returns what the file holds."""
    generator = torch.Generator().manual_seed(11)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, vocab_size, (count,), generator=generator).tolist()

    names = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
    lines = [json.dumps({name: tokens(n) for name, n in zip(names, sizes, strict=True)}) for sizes in _LENGTHS]
    path.write_text("\n".join(lines) + "\n")
    return read_pairs(path)


def read_pairs(path: Path) -> list[Record]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def load(folder: Path, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """A transformers model in fp64, its norms too (transformers takes them in fp32 whatever the dtype).

    `kind` is the auto class.
    """
    model = kind.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            shape, eps = tuple(module.weight.shape), module.variance_epsilon
            module.forward = partial(rms_norm, normalized_shape=shape, weight=module.weight, eps=eps)
    return model


def state_logits(model: PreTrainedModel, prompt: list[int], response: list[int], late: bool = False) -> Tensor:
    """Logits [n, V] of the n states that predict the response; with `late`, of the states one token further on."""
    logits = model(torch.tensor([prompt + response])).logits[0]
    assert logits.dtype == torch.float64
    first = len(prompt) if late else len(prompt) - 1
    return logits[first : first + len(response)]


def response_logprob(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """Summed log-probability of a response."""
    logprobs = state_logits(model, prompt, response).log_softmax(-1)
    return torch.stack([logprobs[index, token] for index, token in enumerate(response)]).sum()


def token_values(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """What a scalar model says at each token [prompt + response]; the last is the score of the row."""
    return model.score(model.model(torch.tensor([prompt + response])).last_hidden_state)[0, :, 0]


def reward(models: Models, records: Sequence[Record], *, center: float = 0.0) -> Tensor:
    """Equation 1, and the mean of the squared sum of a pair's rewards."""
    chosen, rejected = (
        torch.stack([token_values(models["policy"], r["prompt_tokens"], r[name])[-1] for r in records])
        for name in ("chosen_tokens", "rejected_tokens")
    )
    return (-logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2).mean()


def sft(models: Models, records: Sequence[Record]) -> Tensor:
    """Mean negative log-likelihood of the chosen responses' tokens."""
    total = sum(response_logprob(models["policy"], r["prompt_tokens"], r["chosen_tokens"]) for r in records)
    return -total / sum(len(record["chosen_tokens"]) for record in records)


def dpo(models: Models, records: Sequence[Record], *, beta: float, winner: str, loser: str) -> Tensor:
    """Equation 4, the pair turned round for the reverse model."""

    def advantage(record: Record, response: str) -> Tensor:
        row = record["prompt_tokens"], record[response]
        with torch.no_grad():
            reference = response_logprob(models["reference"], *row)
        return response_logprob(models["policy"], *row) - reference

    margins = torch.stack([beta * (advantage(r, winner) - advantage(r, loser)) for r in records])
    return -logsigmoid(margins).mean()


def aligndistil(
    models: Models,
    records: Sequence[Record],
    *,
    teacher: str,
    beta0: float,
    beta: float,
    r: float,
    eps: float,
    compat: bool = False,
) -> Tensor:
    """Equation 19 with the teacher of equation 11, 15 or 17; `compat` is what the authors' code does instead."""
    against = models["reference" if teacher.startswith("vanilla") else "reverse"]
    rows = []
    for record in records:
        row = record["prompt_tokens"], record["chosen_tokens"]
        with torch.no_grad():
            z_dpo, z_against = (state_logits(model, *row, late=compat) for model in (models["dpo"], against))
            tvd = (z_dpo.softmax(-1) - z_against.softmax(-1)).abs().sum(-1) * (1.0 if compat else 0.5)
            alpha = r * tvd + eps if "adaptive" in teacher else torch.full_like(tvd, beta0 / beta)
            if teacher.startswith("vanilla"):
                z_star = alpha[:, None] * z_dpo + (1 - alpha[:, None]) * z_against
            else:
                z_star = z_dpo + alpha[:, None] * (z_dpo - z_against)
        logp = state_logits(models["policy"], *row, late=compat).log_softmax(-1)
        kl = (logp.exp() * (logp - z_star.log_softmax(-1))).sum(-1)
        rows.append((beta0 / alpha * kl).sum() / len(record["chosen_tokens"]))
    return torch.stack(rows).mean()


def reinforce(models: Models, records: Sequence[Record], *, level: str, beta0: float, beta: float) -> Tensor:
    """Equations 42 and 43, with the reward as a plain number; the response of a record is what was sampled."""
    rows = []
    for record in records:
        row, response = (record["prompt_tokens"], record["chosen_tokens"]), record["chosen_tokens"]

        def chosen(name: str, row=row, response=response) -> Tensor:
            logprobs = state_logits(models[name], *row).log_softmax(-1)
            return torch.stack([logprobs[index, token] for index, token in enumerate(response)])

        logp = chosen("policy")
        with torch.no_grad():
            dpo, reverse = chosen("dpo"), chosen("reverse")
            reward = beta0 * (dpo - reverse) - beta * (logp - dpo)
            weight = reward.sum().expand_as(reward) if level == "sentence" else reward
        rows.append(-(weight * logp).sum() / len(response))
    return torch.stack(rows).mean()


@dataclass(frozen=True)
class Step:
    """What one optimiser step saw and did; tensors by transformers' parameter names, a tied one once."""

    loss: float
    grad_norm: float
    grads: dict[str, Tensor]
    weights: dict[str, Tensor]


def first_step(models: Models, records: Sequence[Record], loss: Loss, optim: Mapping[str, Any]) -> Step:
    """Loss, gradient before clipping, and the policy's weights after one AdamW step; the policy is changed.

    Weight decay, as Megatron has it, is for matrices only.
    """
    policy = models["policy"]
    policy.zero_grad()
    value = loss(models, records)
    value.backward()
    named = dict(policy.named_parameters())
    grads = {name: parameter.grad.clone() for name, parameter in named.items()}
    norm = torch.nn.utils.clip_grad_norm_(named.values(), optim["clip"])
    groups = [
        {"params": [p for p in named.values() if p.dim() == 2], "weight_decay": optim["weight_decay"]},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=optim["lr"], betas=optim["betas"], eps=optim["eps"]).step()
    return Step(value.item(), norm.item(), grads, {name: p.detach().clone() for name, p in named.items()})
