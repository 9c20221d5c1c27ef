"""On-policy batches: the policy under training answers the prompts of each global batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import fmean, pstdev
from typing import Any

import numpy as np

from megatron_aligndistil.config import PrecisionConfig, RolloutConfig
from megatron_aligndistil.data.batch import MicroBatch
from megatron_aligndistil.data.dataset import Example
from megatron_aligndistil.data.loader import GlobalBatches
from megatron_aligndistil.data.tokenizer import Tokenizer, to_text
from megatron_aligndistil.data.tokens import Row, make_row, stop_ids
from megatron_aligndistil.engine.ahead import AheadSampler
from megatron_aligndistil.engine.completions import Completion, Sampler, Sampling
from megatron_aligndistil.engine.generate import MegatronSampler, gather_completions
from megatron_aligndistil.engine.parallel import Parallel, on_first_rank
from megatron_aligndistil.engine.reward_function import load_reward_function, rate
from megatron_aligndistil.engine.schedule import Model

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


def make_rollouts(
    policy: Model,
    source: GlobalBatches,
    config: RolloutConfig,
    precision: PrecisionConfig,
    tokenizer: Tokenizer,
    parallel: Parallel,
    seed: int,
    num_steps: int,
) -> Rollouts:
    """The rollouts of a run of `num_steps` optimiser steps, by the very weights being trained.

    Raises ConfigError where `config.reward` names no function.
    """
    as_text = partial(to_text, tokenizer, skip_special_tokens=False)
    if config.reward is not None:
        on_first_rank(_find_reward_function, config.reward)
    return Rollouts(
        MegatronSampler(policy, parallel, config.batch_size, as_text),
        source,
        config,
        parallel,
        num_steps=num_steps,
        seed=seed,
        stop_tokens=stop_ids(tokenizer),
        ahead=AheadSampler(policy, precision, parallel, config.batch_size, as_text) if config.ahead else None,
        rater=None if config.reward is None else partial(_rate, config.reward, tokenizer),
    )


def _find_reward_function(name: str) -> None:
    load_reward_function(name)


def _rate(name: str, tokenizer: Tokenizer, answers: Sequence[Answer]) -> list[float]:
    """What a reward function says of prompts and responses, as texts without special tokens."""
    prompts = [to_text(tokenizer, prompt) for prompt, _ in answers]
    return rate(name, prompts, [to_text(tokenizer, completion.tokens) for _, completion in answers])


class Rollouts:
    """The global batches of an on-policy run, sampled when they are first asked for.

    `config.updates` of them are sampled at once, with the same weights; the metric `staleness` counts the optimiser
    steps between those weights and the ones that a batch updates. The samples are a function of weights, seed and a
    prompt's place in its rollout, so they do not depend on the layout, and a run that is resumed draws what it would
    have drawn.

    Args:
        sampler: answers prompts with the policy as it is.
        ahead: where given, answers those of the next rollout in the background, so that all rollouts but the first are
            sampled with weights one rollout older.
        rater: rates the responses of a rollout; called on the first rank alone, once all of them are there.
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
        ahead: AheadSampler | None = None,
        rater: Callable[[Sequence[Answer]], list[float]] | None = None,
    ) -> None:
        self._sampler, self._source, self._config, self._parallel = sampler, source, config, parallel
        self._num_steps, self._seed, self._stop_tokens, self._ahead = num_steps, seed, stop_tokens, ahead
        self._rater = rater
        self._rollouts: dict[int, Rollout] = {}
        self._current: tuple[int, _Sampled] | None = None  # the first step of the rollout in use, and what was sampled
        self._started: int | None = None  # the first step of the rollout that is being sampled in the background
        self._waiting: _Sampled | None = None  # the same once it has been waited for

    def at(self, step: int) -> Rollout:
        """The global batch of a step, counted from 0; steps are asked for in order, from the first of a rollout.

        Collectives: those of generation, one object gather of the samples over the data parallel group, and, where they
        are rated, one object broadcast over the world.
        """
        if step not in self._rollouts:
            assert step % self._config.updates == 0, "a rollout is used from its first step"
            sampled = self._finished() if self._started == step else self._sample(step)
            self._use(step, sampled)
            following = step + self._config.updates
            if self._ahead is not None and following < self._num_steps:
                self._ahead.start(self._prompts(following), self._sampling(following))
                self._started = following
        return self._rollouts[step]

    def state(self, done: int) -> list[dict[str, Any]]:
        """What has been sampled and not been used after `done` steps, as JSON can hold it; waits for it."""
        unused = []
        if self._current is not None and done in self._steps(self._current[0]):
            unused.append(self._current)
        if self._started is not None:
            unused.append((self._started, self._finished(keep=True)))
        return [{"step": first, **asdict(sampled)} for first, sampled in unused]

    def restore(self, done: int, state: Sequence[dict[str, Any]]) -> None:
        """Go on after `done` steps from a :meth:`state`."""
        for kept in state:
            completions = [Completion(**completion) for completion in kept["completions"]]
            sampled = _Sampled(completions, kept["seconds"], kept["staleness"])
            if done in self._steps(kept["step"]) and done != kept["step"]:
                self._use(kept["step"], sampled)
            else:
                self._started, self._waiting = kept["step"], sampled

    def _use(self, first: int, sampled: _Sampled) -> None:
        self._current = first, sampled
        self._rollouts = self._assemble(first, sampled)

    def _steps(self, first: int) -> range:
        return range(first, min(first + self._config.updates, self._num_steps))

    def _sampled_examples(self, step: int) -> tuple[list[Example], list[Example]]:
        """The examples of a step that the policy answers, the first of them, and those that keep their response."""
        examples = self._source.examples(step)
        count = round(self._config.on_policy_fraction * len(examples))
        return examples[:count], examples[count:]

    def _prompts(self, first: int) -> list[list[int]]:
        return [
            row.tokens[: row.prompt_length].tolist()
            for step in self._steps(first)
            for (row,) in self._sampled_examples(step)[0]
        ]

    def _sampling(self, first: int) -> Sampling:
        config = self._config
        return Sampling(
            config.max_new_tokens,
            self._seed + first,
            self._stop_tokens,
            config.temperature,
            config.top_k,
            config.top_p,
            tuple(config.stop),
        )

    def _sample(self, first: int) -> _Sampled:
        began = time.perf_counter()
        mine = self._sampler.generate(self._prompts(first), self._sampling(first))
        completions = gather_completions(mine, self._parallel)
        seconds = time.perf_counter() - began
        return _Sampled(self._rated(first, completions), seconds, 0)

    def _rated(self, first: int, completions: list[Completion]) -> list[Completion]:
        if self._rater is None or not completions:
            return completions
        ratings = on_first_rank(self._rater, list(zip(self._prompts(first), completions, strict=True)))
        return [replace(each, rating=rating) for each, rating in zip(completions, ratings, strict=True)]

    def _finished(self, *, keep: bool = False) -> _Sampled:
        """What was sampled in the background."""
        sampled = self._waiting
        if sampled is None:
            assert self._ahead is not None and self._started is not None, "it has started"
            mine, seconds = self._ahead.finish()
            completions = self._rated(self._started, gather_completions(mine, self._parallel))
            sampled = _Sampled(completions, seconds, self._config.updates)
        self._waiting = sampled if keep else None
        if not keep:
            self._started = None
        return sampled

    def _assemble(self, first: int, sampled: _Sampled) -> dict[int, Rollout]:
        """A global batch for each step of a rollout."""
        answers = list(zip(self._prompts(first), sampled.completions, strict=True))
        tokens_per_second = sum(len(completion.tokens) for _, completion in answers) / max(sampled.seconds, 1e-9)
        rollouts = {}
        for place, step in enumerate(self._steps(first)):
            answered, given = self._sampled_examples(step)
            mine, answers = answers[: len(answered)], answers[len(answered) :]
            rows = [_example(prompt, completion, self._config.mask_truncated) for prompt, completion in mine] + given
            metrics: dict[str, float] = {}
            if mine:
                staleness = float(sampled.staleness + place)
                metrics = answer_metrics(mine) | {"staleness": staleness, "tokens_per_second": tokens_per_second}
            num_tokens = sum(len(row.tokens) for (row,) in rows)
            rollouts[step] = Rollout(self._source.cut(rows), num_tokens, metrics, mine)
        return rollouts


@dataclass(frozen=True)
class _Sampled:
    """The answers to all prompts of a rollout, how long they took, and how many updates their weights were behind."""

    completions: list[Completion]
    seconds: float
    staleness: int


def _example(prompt: list[int], completion: Completion, mask_truncated: bool) -> Example:
    """The row of a response, with its rating and the log-probabilities that it was sampled with.

    These are of the whole distribution at temperature 1, whatever `temperature`, `top_k` and `top_p` are. A response
    cut at the limit is used as it is: no end of sequence is forged; or it counts for nothing.
    """
    if mask_truncated and completion.finish == "length":
        return (make_row([], []),)
    row = make_row(prompt, completion.tokens)
    logprobs = np.asarray(completion.logprobs, dtype=np.float32)
    return (Row(row.tokens, row.prompt_length, rating=completion.rating, logprobs=logprobs),)


def answer_metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """`length`: response tokens, mean; `truncated`: share of responses cut at the limit. Empty where there are none.

    Where responses are rated, `reward` and `reward_std`: mean and standard deviation of what the function says.
    """
    if not answers:
        return {}
    metrics = {
        "length": fmean(len(completion.tokens) for _, completion in answers),
        "truncated": fmean(completion.finish == "length" for _, completion in answers),
    }
    ratings = [completion.rating for _, completion in answers if completion.rating is not None]
    return metrics | {"reward": fmean(ratings), "reward_std": pstdev(ratings)} if ratings else metrics
