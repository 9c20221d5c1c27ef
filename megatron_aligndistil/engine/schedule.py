"""Micro-batches through Megatron's pipeline schedules: frozen forwards, evaluation, and training gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_aligndistil.algorithms.base import Frozen, HeadKind, LossOutput, Need
from megatron_aligndistil.data.batch import MicroBatch, Responses
from megatron_aligndistil.engine.model import lm_head, scalar_head
from megatron_aligndistil.engine.packed import packed_seq_params
from megatron_aligndistil.engine.parallel import Parallel
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.ops.head import LMHead, ScalarHead
from megatron_aligndistil.ops.logprobs import label_logprobs

LossFunction = Callable[[Any, Responses, Mapping[str, Frozen]], LossOutput]


@dataclass(frozen=True)
class Model:
    """A model as the schedules see it: this rank's chunks (wrapped or not) and its architecture."""

    chunks: Sequence[torch.nn.Module]
    arch: Architecture


def check_microbatches(num_microbatches: int, parallel: Parallel) -> None:
    """Raise ConfigError when the interleaved schedule cannot run so many micro-batches."""
    if parallel.vpp > 1 and num_microbatches % parallel.pp:
        raise ConfigError(
            f"vpp {parallel.vpp} needs micro-batches in multiples of pp {parallel.pp}, and a step has "
            f"{num_microbatches}; change batch.global_size or batch.micro_size"
        )


def _run(
    model: Model,
    batches: Sequence[MicroBatch],
    extras: Sequence[Any],
    on_output: Callable[..., Any],
    parallel: Parallel,
    *,
    forward_only: bool,
    collect: bool = False,
) -> list[Any]:
    """Drive the schedule: `on_output(chunk, batch, extra, hidden)` is the loss function, called on the last stage.

    Returns what the last stage collected, one entry a micro-batch; an empty list on other stages.
    """

    def forward_step(items: Iterator[tuple[MicroBatch, Any]], chunk: torch.nn.Module):
        batch, extra = next(items)
        # No mask: rows are padded on the right, where causal attention already hides the padding.
        hidden = chunk(
            input_ids=batch.tokens_BS,
            position_ids=batch.columns_BS,
            attention_mask=None,
            packed_seq_params=packed_seq_params(batch),
        )
        return hidden, partial(on_output, chunk, batch, extra)

    num_rows, length = batches[0].tokens_BS.shape
    pairs = list(zip(batches, extras, strict=True))
    collected = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(pairs) for _ in model.chunks] if parallel.vpp > 1 else iter(pairs),
        model=list(model.chunks),
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=num_rows,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )
    return collected if parallel.is_last_stage else []


@torch.no_grad()
def frozen_outputs(model: Model, need: Need, batches: Sequence[MicroBatch], parallel: Parallel) -> list[Frozen]:
    """What a model says about each micro-batch without gradient; see :class:`Frozen` for what that may be.

    Runs forward only through the pipeline. On stages before the last, the entries are empty.
    """

    def on_output(chunk, batch: MicroBatch, _extra, hidden: Tensor, non_loss_data: bool = True) -> Frozen:
        if need == "values":
            return Frozen(values_T=scalar_head(chunk, hidden, batch.positions_T, parallel).values())
        if need == "score":
            return Frozen(score_B=scalar_head(chunk, hidden, batch.ends_B, parallel).values())
        head = lm_head(chunk, hidden, batch.positions_T, model.arch, parallel)
        if need == "distribution":
            return Frozen(head=LMHead(head.hidden_TH.detach(), head.weight_vH.detach(), head.shard))
        return Frozen(logprobs_T=label_logprobs(head, batch.responses.targets_T)[0])

    outputs = _run(model, batches, [None] * len(batches), on_output, parallel, forward_only=True, collect=True)
    return outputs or [Frozen()] * len(batches)


def losses(
    model: Model,
    loss: LossFunction,
    batches: Sequence[MicroBatch],
    frozen: Sequence[Mapping[str, Frozen]],
    parallel: Parallel,
    *,
    backward: bool,
    kind: HeadKind = "lm",
) -> list[LossOutput]:
    """The loss of every micro-batch, with gradients accumulated into the model when `backward`.

    `kind` is the head that `loss` is given: see :meth:`~megatron_aligndistil.algorithms.base.Algorithm.head`.
    Gradients are summed over micro-batches; Megatron's finalisation divides them by the count of the global batch.
    Returns detached outputs, on the last stage only.
    """

    def on_output(chunk, batch: MicroBatch, extra: Mapping[str, Frozen], hidden: Tensor):
        head: LMHead | ScalarHead
        if kind == "lm":
            head = lm_head(chunk, hidden, batch.positions_T, model.arch, parallel)
        else:
            head = scalar_head(chunk, hidden, batch.ends_B if kind == "score" else batch.positions_T, parallel)
        output = loss(head, batch.responses, extra)
        reported = LossOutput(output.loss_sum.detach(), output.count, output.metrics)
        # A fresh tensor: the schedule may divide what it is given in place.
        return output.loss_sum.clone(), output.count.to(torch.int), reported

    with torch.set_grad_enabled(backward):
        return _run(model, batches, frozen, on_output, parallel, forward_only=not backward)


def reduce_metrics(outputs: Sequence[LossOutput], parallel: Parallel) -> dict[str, float]:
    """Means of the loss and every metric over micro-batches and data parallel ranks; empty before the last stage.

    Collectives: one all-reduce of a few numbers over the data parallel group of the last stage.
    """
    if not outputs:
        return {}
    names = ["loss", *sorted(outputs[0].metrics)]
    rows = [
        torch.stack([torch.stack([torch.as_tensor(part, dtype=torch.float64) for part in pair]) for pair in pairs])
        for pairs in (
            [(o.loss_sum, o.count), *(o.metrics[name] for name in names[1:])]  # one row a micro-batch
            for o in outputs
        )
    ]
    totals = torch.stack(rows).sum(0).to(outputs[0].loss_sum.device)
    dist.all_reduce(totals, group=parallel.dp_group)
    return {name: (total / max(count, 1.0)) for name, (total, count) in zip(names, totals.tolist(), strict=True)}
