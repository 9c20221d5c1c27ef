"""One optimiser step of the real trainer, watched: its metrics, and the gradients that the optimiser is given.

    step = ours(workers, "tp2", [values])[0]["dpo"]
    assert_same_step(step, expected, {"loss": "loss", "reward_chosen": "rewards/chosen"})

`values` is what a run's YAML file holds, but for `run`, `parallel` and `precision`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from megatron_aligndistil import config
from megatron_aligndistil.engine import trainer
from megatron_aligndistil.engine.optimiser import Trained
from tests.engine.test_gradients import COPY, whole_gradients
from tests.workers import Workers

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "single": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
}


@dataclass(frozen=True)
class Step:
    """What one step saw: metrics by name, "loss" among them, and whole gradients by transformers' parameter names."""

    metrics: Mapping[str, float]
    grads: Mapping[str, Tensor]


def ours(workers: Workers, layout: str, runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Step]]:
    """The first step of each of `runs` under one of LAYOUTS, by the name of the trained model."""
    world_size, parallel = LAYOUTS[layout]
    return steps_of(workers, world_size, parallel, runs)


def steps_of(
    workers: Workers, world_size: int, parallel: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]
) -> list[dict[str, Step]]:
    """As :func:`ours`, under any layout."""
    common = {"parallel": parallel, "precision": {"dtype": "fp32"}}
    ranks = workers.run(world_size, watch_all, [{**values, **common} for values in runs])
    return [_join(parts) for parts in zip(*ranks, strict=True)]


def watch_all(runs: Sequence[dict[str, Any]]) -> list[dict[str, Step]]:
    """This rank's part of the first step of each run; call it in a worker."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            _watch({**values, "run": {"dir": f"{folder}/{index}", "steps": 1}}) for index, values in enumerate(runs)
        ]


def _watch(values: dict[str, Any]) -> dict[str, Step]:
    """Run the real trainer up to its first update, with neither checkpoints nor an export behind it."""
    logged: dict[str, float] = {}
    grads: dict[str, dict[str, Tensor]] = {}

    class Listener:
        def log(self, _step: int, metrics: Mapping[str, float]) -> None:
            logged.update(metrics)

        def advance(self, *_: Any) -> None:
            pass

    def one_step(stage: trainer._Stage, _folder: Path) -> None:
        update = Trained.step

        def step(item: Trained, *args: Any) -> float:
            chunks, arch = item.model.chunks, item.model.arch
            grads[item.name] = whole_gradients(chunks, arch, stage.parallel, stage.config.optim.distributed)
            return update(item, *args)

        with patch.object(Trained, "step", step):
            stage.step(0, Listener())  # type: ignore[arg-type]

    with patch.object(trainer._Stage, "run", one_step):
        trainer.train(config.build(config.TrainConfig, values))
    prefixes = {name: f"train/{name}/" for name in grads}
    return {
        name: Step({key.removeprefix(prefix): value for key, value in logged.items() if key.startswith(prefix)}, found)
        for (name, found), prefix in zip(grads.items(), prefixes.values(), strict=True)
    }


def _join(ranks: Sequence[Mapping[str, Step]]) -> dict[str, Step]:
    """The step of every trained model from its ranks' parts; ranks that hold the same thing must agree on it."""
    joined = {}
    for name in ranks[0]:
        grads: dict[str, Tensor] = {}
        for key, gradient in ((key, value) for rank in ranks for key, value in rank[name].grads.items()):
            whole = "model.embed_tokens.weight" if key == COPY else key
            if whole in grads:
                assert_close(f"{key} on another rank", gradient, grads[whole], 1e-6)
            grads[whole] = gradient
        reported = [rank[name].metrics for rank in ranks if "loss" in rank[name].metrics]
        assert all(dict(metrics) == pytest.approx(dict(reported[0])) for metrics in reported)
        joined[name] = Step(reported[0], grads)
    return joined


def assert_same_step(found: Step, expected: Step, metrics: Mapping[str, str]) -> None:
    """The gradient of every parameter, and each of our metrics with the other's name for it, agree as fp32 can.

    Metrics to 1e-5, relative where they are above 1 in size; gradients to 2e-5, relative in norm.
    """
    for name, other in metrics.items():
        actual, other_value = found.metrics[name], expected.metrics[other]
        assert actual == pytest.approx(other_value, rel=1e-5, abs=1e-5), f"{name}: {actual} is not {other_value}"
    assert found.grads.keys() == expected.grads.keys()
    for name, gradient in expected.grads.items():
        assert_close(name, found.grads[name], gradient, 2e-5)


def assert_close(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """The difference of two tensors is small in norm beside the second."""
    assert found.shape == expected.shape, name
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert error < tolerance, f"{name}: relative error {error:.1e}"
