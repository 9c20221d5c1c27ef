"""AlignDistil's view of given responses, token by token, from frozen models on any layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist

from megatron_aligndistil.algorithms.aligndistil import AlignDistil
from megatron_aligndistil.algorithms.base import Frozen
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.data.loader import GlobalBatches
from megatron_aligndistil.engine.parallel import Parallel
from megatron_aligndistil.engine.schedule import Model, frozen_outputs
from megatron_aligndistil.ops.positions import Positions, inspect_positions

# What is found for the rows of one example: one response, or the chosen and the rejected one.
Inspected = tuple[Positions, ...]


def inspect(
    models: Mapping[str, Model],
    algorithm: AlignDistil,
    top: int,
    batches: GlobalBatches,
    parallel: Parallel,
    rows_per_example: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Inspected]:
    """What :func:`inspect_positions` finds for every example of one epoch of `batches`, in their order.

    Args:
        models: "dpo", the one that `algorithm` calls negative, and "policy" where there is one.
        algorithm: how the teacher is composed.
        top: how many of the likeliest tokens to give.
        batches: padded and in the order of the dataset.
        rows_per_example: 1, or 2 for preference pairs.

    Returns the examples on the data parallel ranks of the first tensor parallel rank of the last stage, and an empty
    list elsewhere. Collectives beyond the models' own: those of `inspect_positions`, and one object gather over the
    data parallel group a step.
    """
    found: list[Inspected] = []
    for step in range(batches.steps_per_epoch):
        local = [batch.to(parallel.backend.device) for batch in batches.at(step)]
        outputs = {name: frozen_outputs(model, "distribution", local, parallel) for name, model in models.items()}
        if parallel.is_last_stage:
            mine = [
                example
                for index, batch in enumerate(local)
                for example in _examples(
                    batch.responses,
                    {name: each[index] for name, each in outputs.items()},
                    algorithm,
                    top,
                    rows_per_example,
                )
            ]
            if parallel.tp_rank == 0:
                found += _gather(mine, parallel)
        on_progress(step + 1)
    return found


def _examples(
    responses: Responses, frozen: Mapping[str, Frozen], algorithm: AlignDistil, top: int, rows_per_example: int
) -> list[Inspected]:
    """The examples of a micro-batch, fillers left out."""
    policy = frozen["policy"].head if "policy" in frozen else None
    dpo, negative = frozen["dpo"].head, frozen[algorithm.negative].head
    assert dpo is not None and negative is not None, "asked for as distributions"
    positions = inspect_positions(policy, dpo, negative, responses.targets_T, algorithm.form, top)
    stops = responses.lengths_B.cumsum(0).tolist()
    rows = [positions.part(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
    num_examples = len(rows) // rows_per_example
    examples = [tuple(rows[index::num_examples]) for index in range(num_examples)]
    return [example for example in examples if all(len(row.reward_T) for row in example)]


def _gather(mine: Sequence[Inspected], parallel: Parallel) -> list[Inspected]:
    """Every data parallel rank's examples, one rank's after another's, which is their order."""
    parts: list[list[Inspected]] = [[] for _ in range(parallel.dp)]
    dist.all_gather_object(parts, list(mine), group=parallel.dp_group)
    return [example for part in parts for example in part]
