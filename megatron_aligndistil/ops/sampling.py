"""Sampling the next token from a vocabulary that is split across the tensor parallel group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.ops.head import VocabShard

_MASK = 0xFFFFFFFF


def _mix(values: Tensor) -> Tensor:
    """A 32-bit integer hash with low bias (multiply-xorshift; C. Wellons' lowbias32), in int64 arithmetic."""
    values = (values ^ (values >> 16)) * 0x7FEB352D & _MASK
    values = (values ^ (values >> 15)) * 0x846CA68B & _MASK
    return values ^ (values >> 16)


def row_keys(seed: int, rows_B: Tensor) -> Tensor:
    """A random key per row that depends on nothing but the seed and the row's own number: [B] int64 -> [B] int64."""
    return _mix(_mix(rows_B & _MASK) ^ _mix(torch.full_like(rows_B, seed & _MASK) ^ 0x5BD1E995))


def gumbel_noise(keys_B: Tensor, position: int, shard: VocabShard, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gumbel noise [B, v] as a pure function of (row key, position, token id).

    Being stateless, the same row draws the same tokens at any tensor parallel size, batch composition or rank.
    """
    tokens_v = torch.arange(shard.start, shard.start + shard.size, device=keys_B.device)
    keys_B = _mix(keys_B ^ _mix(torch.full_like(keys_B, position) + 0x9E3779B9 & _MASK))
    bits_Bv = _mix(keys_B[:, None] ^ _mix(tokens_v + 0x85EBCA6B & _MASK)[None])
    uniform_Bv = (bits_Bv.to(torch.float64) + 0.5) / 2**32
    return -torch.log(-torch.log(uniform_Bv)).to(dtype)


def sample(
    logits_Bv: Tensor, keys_B: Tensor, position: int, temperature: float, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by the Gumbel-max trick: argmax_v(z_v / temperature + g_v); temperature 0 is greedy.

    Returns the tokens [B] (int64) and their log-probabilities [B] (nats, at temperature 1). Collectives: one all-gather
    of five numbers a row over the tensor parallel group; nothing of size V is communicated. No gradient.
    """
    logits_Bv = logits_Bv.double()
    num_rows = logits_Bv.shape[0]
    if shard.size:
        scores_Bv = logits_Bv
        if temperature > 0:
            scores_Bv = logits_Bv / temperature + gumbel_noise(keys_B, position, shard, torch.float64)
        best_B, index_B = scores_Bv.max(-1)
        chosen_B = logits_Bv.gather(1, index_B[:, None]).squeeze(1)
        peak_B = logits_Bv.amax(-1)
        total_B = torch.exp(logits_Bv - peak_B[:, None]).sum(-1)
        local = torch.stack([best_B, (index_B + shard.start).double(), chosen_B, peak_B, total_B])
    else:
        local = logits_Bv.new_full((5, num_rows), -torch.inf)
        local[1], local[4] = 0, 0
    parts = [local]
    if shard.tp_group is not None and dist.get_world_size(shard.tp_group) > 1:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(shard.tp_group))]
        dist.all_gather(parts, local, group=shard.tp_group)
    best, token, chosen, peak, total = torch.stack(parts, dim=1)
    winner_B = best.argmax(0, keepdim=True)
    top_B = peak.amax(0)
    log_normaliser_B = top_B + torch.log((total * torch.exp(peak - top_B)).sum(0))
    return token.gather(0, winner_B).squeeze(0).long(), chosen.gather(0, winner_B).squeeze(0) - log_normaliser_B
