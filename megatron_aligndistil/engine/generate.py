"""Sampling responses from a Megatron model with a key-value cache, under tensor and data parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_aligndistil.engine.model import HiddenStateGPT
from megatron_aligndistil.engine.parallel import Parallel
from megatron_aligndistil.engine.schedule import Model
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.ops.sampling import row_keys, sample


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: length limit in tokens, temperature (0 is greedy), seed, tokens that end a response."""

    max_new_tokens: int
    temperature: float
    seed: int
    stop_tokens: frozenset[int]


@dataclass(frozen=True)
class Completion:
    """One sampled response: its tokens (the stop token included), their log-probabilities, and "stop" or "length"."""

    tokens: list[int]
    logprobs: list[float]
    finish: str


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    parallel: Parallel,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Completion | None]:
    """A response for each prompt; prompts are dealt to data parallel ranks, and other ranks' entries are None.

    Row i draws from a random stream that depends on the seed and i alone: samples are the same at any layout and batch
    size. Collectives: Megatron's own in each forward pass, one small all-gather a token over the tensor parallel group
    (ops/sampling.py); under pipeline parallelism hidden states go from stage to stage and tokens back to all. Raises
    ConfigError under the interleaved schedule, or where prompt and response do not fit the model's positions.
    """
    if parallel.vpp > 1:
        raise ConfigError(
            "Megatron's key-value cache does not know interleaved stages; set parallel.vpp to 1 to generate"
        )
    longest = max((len(prompt) for prompt in prompts), default=0) + sampling.max_new_tokens
    if longest > model.arch.max_positions:
        raise ConfigError(
            f"a prompt and {sampling.max_new_tokens} new tokens make {longest}, and the model has "
            f"{model.arch.max_positions} positions; lower max_new_tokens or max_prompt_length"
        )
    if any(len(prompt) == 0 for prompt in prompts):
        raise ConfigError("a prompt has no tokens at all; give at least a beginning-of-sequence token")
    mine = range(parallel.dp_rank, len(prompts), parallel.dp)
    # Rows of one batch advance together, so prompts of like length go together.
    order = sorted(mine, key=lambda row: len(prompts[row]))
    results: list[Completion | None] = [None] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        for row, completion in zip(rows, _generate_batch(model, prompts, rows, sampling, parallel), strict=True):
            results[row] = completion
        on_progress(start + len(rows))
    return results


@torch.no_grad()
def _generate_batch(
    model: Model, prompts: Sequence[Sequence[int]], rows: Sequence[int], sampling: Sampling, parallel: Parallel
) -> list[Completion]:
    chunk = unwrap_model(model.chunks[0])
    was_training = chunk.training
    chunk.eval()
    device = parallel.backend.device
    lengths_B = torch.tensor([len(prompts[row]) for row in rows], device=device)
    limit = int(lengths_B.max()) + sampling.max_new_tokens
    tokens_BS = torch.zeros(len(rows), limit, dtype=torch.long, device=device)
    for index, row in enumerate(rows):
        tokens_BS[index, : len(prompts[row])] = torch.tensor(prompts[row], device=device)
    logprobs_BS = torch.zeros(len(rows), limit, dtype=torch.float64, device=device)
    stops = torch.tensor(sorted(sampling.stop_tokens), device=device, dtype=torch.long)
    keys_B = row_keys(sampling.seed, torch.tensor(rows, device=device))
    ends_B = lengths_B + sampling.max_new_tokens
    stopped_B = torch.zeros(len(rows), dtype=torch.bool, device=device)

    context = StaticInferenceContext(len(rows), limit)
    fed, known = 0, int(lengths_B.min())
    while known < limit:
        # The cache takes every known token: the shortest prompt at first, then one token at a time.
        hidden_SBH = _forward(chunk, tokens_BS[:, fed:known], fed, context, parallel)
        token_B, logprob_B = _draw(model, hidden_SBH, keys_B, known, sampling.temperature, parallel)
        in_response_B = (known >= lengths_B) & (known < ends_B) & ~stopped_B
        tokens_BS[:, known] = torch.where(in_response_B, token_B, tokens_BS[:, known])
        logprobs_BS[:, known] = torch.where(in_response_B, logprob_B, 0.0)
        hit_B = in_response_B & torch.isin(token_B, stops)
        ends_B = torch.where(hit_B, known + 1, ends_B)
        stopped_B |= hit_B
        fed, known = known, known + 1
        if bool((known >= ends_B).all()):
            break
    chunk.train(was_training)
    completions = []
    for index, (begin, end) in enumerate(zip(lengths_B.tolist(), ends_B.tolist(), strict=True)):
        finish = "stop" if bool(stopped_B[index]) else "length"
        completions.append(
            Completion(tokens_BS[index, begin:end].tolist(), logprobs_BS[index, begin:end].tolist(), finish)
        )
    return completions


def _forward(
    chunk: HiddenStateGPT, tokens_BS: Tensor, offset: int, context: StaticInferenceContext, parallel: Parallel
) -> Tensor:
    """Feed tokens at positions offset.. through this stage, extending the cache; returns hidden states [S, B, H]."""
    context.sequence_len_offset = offset
    if offset:
        context.enable_decode_mode()
    num_rows, length = tokens_BS.shape
    previous, following = parallel.pp_neighbours
    if previous is not None:
        shape = (length, num_rows, chunk.config.hidden_size)
        received_SBH = torch.empty(shape, dtype=chunk.config.params_dtype, device=tokens_BS.device)
        dist.recv(received_SBH, src=previous, group=parallel.pp_group)
        chunk.set_input_tensor(received_SBH)
    positions_BS = torch.arange(offset, offset + length, device=tokens_BS.device).expand_as(tokens_BS)
    hidden_SBH = chunk(input_ids=tokens_BS, position_ids=positions_BS, attention_mask=None, inference_context=context)
    if following is not None:
        dist.send(hidden_SBH.contiguous(), dst=following, group=parallel.pp_group)
    return hidden_SBH


def _draw(
    model: Model, hidden_SBH: Tensor, keys_B: Tensor, position: int, temperature: float, parallel: Parallel
) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-probability, drawn on the last stage and known to all."""
    drawn = torch.zeros(2, keys_B.numel(), dtype=torch.float64, device=keys_B.device)
    if parallel.is_last_stage:
        shard = parallel.vocab_shard(model.arch.vocab_size, model.arch.padded_vocab_size(parallel.tp))
        weight_vH = unwrap_model(model.chunks[0]).output_weight()[: shard.size]
        logits_Bv = torch.nn.functional.linear(hidden_SBH[-1], weight_vH)
        drawn = torch.stack(sample(logits_Bv, keys_B, position, temperature, shard)).to(drawn)
    if parallel.pp > 1:
        dist.broadcast(drawn, src=dist.get_global_rank(parallel.pp_group, parallel.pp - 1), group=parallel.pp_group)
    return drawn[0].long(), drawn[1]


def gather_completions(mine: Sequence[Completion | None], parallel: Parallel) -> list[Completion]:
    """Every row's completion on every rank, from the rows that each data parallel rank sampled.

    Collectives: one object gather over the data parallel group.
    """
    parts: list = [None] * parallel.dp
    dist.all_gather_object(parts, list(mine), group=parallel.dp_group)
    return [next(entry for entry in entries if entry is not None) for entries in zip(*parts, strict=True)]
