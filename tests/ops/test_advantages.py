"""Advantages against their recursive definition in plain Python, and moments over ranks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.ops.advantages import gae, moments
from tests.shards import assert_same
from tests.workers import Workers


def recursive(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float, t: int = 0) -> list[float]:
    """A_t, A_{t+1}, ... of one row: A_t = r_t + γ V_{t+1} - V_t + γ λ A_{t+1}, nothing behind the last token."""
    if t == len(rewards):
        return []
    rest = recursive(rewards, values, gamma, lam, t + 1)
    value_after = values[t + 1] if t + 1 < len(values) else 0.0
    advantage_after = rest[0] if rest else 0.0
    return [rewards[t] + gamma * value_after - values[t] + gamma * lam * advantage_after, *rest]


def test_worked_by_hand() -> None:
    """γ 0.5, λ 0.5: δ = (0 + 0.5·2 - 4, 8 - 2) = (-3, 6), so A = (-3 + 0.25·6, 6)."""
    rewards_T, values_T = torch.tensor([0.0, 8.0, 1.0]), torch.tensor([4.0, 2.0, 3.0])
    advantages_T, returns_T = gae(rewards_T, values_T, torch.tensor([2, 0, 1]), gamma=0.5, lam=0.5)
    assert advantages_T.tolist() == [-1.5, 6.0, -2.0]
    assert returns_T.tolist() == [2.5, 8.0, 1.0]


@pytest.mark.parametrize("lengths", [[5, 0, 1, 9], [1], [0, 3], [7, 7], [0], []])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0)])
def test_equals_the_recursive_definition(lengths: list[int], gamma: float, lam: float) -> None:
    draw = random.Random(3)
    rows = [([draw.gauss(0, 1) for _ in range(n)], [draw.gauss(0, 1) for _ in range(n)]) for n in lengths]
    rewards_T, values_T = (torch.tensor(sum((row[part] for row in rows), []), dtype=torch.float64) for part in (0, 1))
    expected = torch.tensor(sum((recursive(*row, gamma, lam) for row in rows), []), dtype=torch.float64)
    lengths_B = torch.tensor(lengths, dtype=torch.int64)
    advantages_T, returns_T = gae(rewards_T, values_T, lengths_B, gamma=gamma, lam=lam)
    assert_same(advantages_T, expected, 1e-14)
    assert_same(returns_T, expected + values_T, 1e-14)


def test_low_precision_is_not_computed_with() -> None:
    advantages_T, returns_T = gae(
        torch.full((300,), 1.0, dtype=torch.bfloat16),
        torch.zeros(300, dtype=torch.bfloat16),
        torch.tensor([300]),
        gamma=1.0,
        lam=1.0,
    )
    assert advantages_T.dtype == returns_T.dtype == torch.float32
    assert advantages_T[0] == 300  # bf16 counts to 256


def over_ranks(parts: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    def total(values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    return moments(parts[dist.get_rank()], total)


def test_moments_over_micro_batches_and_ranks(workers: Workers) -> None:
    """Unequal shares, one of them empty, and a mean so large that sums of squares in fp32 would lose the variance."""
    generator = torch.Generator().manual_seed(5)
    whole_2T = torch.randn(2, 11, generator=generator) + torch.tensor([[3000.0], [0.0]])
    parts = [[whole_2T[:, :2], whole_2T[:, 2:2]], [whole_2T[:, 2:]]]
    for mean_2, variance_2 in workers.run(2, over_ranks, parts):
        assert_same(mean_2, whole_2T.double().mean(1), 1e-14)
        assert_same(variance_2, whole_2T.double().var(1, correction=0), 1e-12)
    (alone,) = workers.run(1, over_ranks, [[torch.zeros(2, 0)]])
    assert [part.tolist() for part in alone] == [[0, 0], [0, 0]]
