"""What the losses of a step need besides micro-batches: what models say, and what an algorithm makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.algorithms.base import Algorithm, Frozen, Need, Scored
from megatron_aligndistil.data.batch import MicroBatch
from megatron_aligndistil.engine.parallel import Parallel
from megatron_aligndistil.engine.schedule import Model, frozen_outputs


@torch.no_grad()
def prepare(
    algorithm: Algorithm,
    models: Mapping[str, Model],
    given: Sequence[MicroBatch],
    mismatched: Sequence[MicroBatch],
    parallel: Parallel,
) -> tuple[list[MicroBatch], list[dict[str, Frozen]]]:
    """Micro-batches on the device as losses see them, and what models without gradient say about each.

    Arguments:
        models: every model that the algorithm may ask, the trained ones (as they are now) too.
        mismatched: other micro-batches for `Algorithm.prepare`; none where the algorithm asks nothing of them.

    Collectives: those of the models' forward passes, and of `Algorithm.prepare` over the data parallel group.
    """
    batches, frozen = _asked(models, algorithm.frozen, given, parallel)
    others, said = _asked(models, algorithm.mismatched, mismatched, parallel)
    if parallel.is_last_stage:

        def total(value: Tensor) -> Tensor:
            summed = value.clone()
            dist.all_reduce(summed, group=parallel.dp_group)
            return summed

        prepared = algorithm.prepare(_scored(batches, frozen), _scored(others, said), total)
        batches = [
            replace(batch, responses=replace(batch.responses, prepared=found))
            for batch, found in zip(batches, prepared, strict=True)
        ]
    return batches, frozen


def _asked(
    models: Mapping[str, Model], needs: Mapping[str, Need], given: Sequence[MicroBatch], parallel: Parallel
) -> tuple[list[MicroBatch], list[dict[str, Frozen]]]:
    batches = [batch.to(parallel.backend.device) for batch in given]
    by_model = {name: frozen_outputs(models[name], need, batches, parallel) for name, need in needs.items()}
    return batches, [{name: said[index] for name, said in by_model.items()} for index in range(len(batches))]


def _scored(batches: Sequence[MicroBatch], frozen: Sequence[Mapping[str, Frozen]]) -> list[Scored]:
    return [Scored(batch.responses, said) for batch, said in zip(batches, frozen, strict=True)]
