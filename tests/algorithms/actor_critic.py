"""A small case for PPO and RTO, as the algorithm is given it and whole, with a reference in plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil import algorithms
from megatron_aligndistil.algorithms.base import Frozen, LossOutput, Scored
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.ops.head import LMHead, ScalarHead, VocabShard
from megatron_aligndistil.ops.logprobs import label_logprobs
from tests.algorithms.cases import HIDDEN_SIZE, Case, dense_gradients, make_case, with_gradient
from tests.ops.test_advantages import recursive
from tests.shards import assert_same, columns, this_shard
from tests.workers import Workers

LENGTHS = [3, 0, 1, 5]
# How the rows may be dealt over micro-batches.
CUTS = [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[1], [0, 2, 3]]]


@dataclass(frozen=True)
class Rollout:
    """Sampled rows: what four language models say, how they were sampled and rated, and a critic before and now."""

    case: Case
    sampled_T: Tensor
    ratings_B: Tensor
    scores_B: Tensor
    old_values_T: Tensor
    critic_TH: Tensor
    critic_1H: Tensor

    def rows(self, chosen: Sequence[int]) -> Rollout:
        """Only these rows, in this order."""
        keep_T = torch.tensor([t for row in chosen for t in range(*_bounds(self.case.spans[row]))], dtype=torch.int64)
        keep_B = torch.tensor(chosen)
        return replace(
            self,
            case=self.case.rows(chosen),
            sampled_T=self.sampled_T[keep_T],
            ratings_B=self.ratings_B[keep_B],
            scores_B=self.scores_B[keep_B],
            old_values_T=self.old_values_T[keep_T],
            critic_TH=self.critic_TH[keep_T],
        )

    def logprobs(self, model: str) -> Tensor:
        """[T], differentiable where the model's tensors are."""
        index_T = torch.arange(len(self.case.targets_T))
        return self.case.logits(model).log_softmax(1)[index_T, self.case.targets_T]


def _bounds(span: slice) -> tuple[int, int]:
    return span.start, span.stop


def make_rollout(lengths: Sequence[int] = LENGTHS) -> Rollout:
    """Ratios and values far enough from 1 and from the old ones that clipping bites at some positions."""
    case = make_case(lengths)
    generator = torch.Generator().manual_seed(23)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    num_positions, num_rows = sum(lengths), len(lengths)
    ratings_B = draw(num_rows)
    ratings_B[torch.tensor(lengths) == 0] = math.nan  # nobody rates a filler
    critic_TH, critic_1H = draw(num_positions, HIDDEN_SIZE), draw(1, HIDDEN_SIZE)
    rollout = Rollout(case, draw(0), ratings_B, draw(num_rows), draw(0), critic_TH, critic_1H)
    return replace(
        rollout,
        sampled_T=rollout.logprobs("policy") + 0.3 * draw(num_positions),
        old_values_T=critic_TH @ critic_1H[0] + 0.3 * draw(num_positions),
    )


@dataclass(frozen=True)
class Result:
    """Sums over this rank's micro-batches, and gradients into hidden states (by micro-batch) and output layer."""

    loss: Tensor
    count: int
    metrics: dict[str, tuple[float, float]]
    hidden_grads: list[Tensor]
    weight_grad: Tensor


def run_step(
    section: Mapping[str, Any], model: str, parts: Sequence[Sequence[Rollout]], split: Literal["tp", "dp"]
) -> Result:
    """One step on the micro-batches `parts`, of all ranks alike ("tp"), or of each its own ("dp"). Call in a worker."""
    algorithm = algorithms.build(section)
    mine = parts[0 if split == "tp" else dist.get_rank()]
    vocab, padded = mine[0].case.weights["policy"].size(0), mine[0].case.padded
    shard = this_shard(vocab, padded) if split == "tp" else VocabShard(0, vocab, vocab, None)

    def total(values: Tensor) -> Tensor:
        values = values.clone()
        if split == "dp":
            dist.all_reduce(values)
        return values

    batches = [_scored(algorithm.frozen, part, shard) for part in mine]
    prepared = algorithm.prepare(batches, [], total)
    outputs, hidden_grads, weight_grads = [], [], []
    for part, scored, found in zip(mine, batches, prepared, strict=True):
        head: Any
        if algorithm.head(model) == "values":
            head = ScalarHead(part.critic_TH.clone().requires_grad_(), part.critic_1H.clone().requires_grad_())
            weight = head.weight_1H
        else:
            head = _lm_head(part.case, "policy", shard)
            head.hidden_TH.requires_grad_()
            weight = head.weight_vH.requires_grad_()
        output = algorithm.loss(model, head, replace(scored.responses, prepared=found), scored.frozen)
        output.loss_sum.backward()
        assert not any(part.requires_grad for pair in output.metrics.values() for part in pair)
        outputs.append(output)
        hidden_grads.append(head.hidden_TH.grad)
        weight_grads.append(weight.grad)
    metrics = {name: (_sum(outputs, name, 0), _sum(outputs, name, 1)) for name in outputs[0].metrics}
    return Result(
        torch.stack([output.loss_sum.detach() for output in outputs]).sum(),
        sum(int(output.count) for output in outputs),
        metrics,
        hidden_grads,
        torch.stack(weight_grads).sum(0),
    )


def _sum(outputs: Sequence[LossOutput], name: str, part: int) -> float:
    return sum(float(output.metrics[name][part]) for output in outputs)


def _lm_head(case: Case, name: str, shard: VocabShard) -> LMHead:
    return LMHead(case.hidden[name].clone(), columns(case.weights[name].T, shard).T.detach(), shard)


def _scored(needs: Mapping[str, str], part: Rollout, shard: VocabShard) -> Scored:
    lengths_B = torch.tensor(part.case.lengths)
    rows_T = torch.arange(len(lengths_B)).repeat_interleave(lengths_B)
    responses = Responses(part.case.targets_T, rows_T, lengths_B, part.ratings_B, part.sampled_T)
    frozen = {}
    for name, need in needs.items():
        if need == "logprobs":
            logprobs_T, _ = label_logprobs(_lm_head(part.case, name, shard), part.case.targets_T)
            frozen[name] = Frozen(logprobs_T=logprobs_T.detach())
        elif need == "values":
            frozen[name] = Frozen(values_T=part.old_values_T)
        else:
            frozen[name] = Frozen(score_B=part.scores_B)
    return Scored(responses, frozen)


# The reward of each token without the KL: (rollout, row, t) -> number.
Reward = Callable[[Rollout, int, int], float]


@dataclass(frozen=True)
class Dense:
    """The definition in plain loops over one whole global batch: sums over tokens and metrics as (sum, count)."""

    policy_loss: Tensor
    critic_loss: Tensor
    policy_metrics: dict[str, tuple[float, float]]
    critic_metrics: dict[str, tuple[float, float]]


def dense_step(
    spans: Sequence[slice],
    rewards: Sequence[float],
    sampled: Sequence[float],
    reference: Sequence[float],
    old_values: Sequence[float],
    policy_T: Tensor,
    values_T: Tensor,
    *,
    kl: float,
    clip: float = 0.2,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Dense:
    """PPO as its papers write it, one token after another.

    Args:
        spans: the tokens of each row.
        rewards: of each token without the KL.
        sampled, reference, policy_T: log-probabilities; those of the policy with gradient.
        old_values, values_T: of the critic before the update, and as it is, with gradient.
    """
    num_tokens, num_rows = len(rewards), sum(span.stop > span.start for span in spans)
    kls = [old - other for old, other in zip(sampled, reference, strict=True)]
    penalised = [reward - kl * each for reward, each in zip(rewards, kls, strict=True)]
    advantages = [each for span in spans for each in recursive(penalised[span], old_values[span], gamma, lam)]
    returns = [advantage + value for advantage, value in zip(advantages, old_values, strict=True)]
    mean, variance = _moments(advantages)
    whitened = [(advantage - mean) / math.sqrt(variance + 1e-8) for advantage in advantages]

    policy_loss, critic_loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    clipped, approx_kl, error = 0, 0.0, 0.0
    for t in range(num_tokens):
        ratio = (policy_T[t] - sampled[t]).exp()
        outside = ratio > 1 + clip if whitened[t] > 0 else ratio < 1 - clip
        if outside:  # the bound is a constant
            policy_loss = policy_loss - (1 + clip if whitened[t] > 0 else 1 - clip) * whitened[t]
        else:
            policy_loss = policy_loss - ratio * whitened[t]
        clipped += int(outside)
        approx_kl += ratio.item() - 1 - math.log(ratio.item())
        squared = (values_T[t] - returns[t]) ** 2
        error += squared.item()
        critic_loss = critic_loss + squared / 2
    explained = 1 - variance / _moments(returns)[1]
    return Dense(
        policy_loss,
        critic_loss,
        {
            "clip_share": (clipped, num_tokens),
            "approx_kl": (approx_kl, num_tokens),
            "reward": (sum(rewards), num_rows),
            "kl_reference_sequence": (sum(kls), num_rows),
            "length": (num_tokens, num_rows),
        },
        {
            "returns": (sum(returns), num_tokens),
            "value_error": (error, num_tokens),
            "explained_variance": (explained * num_tokens, num_tokens),
        },
    )


def _moments(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / len(values)


def score_at_end(scores_B: Tensor, rollout: Rollout, row: int, t: int) -> float:
    """A number a row, earned with its last token."""
    return float(scores_B[row]) if t == rollout.case.lengths[row] - 1 else 0.0


def assert_equals_dense_step(workers: Workers, tp: int, section: Mapping[str, Any], reward: Reward, **how: Any) -> None:
    """Losses of policy and critic, their gradients and metrics equal :func:`dense_step` to 1e-9 on every rank."""
    rollout = make_rollout()
    whole = replace(
        rollout,
        case=with_gradient(rollout.case),
        critic_TH=rollout.critic_TH.clone().requires_grad_(),
        critic_1H=rollout.critic_1H.clone().requires_grad_(),
    )
    spans = whole.case.spans
    p_TV = whole.case.logits("policy").detach().softmax(1)
    expected = dense_step(
        spans,
        [reward(rollout, row, t) for row, span in enumerate(spans) for t in range(span.stop - span.start)],
        whole.sampled_T.tolist(),
        whole.logprobs("reference").tolist(),
        whole.old_values_T.tolist(),
        whole.logprobs("policy"),
        whole.critic_TH @ whole.critic_1H[0],
        **how,
    )
    policy_metrics = expected.policy_metrics | {"entropy": (-float((p_TV * p_TV.log()).sum()), len(p_TV))}
    policy_grads = dense_gradients(expected.policy_loss, whole.case)
    critic_grads = torch.autograd.grad(expected.critic_loss, [whole.critic_TH, whole.critic_1H])
    results: list[Result] = workers.run(tp, run_step, section, "policy", [[rollout]], "tp")
    for result in results:
        _assert_result(result, expected.policy_loss, policy_grads[0], policy_metrics)
    assert_same([result.weight_grad.T for result in results], policy_grads[1])
    for result in workers.run(tp, run_step, section, "critic", [[rollout]], "tp"):
        _assert_result(result, expected.critic_loss, critic_grads[0], expected.critic_metrics)
        assert_same(result.weight_grad, critic_grads[1])


def _assert_result(result: Result, loss: Tensor, hidden_TH: Tensor, metrics: Mapping[str, tuple[float, float]]) -> None:
    assert_same(result.loss, loss.detach())
    assert result.count == sum(LENGTHS)
    assert_same(result.hidden_grads[0], hidden_TH)
    assert result.metrics == {name: pytest.approx(pair, rel=1e-9) for name, pair in metrics.items()}


def assert_deal_does_not_matter(workers: Workers, section: Mapping[str, Any]) -> None:
    """However rows are dealt over micro-batches and data parallel ranks, totals are those of one batch."""
    rollout = make_rollout()
    for model in ("policy", "critic"):
        (whole,) = workers.run(1, run_step, section, model, [[rollout]], "tp")
        for cut in CUTS:
            (parts,) = workers.run(1, run_step, section, model, [[rollout.rows(rows) for rows in cut]], "tp")
            _assert_same_totals([parts], whole)
        dealt = [[rollout.rows([1, 3])], [rollout.rows([0]), rollout.rows([2])]]
        _assert_same_totals(workers.run(2, run_step, section, model, dealt, "dp"), whole)


def _assert_same_totals(results: Sequence[Result], whole: Result) -> None:
    assert_same(torch.stack([result.loss for result in results]).sum(), whole.loss, 1e-12)
    assert_same(torch.stack([result.weight_grad for result in results]).sum(0), whole.weight_grad, 1e-12)
    assert sum(result.count for result in results) == whole.count
    for name, pair in whole.metrics.items():
        assert [sum(result.metrics[name][part] for result in results) for part in (0, 1)] == pytest.approx(pair), name
