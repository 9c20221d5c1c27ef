"""What every algorithm is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.algorithms.cases import Case, Result, dense_gradients, run_sharded, with_gradient
from tests.shards import assert_same
from tests.workers import Workers

# A dense reference: case -> (sum of the loss, metrics as (sum, count)).
Dense = Callable[[Case], tuple[Tensor, dict[str, tuple[float, int]]]]


def assert_equals_dense(
    workers: Workers, tp: int, section: Mapping[str, Any], model: str, case: Case, dense: Dense, count: int
) -> None:
    """Loss, gradients and metrics on every rank equal the dense reference to 1e-9."""
    results: list[Result] = workers.run(tp, run_sharded, section, model, case)
    whole = with_gradient(case)
    loss, metrics = dense(whole)
    hidden_TH, weight_HV = dense_gradients(loss, whole)
    for result in results:
        assert_same(result.output.loss_sum, loss.detach())
        assert int(result.output.count) == count
        assert_same(result.hidden_grad_TH, hidden_TH)
        assert set(result.output.metrics) == set(metrics)
        for name, (total, number) in metrics.items():
            actual_total, actual_number = result.output.metrics[name]
            assert_same(actual_total.double(), torch.tensor(total, dtype=torch.float64))
            assert int(actual_number) == number, name
    assert_same([result.weight_grad_Hv for result in results], weight_HV)


def totals(section: Mapping[str, Any], model: str, parts: Sequence[Case]) -> list[Tensor]:
    """Sums over micro-batches: loss, count, gradient of the output layer, and every metric. Call it in a worker."""
    results = [run_sharded(section, model, part) for part in parts]
    found = [
        sum(result.output.loss_sum for result in results),
        sum(result.output.count for result in results),
        sum(result.weight_grad_Hv for result in results),
    ]
    for name in sorted(results[0].output.metrics):
        found += [sum(result.output.metrics[name][part] for result in results) for part in (0, 1)]
    return [torch.as_tensor(value) for value in found]


def assert_cut_does_not_matter(
    workers: Workers, section: Mapping[str, Any], model: str, case: Case, cuts: Sequence[Sequence[Sequence[int]]]
) -> None:
    """Every way of dealing the rows of `case` over micro-batches gives the totals of one batch, at tp 2."""
    whole = workers.run(2, totals, section, model, [case])[0]
    for cut in cuts:
        parts = workers.run(2, totals, section, model, [case.rows(rows) for rows in cut])[0]
        for part, one in zip(parts, whole, strict=True):
            assert_same(part.double(), one.double(), 1e-12)
