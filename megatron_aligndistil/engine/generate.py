"""Sampling responses to a list of prompts from a Megatron model, under tensor, pipeline and data parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_aligndistil.engine.completions import Completion, Sampling
from megatron_aligndistil.engine.decoder import Decoder, Request
from megatron_aligndistil.engine.parallel import Parallel
from megatron_aligndistil.engine.schedule import Model


class MegatronSampler:
    """A :class:`Sampler` over a model in this process: the very weights being trained, with nothing to copy or sync.

    Args:
        batch_size: responses in progress at a time on one data parallel rank.
        to_text: token ids -> text, for stop strings.
    """

    def __init__(
        self, model: Model, parallel: Parallel, batch_size: int, to_text: Callable[[Sequence[int]], str]
    ) -> None:
        self._model, self._parallel, self._batch_size, self._to_text = model, parallel, batch_size, to_text

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> list[Completion | None]:
        """A response for each prompt; prompts are dealt to data parallel ranks, and other ranks' entries are None.

        Row i draws from a random stream that depends on the seed and i alone: samples are the same at any layout and
        batch size. Collectives: Megatron's own in each forward pass, one small all-gather a token over the tensor
        parallel group (ops/sampling.py); under pipeline parallelism hidden states go from stage to stage and tokens
        back to all. Raises ConfigError where prompt and response do not fit the model's positions.
        """
        parallel = self._parallel
        mine = range(parallel.dp_rank, len(prompts), parallel.dp)
        results: list[Completion | None] = [None] * len(prompts)
        if not mine:
            return results
        num_rows = min(self._batch_size, len(mine))
        decoder = Decoder(
            self._model,
            parallel,
            num_rows=num_rows,
            max_length=max(len(prompt) for prompt in prompts) + sampling.max_new_tokens,
            to_text=self._to_text,
            admit_at=max(1, num_rows // 8),
        )
        # Prompts that are taken in together are padded to one length, so those of like length go together.
        for row in sorted(mine, key=lambda row: len(prompts[row])):
            decoder.add(Request(row, prompts[row], sampling, stream=row))
        done = 0
        with decoder.cache.attached():
            while not decoder.is_idle:
                for request in decoder.step():
                    if request.finish is not None:
                        results[request.key] = request.completion()
                        done += 1
                on_progress(done)
        return results


def gather_completions(mine: Sequence[Completion | None], parallel: Parallel) -> list[Completion]:
    """Every row's completion on every rank, from the rows that each data parallel rank sampled.

    Collectives: one object gather over the data parallel group.
    """
    parts: list = [None] * parallel.dp
    dist.all_gather_object(parts, list(mine), group=parallel.dp_group)
    return [next(entry for entry in entries if entry is not None) for entries in zip(*parts, strict=True)]
