"""The Bradley-Terry loss: a case worked by hand, fillers, and the same totals however a batch is cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_aligndistil import algorithms
from megatron_aligndistil.algorithms.base import LossOutput
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.ops.head import ScalarHead

# Chosen 3, -1, 5 and rejected 1, 0, 5; the last pair has an empty response.
SCORES = torch.tensor([3.0, -1.0, 5.0, 1.0, 0.0, 5.0], dtype=torch.float64)
LENGTHS = torch.tensor([2, 1, 0, 1, 3, 2])


def run(scores_B: Tensor, lengths_B: Tensor, **settings: float) -> tuple[LossOutput, Tensor]:
    """The loss on rows of these scores, and its gradient into them."""
    rows_T = torch.arange(len(lengths_B)).repeat_interleave(lengths_B)
    leaf = scores_B.clone().requires_grad_()
    head = ScalarHead(leaf[:, None], scores_B.new_ones(1, 1))
    algorithm = algorithms.build({"name": "reward", **settings})
    output = algorithm.loss("reward", head, Responses(torch.zeros_like(rows_T), rows_T, lengths_B), {})
    output.loss_sum.backward()
    assert leaf.grad is not None
    return output, leaf.grad


def test_by_hand() -> None:
    output, gradient = run(SCORES, LENGTHS)
    assert output.count == 2
    assert output.loss_sum.item() == pytest.approx(math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1)))
    slopes = [-1 / (1 + math.exp(2)), -1 / (1 + math.exp(-1)), 0.0]
    assert gradient.tolist() == pytest.approx(slopes + [-slope for slope in slopes])
    metrics = {name: (float(total), int(count)) for name, (total, count) in output.metrics.items()}
    assert metrics == {
        "accuracy": (1.0, 2),
        "margin": (1.0, 2),
        "reward_chosen": (2.0, 2),
        "reward_rejected": (1.0, 2),
    }


def test_centre() -> None:
    plain, gradient = run(SCORES, LENGTHS)
    output, centred = run(SCORES, LENGTHS, center=0.1)
    assert output.loss_sum.item() == pytest.approx(plain.loss_sum.item() + 0.1 * (4**2 + 1))
    assert (centred - gradient).tolist() == pytest.approx([0.8, -0.2, 0.0, 0.8, -0.2, 0.0])


def test_a_cut_does_not_matter() -> None:
    whole, gradient = run(SCORES, LENGTHS)
    parts = [(pair, run(SCORES[pair], LENGTHS[pair])) for pair in ([0, 3], [1, 4], [2, 5])]
    assert sum(part.loss_sum for _, (part, _) in parts).item() == pytest.approx(whole.loss_sum.item())
    assert sum(part.count for _, (part, _) in parts) == whole.count
    for pair, (_, slope) in parts:
        assert torch.equal(slope, gradient[pair])
