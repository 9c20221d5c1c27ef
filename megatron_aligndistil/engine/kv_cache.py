"""Feeding a Megatron model a few tokens at a time, against cached keys and values of rows of unlike lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_aligndistil.engine.model import HiddenStateGPT
from megatron_aligndistil.engine.parallel import Parallel
from megatron_aligndistil.engine.schedule import Model


class KVCache:
    """Keys and values of up to `num_rows` sequences, for every layer of this pipeline stage.

    Megatron's static inference context moves all rows on together, and its dynamic one needs CUDA and flash attention
    (docs/decisions/0005). Here each row has its own length: inside :meth:`attached` every layer's core attention is
    replaced by one that stores what comes and attends to what is there, so projections, norms, feed-forward layers and
    their parallelism stay Megatron's, of whichever layer specification, and the weights are those being trained.

    Memory: 2 · num_rows · max_length · key-value heads of this rank · head size, for each layer, in the model's dtype.
    """

    def __init__(self, model: Model, num_rows: int, max_length: int, parallel: Parallel) -> None:
        self._parallel = parallel
        self._chunks: list[HiddenStateGPT] = [unwrap_model(chunk) for chunk in model.chunks]
        self._frequencies = model.arch.inverse_frequencies().to(parallel.backend.device)
        config = self._chunks[0].config
        self._multiple = 16 if config.fp8 else 1  # of rows and lengths: FP8 products want it
        num_rows = _round_up(num_rows, self._multiple)
        shape = (num_rows, model.arch.num_kv_heads // parallel.tp, max_length, model.arch.head_dim)
        self._attentions = [
            [_CachedAttention(self, shape, config.params_dtype, parallel.backend.device) for _ in chunk.decoder.layers]
            for chunk in self._chunks
        ]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While inside, the model's layers attend through this cache, in evaluation mode, without sequence parallelism
        (there is one token of a row at a time, and nothing to split)."""
        kept: list[list[Any]] = []
        training = [chunk.training for chunk in self._chunks]
        for chunk, attentions in zip(self._chunks, self._attentions, strict=True):
            kept.append([layer.self_attention.core_attention for layer in chunk.decoder.layers])
            self._attach(chunk, attentions)
            chunk.eval()
            if self._parallel.sequence_parallel:
                set_model_to_sequence_parallel(chunk, False)
        try:
            yield
        finally:
            for chunk, cores, was_training in zip(self._chunks, kept, training, strict=True):
                self._attach(chunk, cores)
                chunk.train(was_training)
                if self._parallel.sequence_parallel:
                    set_model_to_sequence_parallel(chunk, True)

    @staticmethod
    def _attach(chunk: HiddenStateGPT, attentions: Sequence[Any]) -> None:
        for layer, attention in zip(chunk.decoder.layers, attentions, strict=True):
            layer.self_attention.core_attention = attention

    def prefill(self, prompts: Sequence[Sequence[int]], first_row: int) -> Tensor:
        """Begin rows first_row.. with these prompts; returns the state after each prompt's last token, [B, H].

        What is returned is the model's output on the last pipeline stage, and means nothing on others.
        """
        lengths = [len(prompt) for prompt in prompts]
        longest = _round_up(max(lengths), self._multiple)
        tokens_BS = torch.zeros(len(prompts), longest, dtype=torch.long)
        for index, prompt in enumerate(prompts):
            tokens_BS[index, : lengths[index]] = torch.tensor(prompt)
        device = self._parallel.backend.device
        positions_BS = torch.arange(longest, device=device).expand(len(prompts), longest)
        # Padding leaves keys and values behind the prompt; no row looks there before it has written them itself.
        self._place(slice(first_row, first_row + len(prompts)), positions_BS, longest, is_prefill=True)
        hidden_SBH = self._forward(tokens_BS.to(device))
        last_B = torch.tensor(lengths, device=device) - 1
        return hidden_SBH[last_B, torch.arange(len(prompts), device=device)]

    def extend(self, tokens_B: Tensor, lengths: Sequence[int]) -> Tensor:
        """Append a token to each of the first B rows, which are so long; returns the states after them, [B, H]."""
        num_rows = len(lengths)
        padding = -num_rows % self._multiple  # rows not in use
        positions_B1 = torch.tensor([*lengths, *[0] * padding], device=tokens_B.device)[:, None]
        rows_B = torch.arange(num_rows + padding, device=tokens_B.device)
        self._place(rows_B, positions_B1, max(lengths) + 1, is_prefill=False)
        tokens_B1 = torch.cat([tokens_B, tokens_B.new_zeros(padding)])[:, None]
        return self._forward(tokens_B1)[0, :num_rows]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row to another."""
        for attention in (attention for attentions in self._attentions for attention in attentions):
            for cache in (attention.key_BGSD, attention.value_BGSD):
                cache[target, :, :length] = cache[source, :, :length]

    def _place(self, rows: slice | Tensor, positions_BS: Tensor, length: int, *, is_prefill: bool) -> None:
        """Say where the tokens of the next forward pass belong; `length` of the longest row, with them."""
        self.rows, self.positions_BS, self.length, self.is_prefill = rows, positions_BS, length, is_prefill
        # As Megatron's: both halves of a head turn by the same angles, rounded to the model's dtype.
        angles_SB1D = (positions_BS.T[..., None] * self._frequencies).repeat(1, 1, 2)[:, :, None]
        dtype = self._chunks[0].config.params_dtype
        self.cos_SB1D, self.sin_SB1D = angles_SB1D.cos().to(dtype), angles_SB1D.sin().to(dtype)
        columns_S = torch.arange(length, device=positions_BS.device)
        self.visible_B11S = columns_S <= positions_BS[:, -1, None, None, None]

    @torch.no_grad()
    def _forward(self, tokens_BS: Tensor) -> Tensor:
        """Through all stages and, under the interleaved schedule, all rounds of chunks: [S, B, H]."""
        num_rows, length = tokens_BS.shape
        parallel = self._parallel
        hidden_SBH = torch.empty(0)
        for chunk in self._chunks:
            embedded_SBH = None
            if chunk.pre_process:
                embedded_SBH = chunk.embedding(input_ids=tokens_BS, position_ids=self.positions_BS)
            else:
                shape = (length, num_rows, chunk.config.hidden_size)
                received_SBH = torch.empty(shape, dtype=chunk.config.params_dtype, device=tokens_BS.device)
                dist.recv(received_SBH, src=self._stage(parallel.pp_rank - 1), group=parallel.pp_group)
                chunk.set_input_tensor(received_SBH)
            # No rotary embedding and no mask are handed over: the cached attention has its own.
            hidden_SBH = chunk.decoder(hidden_states=embedded_SBH, attention_mask=None, rotary_pos_emb=None)
            if not chunk.post_process:
                dist.send(hidden_SBH.contiguous(), dst=self._stage(parallel.pp_rank + 1), group=parallel.pp_group)
        return hidden_SBH

    def _stage(self, number: int) -> int:
        """The global rank of a pipeline stage, counted around."""
        return dist.get_global_rank(self._parallel.pp_group, number % self._parallel.pp)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class _CachedAttention(torch.nn.Module):
    """Rotates, stores and attends, in the place of Megatron's core attention. Suffixes: N query heads, G key-value
    heads, D head size."""

    def __init__(self, cache: KVCache, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.cache = cache
        self.key_BGSD = torch.zeros(shape, dtype=dtype, device=device)
        self.value_BGSD = torch.zeros(shape, dtype=dtype, device=device)

    def forward(self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, *_: Any, **__: Any) -> Tensor:
        """[S, B, N, D], [S, B, G, D] twice -> [S, B, N·D]."""
        cache = self.cache
        length, num_rows, num_heads, head_dim = query_SBND.shape
        num_groups = key_SBGD.shape[2]
        query_SBND, key_SBGD = self._rotate(query_SBND), self._rotate(key_SBGD)
        if cache.is_prefill:
            self.key_BGSD[cache.rows, :, :length] = key_SBGD.permute(1, 2, 0, 3)
            self.value_BGSD[cache.rows, :, :length] = value_SBGD.permute(1, 2, 0, 3)
            output_BNSD = scaled_dot_product_attention(
                query_SBND.permute(1, 2, 0, 3),
                key_SBGD.permute(1, 2, 0, 3),
                value_SBGD.permute(1, 2, 0, 3),
                is_causal=True,
                enable_gqa=num_heads != num_groups,
            )
            return output_BNSD.permute(2, 0, 1, 3).reshape(length, num_rows, num_heads * head_dim)
        self.key_BGSD[cache.rows, :, cache.positions_BS[:, 0]] = key_SBGD[0]
        self.value_BGSD[cache.rows, :, cache.positions_BS[:, 0]] = value_SBGD[0]
        # The query heads of one group stand where a sequence of queries would: nothing is repeated.
        output_BGRD = scaled_dot_product_attention(
            query_SBND[0].view(num_rows, num_groups, num_heads // num_groups, head_dim),
            self.key_BGSD[:num_rows, :, : cache.length],
            self.value_BGSD[:num_rows, :, : cache.length],
            attn_mask=cache.visible_B11S,
        )
        return output_BGRD.reshape(1, num_rows, num_heads * head_dim)

    def _rotate(self, heads_SBND: Tensor) -> Tensor:
        first, second = heads_SBND.chunk(2, dim=-1)
        return heads_SBND * self.cache.cos_SB1D + torch.cat((-second, first), dim=-1) * self.cache.sin_SB1D
