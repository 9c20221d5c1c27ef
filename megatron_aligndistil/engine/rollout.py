"""On-policy batches: the policy under training answers the prompts of each global batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from megatron.core.utils import unwrap_model

from megatron_aligndistil.config import RolloutConfig
from megatron_aligndistil.data.batch import MicroBatch
from megatron_aligndistil.data.dataset import Example
from megatron_aligndistil.data.loader import collate
from megatron_aligndistil.data.tokens import make_row
from megatron_aligndistil.engine.generate import Sampling, generate
from megatron_aligndistil.engine.parallel import Parallel
from megatron_aligndistil.engine.schedule import Model


@dataclass(frozen=True)
class Rollout:
    """What the policy answered to a global batch of prompts.

    Attributes:
        batches: this data parallel rank's micro-batches.
        num_tokens: tokens over all ranks, prompts included.
        metrics: `length` (response tokens, mean) and `truncated` (share of responses cut at the limit), over all ranks.
    """

    batches: list[MicroBatch]
    num_tokens: int
    metrics: dict[str, float]


def roll_out(
    policy: Model,
    prompts: Sequence[Example],
    config: RolloutConfig,
    parallel: Parallel,
    *,
    seed: int,
    stop_tokens: frozenset[int],
    micro_size: int,
    pad_id: int,
    pad_multiple: int,
) -> Rollout:
    """Sample one response a prompt from the very weights being trained, and batch prompts with responses.

    The samples are a function of weights, seed and a prompt's place in the global batch, so they do not depend on the
    layout, and a run that is resumed draws what it would have drawn. A response cut at the limit is used as it is: no
    end of sequence is forged, or with `mask_truncated` left out of the loss. No gradient flows through the sampling.
    Collectives: those of generation, and one all-reduce of a few numbers over the data parallel group.
    """
    tokens = [row.tokens.tolist() for (row,) in prompts]
    sampling = Sampling(config.max_new_tokens, config.temperature, seed, stop_tokens)
    with _whole_sequences(policy, parallel):
        completions = generate(policy, tokens, sampling, parallel, config.batch_size)
    mine = [
        (prompt, completion) for prompt, completion in zip(tokens, completions, strict=True) if completion is not None
    ]
    examples: list[Example] = []
    totals = torch.zeros(4, dtype=torch.float64, device=parallel.backend.device)
    for prompt, completion in mine:
        truncated = completion.finish == "length"
        left_out = truncated and config.mask_truncated
        examples.append((make_row([], []) if left_out else make_row(prompt, completion.tokens),))
        totals += totals.new_tensor([1, len(completion.tokens), truncated, len(prompt) + len(completion.tokens)])
    dist.all_reduce(totals, group=parallel.dp_group)
    count, length, cut, num_tokens = totals.tolist()
    return Rollout(
        _micro_batches(examples, micro_size, pad_id, pad_multiple),
        int(num_tokens),
        {"length": length / count, "truncated": cut / count},
    )


def _micro_batches(examples: list[Example], micro_size: int, pad_id: int, pad_multiple: int) -> list[MicroBatch]:
    """All of one length, the last filled up with rows that count for nothing; at least one."""
    filler = (make_row([], []),)
    missing = -len(examples) % micro_size or (0 if examples else micro_size)
    examples = examples + [filler] * missing
    longest = max(1, *(len(row.tokens) for (row,) in examples))
    length = -(-longest // pad_multiple) * pad_multiple
    return [
        collate(examples[start : start + micro_size], length=length, pad_id=pad_id)
        for start in range(0, len(examples), micro_size)
    ]


@contextmanager
def _whole_sequences(policy: Model, parallel: Parallel) -> Iterator[None]:
    """Turn sequence parallelism off while one token at a time goes through the model."""
    if not parallel.sequence_parallel:
        yield
        return
    models = [unwrap_model(chunk) for chunk in policy.chunks]
    for model in models:
        set_model_to_sequence_parallel(model, False)
    try:
        yield
    finally:
        for model in models:
            set_model_to_sequence_parallel(model, True)
