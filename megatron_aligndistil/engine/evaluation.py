"""Measuring frozen models on a dataset: which response a reward prefers, and how far apart two models are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.algorithms.base import Frozen
from megatron_aligndistil.data.batch import MicroBatch, Responses
from megatron_aligndistil.data.loader import GlobalBatches
from megatron_aligndistil.engine.parallel import Parallel
from megatron_aligndistil.engine.schedule import Model, Need, frozen_outputs
from megatron_aligndistil.ops.logprobs import expectations

# name -> one value an example (a pair or a row) of a micro-batch; filler examples left out
Measure = Callable[[Responses, Mapping[str, Frozen]], dict[str, Tensor]]


@dataclass(frozen=True)
class Estimate:
    """A mean over examples with its standard error."""

    mean: float
    stderr: float
    count: int


def evaluate(
    models: Mapping[str, Model],
    needs: Mapping[str, Need],
    measure: Measure,
    batches: GlobalBatches,
    parallel: Parallel,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Estimate]:
    """Means of `measure` over one epoch of `batches`; empty on stages before the last.

    `needs` says for each model what `measure` wants of it. Runs every model forward only through the pipeline.
    Collectives beyond the models' own: those of `measure`, and one all-reduce of a few numbers over the data parallel
    group.
    """
    totals: dict[str, Tensor] = {}
    for step in range(batches.steps_per_epoch):
        local = [batch.to(parallel.backend.device) for batch in batches.at(step)]
        outputs = {name: frozen_outputs(model, needs[name], local, parallel) for name, model in models.items()}
        if parallel.is_last_stage:
            for name, values in _measure(local, outputs, measure).items():
                totals[name] = totals.get(name, 0) + torch.stack(
                    [values.new_tensor(len(values)), values.sum(), (values**2).sum()]
                )
        on_progress(step + 1)
    return {name: _estimate(total, parallel) for name, total in sorted(totals.items())}


@torch.no_grad()
def _measure(
    batches: Sequence[MicroBatch], outputs: Mapping[str, Sequence[Frozen]], measure: Measure
) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for index, batch in enumerate(batches):
        for name, values in measure(batch.responses, {key: each[index] for key, each in outputs.items()}).items():
            found.setdefault(name, []).append(values.double())
    return {name: torch.cat(values) for name, values in found.items()}


def _estimate(total: Tensor, parallel: Parallel) -> Estimate:
    dist.all_reduce(total, group=parallel.dp_group)
    count, first, second = total.tolist()
    mean = first / max(count, 1)
    variance = max(second / max(count, 1) - mean**2, 0.0) * count / max(count - 1, 1)
    return Estimate(mean, math.sqrt(variance / max(count, 1)), int(count))


def reward_accuracy(responses: Responses, models: Mapping[str, Frozen]) -> dict[str, Tensor]:
    """Whether each reward prefers the chosen response of a pair (a tie counts half).

    Of language models it needs log-probabilities: `<name>_reward` is log π_name − log π_reference (eq. 5) for every
    model beside the reference, the sign turned for `reverse`; `contrastive_reward` is log π_dpo − log π_reverse
    (eq. 12). Of `reward` it needs the score, which is `reward_model`.
    """
    sums = {
        name: responses.sum_rows(frozen.logprobs_T) for name, frozen in models.items() if frozen.logprobs_T is not None
    }
    rewards = {
        f"{name}_reward": (sums["reference"] - value) if name == "reverse" else (value - sums["reference"])
        for name, value in sums.items()
        if name != "reference" and "reference" in sums
    }
    if {"dpo", "reverse"} <= sums.keys():
        rewards["contrastive_reward"] = sums["dpo"] - sums["reverse"]
    if "reward" in models and (score_B := models["reward"].score_B) is not None:
        rewards["reward_model"] = score_B
    lengths_2P = responses.lengths_B.view(2, -1)
    real_P = (lengths_2P > 0).all(0)
    found = {}
    for name, reward_B in rewards.items():
        chosen_P, rejected_P = reward_B.view(2, -1)
        found[name] = ((chosen_P > rejected_P).double() + 0.5 * (chosen_P == rejected_P).double())[real_P]
    return found


def reward_score(responses: Responses, models: Mapping[str, Frozen]) -> dict[str, Tensor]:
    """`reward_score`: what the reward model says of each response; needs the score of `reward`."""
    score_B = models["reward"].score_B
    assert score_B is not None, "asked for by its need"
    return {"reward_score": score_B[responses.lengths_B > 0]}


def divergence(responses: Responses, models: Mapping[str, Frozen]) -> dict[str, Tensor]:
    """For each response: its KL from every other model, its entropy and its length; needs distributions.

    `kl_<name>` = Σ_t KL(π_policy ‖ π_name) in nats; `entropy` of the policy in nats a token; `length` in tokens.
    Collectives: those of `expectations`, over the tensor parallel group.
    """
    heads = {name: frozen.head for name, frozen in models.items() if frozen.head is not None}
    policy = heads.pop("policy")
    policy_T, *others = expectations(policy, list(heads.values()))
    real_B = responses.lengths_B > 0
    found = {
        f"kl_{name}": responses.sum_rows(policy_T - other_T)[real_B]
        for name, other_T in zip(heads, others, strict=True)
    }
    found["entropy"] = -responses.mean_rows(policy_T)[real_B]
    found["length"] = responses.lengths_B[real_B]
    return found
