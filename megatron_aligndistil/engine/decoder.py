"""Continuous batching: sequences join and leave a batch that is extended token by token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_aligndistil.engine.completions import Completion, Finish, Sampling
from megatron_aligndistil.engine.kv_cache import KVCache
from megatron_aligndistil.engine.parallel import Parallel
from megatron_aligndistil.engine.schedule import Model
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.ops.sampling import Truncation, row_keys, sample

_PREFILL_TOKENS = 16_384  # in one forward pass, padding included; bounds the memory of its activations


@dataclass
class Request:
    """A prompt to answer, and the answer so far.

    Attributes:
        key: the caller's number for it.
        stream: number of its random stream: the tokens drawn depend on weights, prompt, `sampling` and this alone.
    """

    key: int
    prompt: Sequence[int]
    sampling: Sampling
    stream: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.tokens)

    def completion(self) -> Completion:
        """The whole answer."""
        assert self.finish is not None, "asked for once it is complete"
        return Completion(self.tokens, self.logprobs, self.finish)


class Decoder:
    """Answers requests with one model replica, up to `num_rows` at a time.

    A finished row makes room for a waiting prompt, so that one long response does not idle the batch. All ranks that
    share the replica (tensor and pipeline parallel) make the same calls in the same order. Used inside
    ``cache.attached()``.

    Args:
        max_length: the longest prompt and response together.
        to_text: token ids -> text, for stop strings.
        admit_at: how many rows have to be free before waiting prompts are taken in: each time costs a forward pass
            during which the running rows wait. 1 is best for latency.
    """

    def __init__(
        self,
        model: Model,
        parallel: Parallel,
        *,
        num_rows: int,
        max_length: int,
        to_text: Callable[[Sequence[int]], str],
        admit_at: int = 1,
    ) -> None:
        if max_length > model.arch.max_positions:
            raise ConfigError(
                f"a prompt and its response may take {max_length} tokens, and the model has "
                f"{model.arch.max_positions} positions; lower max_new_tokens or max_prompt_length"
            )
        self._model, self._parallel = model, parallel
        self._num_rows, self._max_length = num_rows, max_length
        self._to_text, self._admit_at = to_text, admit_at
        self._waiting: deque[Request] = deque()
        self._rows: list[Request] = []  # in the order of the cache's rows
        self.cache = KVCache(model, num_rows, max_length, parallel)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not (self._waiting or self._rows)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ConfigError where it does not fit."""
        if not request.prompt:
            raise ConfigError("a prompt has no tokens at all; give at least a beginning-of-sequence token")
        if len(request.prompt) + request.sampling.max_new_tokens > self._max_length:
            raise ConfigError(
                f"a prompt of {len(request.prompt)} tokens and {request.sampling.max_new_tokens} new ones make more "
                f"than {self._max_length}; lower max_new_tokens or shorten the prompt"
            )
        self._waiting.append(request)

    def cancel(self, key: int) -> None:
        """Forget a request, waiting or running; unknown keys are ignored."""
        self._waiting = deque(request for request in self._waiting if request.key != key)
        for row in reversed(range(len(self._rows))):
            if self._rows[row].key == key:
                self._remove(row)

    def step(self) -> list[Request]:
        """Draw one token for some requests, and return them; those with a `finish` are complete and gone from here.

        A step either takes in waiting prompts and draws the first token of each, or extends all running rows by one.
        """
        free = self._num_rows - len(self._rows)
        if self._waiting and (free >= self._admit_at or not self._rows):
            drawn = self._admit(free)
        else:
            drawn = self._rows
            tokens_B = torch.tensor([row.tokens[-1] for row in drawn], device=self._parallel.backend.device)
            hidden_BH = self.cache.extend(tokens_B, [row.length - 1 for row in drawn])
            self._draw(hidden_BH, drawn)
        drawn = list(drawn)
        for row in reversed(range(len(self._rows))):
            if self._rows[row].finish is not None:
                self._remove(row)
        return drawn

    def _admit(self, free: int) -> list[Request]:
        """Prefill waiting prompts into the rows behind the running ones, as many as one forward pass takes."""
        taken: list[Request] = []
        longest = 0
        while self._waiting and len(taken) < free:
            longest = max(longest, len(self._waiting[0].prompt))
            if taken and longest * (len(taken) + 1) > _PREFILL_TOKENS:
                break
            taken.append(self._waiting.popleft())
        hidden_BH = self.cache.prefill([request.prompt for request in taken], len(self._rows))
        self._rows += taken
        self._draw(hidden_BH, taken)
        return taken

    def _remove(self, row: int) -> None:
        """Take a row out; the last one moves into its place, so that running rows are always the first."""
        last = self._rows.pop()
        if row < len(self._rows):
            self.cache.move(len(self._rows), row, last.length)
            self._rows[row] = last

    def _draw(self, hidden_BH: Tensor, requests: Sequence[Request]) -> None:
        """Draw the next token of each request on the last stage, make it known to all, and see which are complete."""
        parallel, device = self._parallel, self._parallel.backend.device
        drawn_2B = torch.zeros(2, len(requests), dtype=torch.float64, device=device)
        if parallel.is_last_stage:
            arch = self._model.arch
            shard = parallel.vocab_shard(arch.vocab_size, arch.padded_vocab_size(parallel.tp))
            weight_vH = unwrap_model(self._model.chunks[-1]).output_weight()[: shard.size]
            settings = [request.sampling for request in requests]
            seeds, streams = [each.seed for each in settings], [request.stream for request in requests]
            truncation = None
            if any(each.top_k > 0 or each.top_p < 1 for each in settings):
                top_p_B = torch.tensor([each.top_p for each in settings], dtype=torch.float64, device=device)
                truncation = Truncation(torch.tensor([each.top_k for each in settings], device=device), top_p_B)
            with torch.no_grad():
                token_B, logprob_B = sample(
                    torch.nn.functional.linear(hidden_BH, weight_vH),
                    row_keys(torch.tensor(seeds, device=device), torch.tensor(streams, device=device)),
                    torch.tensor([request.length for request in requests], device=device),
                    torch.tensor([each.temperature for each in settings], dtype=torch.float64, device=device),
                    shard,
                    truncation,
                )
            drawn_2B = torch.stack([token_B.to(drawn_2B), logprob_B])
        if parallel.pp > 1:
            last = dist.get_global_rank(parallel.pp_group, parallel.pp - 1)
            dist.broadcast(drawn_2B, src=last, group=parallel.pp_group)
        for request, token, logprob in zip(requests, *drawn_2B.tolist(), strict=True):
            request.tokens.append(int(token))
            request.logprobs.append(logprob)
            request.finish = self._finish(request)

    def _finish(self, request: Request) -> Finish | None:
        sampling = request.sampling
        if request.tokens[-1] in sampling.stop_tokens:
            return "stop"
        if sampling.stop_strings:
            # A token is at least a byte and a character at most four, so the tail holds a stop string that ends here.
            tail = request.tokens[-4 * max(len(text) for text in sampling.stop_strings) - 4 :]
            text = self._to_text(tail)
            if any(stop in text for stop in sampling.stop_strings):
                return "stop"
        return "length" if len(request.tokens) >= sampling.max_new_tokens else None
