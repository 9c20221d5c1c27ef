"""On-policy batches: the policy under training answers the prompts of each global batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_aligndistil.config import RolloutConfig
from megatron_aligndistil.data.batch import MicroBatch
from megatron_aligndistil.data.dataset import Example
from megatron_aligndistil.data.loader import GlobalBatches
from megatron_aligndistil.data.tokens import make_row
from megatron_aligndistil.engine.completions import Completion, Sampler, Sampling
from megatron_aligndistil.engine.generate import gather_completions
from megatron_aligndistil.engine.parallel import Parallel

Answer = tuple[list[int], Completion]  # a prompt's tokens, and what was sampled for it


@dataclass(frozen=True)
class Rollout:
    """A global batch to learn on.

    Attributes:
        batches: this data parallel rank's micro-batches.
        num_tokens: tokens over all ranks, prompts included.
        metrics: of what was sampled, over all ranks; empty where nothing was.
        answers: what was sampled, of all ranks, in the order of the prompts.
    """

    batches: list[MicroBatch]
    num_tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)


class Rollouts:
    """The global batches of an on-policy run, sampled when they are first asked for.

    `config.updates` of them are sampled at once, with the same weights; the metric `staleness` counts the optimiser
    steps between those weights and the ones that a batch updates.
    """

    def __init__(
        self,
        sampler: Sampler,
        source: GlobalBatches,
        config: RolloutConfig,
        parallel: Parallel,
        *,
        num_steps: int,
        seed: int,
        stop_tokens: frozenset[int],
    ) -> None:
        self._sampler, self._source, self._config, self._parallel = sampler, source, config, parallel
        self._num_steps, self._seed, self._stop_tokens = num_steps, seed, stop_tokens
        self._steps = range(0)
        self._rollouts: list[Rollout] = []

    def at(self, step: int) -> Rollout:
        """The global batch of a step, counted from 0; steps are asked for in order, from the first of a rollout."""
        if step not in self._steps:
            config = self._config
            assert step % config.updates == 0, "checkpoints are kept between rollouts only"
            self._steps = range(step, min(step + config.updates, self._num_steps))
            sampling = Sampling(
                config.max_new_tokens,
                self._seed + step,
                self._stop_tokens,
                config.temperature,
                config.top_k,
                config.top_p,
                tuple(config.stop),
            )
            self._rollouts = roll_out(
                self._sampler,
                self._source,
                self._steps,
                sampling,
                self._parallel,
                fraction=config.on_policy_fraction,
                mask_truncated=config.mask_truncated,
            )
        return self._rollouts[step - self._steps.start]


def roll_out(
    sampler: Sampler,
    source: GlobalBatches,
    steps: range,
    sampling: Sampling,
    parallel: Parallel,
    *,
    fraction: float = 1.0,
    mask_truncated: bool = False,
) -> list[Rollout]:
    """Answer the prompts of the global batches of `steps` with the weights as they are: one rollout a step.

    The samples are a function of weights, seed and a prompt's place among them, so they do not depend on the layout,
    and a run that is resumed draws what it would have drawn. A response cut at the limit is used as it is: no end of
    sequence is forged, or with `mask_truncated` it is left out of the loss. No gradient flows through the sampling.

    Args:
        fraction: share of each global batch that is sampled, its first examples (the order is random); the others keep
            the responses of their records (GKD's λ, arXiv 2306.13649).

    Collectives: those of generation, and one object gather of the samples over the data parallel group.
    """
    began = time.perf_counter()
    by_step = [source.examples(step) for step in steps]
    counts = [round(fraction * len(examples)) for examples in by_step]
    prompts = [
        row.tokens[: row.prompt_length].tolist()
        for examples, count in zip(by_step, counts, strict=True)
        for (row,) in examples[:count]
    ]
    completions = gather_completions(sampler.generate(prompts, sampling), parallel) if prompts else []
    seconds = time.perf_counter() - began
    tokens_per_second = sum(len(completion.tokens) for completion in completions) / seconds
    answers = list(zip(prompts, completions, strict=True))
    rollouts = []
    for place, (examples, count) in enumerate(zip(by_step, counts, strict=True)):
        mine, answers = answers[:count], answers[count:]
        rows = [_example(prompt, completion, mask_truncated) for prompt, completion in mine] + list(examples[count:])
        metrics = _metrics(mine) | {"staleness": float(place), "tokens_per_second": tokens_per_second} if mine else {}
        num_tokens = sum(len(row.tokens) for (row,) in rows)
        rollouts.append(Rollout(source.cut(rows), num_tokens, metrics, mine))
    return rollouts


def _example(prompt: list[int], completion: Completion, mask_truncated: bool) -> Example:
    if mask_truncated and completion.finish == "length":
        return (make_row([], []),)
    return (make_row(prompt, completion.tokens),)


def _metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """`length`: response tokens, mean; `truncated`: share of responses cut at the limit."""
    return {
        "length": sum(len(completion.tokens) for _, completion in answers) / len(answers),
        "truncated": sum(completion.finish == "length" for _, completion in answers) / len(answers),
    }
