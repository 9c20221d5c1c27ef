"""The global batches of a run, from the records that its configuration names."""

from __future__ import annotations

import math

from megatron_aligndistil.algorithms.base import Algorithm
from megatron_aligndistil.config import TrainConfig
from megatron_aligndistil.data.dataset import load_dataset
from megatron_aligndistil.data.loader import GlobalBatches
from megatron_aligndistil.data.tokenizer import Tokenizer, pad_id
from megatron_aligndistil.engine.parallel import Parallel
from megatron_aligndistil.errors import ConfigError
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

    Evaluation keeps the records' order and leaves none out. Raises DataError where the records cannot be used, and
    ConfigError where they do not fit the model or the configuration.
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
    rows = [row.tokens for example in dataset for row in example]
    largest, longest = max(int(tokens.max()) for tokens in rows), max(map(len, rows))
    if largest >= arch.vocab_size:
        raise ConfigError(
            f"{source} has a token numbered {largest}, and the model knows {arch.vocab_size} tokens; "
            f"put the tokenizer that the model was trained with into {config.models.policy}"
        )
    if longest > arch.max_positions:
        raise ConfigError(
            f"{source} has rows of {longest} tokens and the model {arch.max_positions} positions; "
            f"set data.max_length to {arch.max_positions}"
        )
    return GlobalBatches(
        dataset,
        global_size=config.batch.global_size,
        micro_size=config.batch.micro_size,
        dp_rank=parallel.dp_rank,
        dp_size=parallel.dp,
        seed=config.run.seed,
        shuffle=training and config.data.shuffle,
        drop_last=training,
        pad_multiple=_pad_multiple(config, parallel),
        pad_id=min(pad_id(tokenizer), arch.vocab_size - 1),
        shifted_mask=algorithm.shifted_mask,
        repeat=config.rollout.samples if training and on_policy else 1,
        max_length=min(config.data.max_length, arch.max_positions),
    )


def _pad_multiple(config: TrainConfig, parallel: Parallel) -> int:
    """What sequence lengths must be a multiple of: tp under sequence parallelism, 16 for FP8 products."""
    return math.lcm(parallel.tp if parallel.sequence_parallel else 1, 16 if config.precision.fp8 else 1)
