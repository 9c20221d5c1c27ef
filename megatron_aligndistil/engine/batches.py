"""The global batches of a run, from the records that its configuration names."""

from __future__ import annotations

import math

import torch.distributed as dist

from megatron_aligndistil.algorithms.base import Algorithm
from megatron_aligndistil.config import TrainConfig
from megatron_aligndistil.data.dataset import TokenDataset, load_dataset
from megatron_aligndistil.data.loader import GlobalBatches
from megatron_aligndistil.data.tokenizer import Tokenizer, pad_id
from megatron_aligndistil.engine.parallel import Parallel
from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.models.architecture import Architecture


def load_batches(
    config: TrainConfig,
    algorithm: Algorithm,
    tokenizer: Tokenizer,
    arch: Architecture,
    parallel: Parallel,
    source: str,
    *,
    training: bool,
) -> GlobalBatches:
    """This data parallel rank's batches of `source`, in the form that `algorithm` learns on.

    Evaluation keeps the records' order and leaves none out. Every process calls this: one of those that share a file
    system tokenises, and the others wait for a file, not in a collective, whose time would run out. Collectives: one
    gather of a short text over the world.

    Raises DataError where the records cannot be used, or are others on another machine, and ConfigError where they do
    not fit the model or the configuration.
    """
    on_policy = algorithm.data == "prompts"
    mixed = training and on_policy and config.rollout.on_policy_fraction < 1
    if mixed and config.rollout.samples > 1:
        raise ConfigError(
            "a record has one response of its own; set rollout.samples to 1, or rollout.on_policy_fraction too"
        )
    form = "responses" if mixed else algorithm.data
    dataset, report = load_dataset(config.data, source, tokenizer, form)
    if parallel.is_reporter:
        print(f"{'training' if training else 'evaluation'} data {source}: {report}", flush=True)
    _check_same(dataset, source)
    if dataset.largest_token >= arch.vocab_size:
        raise ConfigError(
            f"{source} has a token numbered {dataset.largest_token}, and the model knows {arch.vocab_size} tokens; "
            f"put the tokenizer that the model was trained with into {config.models.policy}"
        )
    if dataset.longest_row > arch.max_positions:
        raise ConfigError(
            f"{source} has rows of {dataset.longest_row} tokens and the model {arch.max_positions} positions; "
            f"set data.max_length to {arch.max_positions}"
        )
    return GlobalBatches(
        dataset,
        global_size=config.batch.global_size,
        micro_size=config.batch.micro_size,
        max_tokens=config.batch.max_tokens,
        micro_multiple=parallel.pp if parallel.vpp > 1 else 1,
        dp_rank=parallel.dp_rank,
        dp_size=parallel.dp,
        seed=config.run.seed,
        shuffle=training and config.data.shuffle,
        drop_last=training,
        pad_multiple=_pad_multiple(config, parallel),
        pad_id=min(pad_id(tokenizer), arch.vocab_size - 1),
        shifted_mask=algorithm.shifted_mask,
        repeat=config.rollout.samples if training and on_policy else 1,
        max_length=_longest_made(config, algorithm, dataset, arch),
        with_mismatched=bool(algorithm.mismatched),
    )


def batches_in_order(
    dataset: TokenDataset, micro_size: int, tokenizer: Tokenizer, arch: Architecture, parallel: Parallel
) -> GlobalBatches:
    """This data parallel rank's batches of every example once, in order, for models that are only asked."""
    return GlobalBatches(
        dataset,
        # As many micro-batches a step as there are pipeline stages and chunks keeps every stage at work.
        global_size=micro_size * parallel.dp * parallel.pp * parallel.vpp,
        micro_size=micro_size,
        pad_id=min(pad_id(tokenizer), arch.vocab_size - 1),
        dp_rank=parallel.dp_rank,
        dp_size=parallel.dp,
        shuffle=False,
        drop_last=False,
        pad_multiple=parallel.tp if parallel.sequence_parallel else 1,
    )


def _check_same(dataset: TokenDataset, source: str) -> None:
    """Raise DataError where another process of the job has read other records under the same name."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, dataset.fingerprint)
    other = next((rank for rank, each in enumerate(found) if each != found[0]), None)
    if other is not None:
        raise DataError(
            f"{source} holds other records for process {other} than for process 0; copy the same file to every machine"
        )


def _longest_made(config: TrainConfig, algorithm: Algorithm, dataset: TokenDataset, arch: Architecture) -> int | None:
    """The longest row that may be made of a prompt of `dataset` and a response that is not its own."""
    if algorithm.data == "prompts":
        return dataset.longest_prompt + config.rollout.max_new_tokens
    return min(config.data.max_length, arch.max_positions) if algorithm.mismatched else None


def _pad_multiple(config: TrainConfig, parallel: Parallel) -> int:
    """What sequence lengths must be a multiple of: tp under sequence parallelism, 16 for FP8 products."""
    return math.lcm(parallel.tp if parallel.sequence_parallel else 1, 16 if config.precision.fp8 else 1)
