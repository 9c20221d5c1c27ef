"""Sampling the next token from a vocabulary that is split across the tensor parallel group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_aligndistil.ops.collectives import gather_ranks, sum_ranks
from megatron_aligndistil.ops.head import VocabShard

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Truncation:
    """Which tokens may be drawn, row by row; top-p counts what top-k has left.

    Attributes:
        top_k_B: int64, only tokens at least as likely as the k-th likeliest; 0 allows all.
        top_p_B: float64 in (0, 1], only the likeliest tokens that together reach so much probability; 1 allows all.
    """

    top_k_B: Tensor
    top_p_B: Tensor


def _mix(values: Tensor) -> Tensor:
    """A 32-bit integer hash with low bias (multiply-xorshift; C. Wellons' lowbias32), in int64 arithmetic."""
    values = (values ^ (values >> 16)) * 0x7FEB352D & _MASK
    values = (values ^ (values >> 15)) * 0x846CA68B & _MASK
    return values ^ (values >> 16)


def row_keys(seeds_B: Tensor, rows_B: Tensor) -> Tensor:
    """A random key per row that depends on nothing but a seed and the row's own number: [B] int64 -> [B] int64."""
    return _mix(_mix(rows_B & _MASK) ^ _mix((seeds_B & _MASK) ^ 0x5BD1E995))


def gumbel_noise(keys_B: Tensor, positions_B: Tensor, shard: VocabShard) -> Tensor:
    """Gumbel noise [B, v] (fp64) as a pure function of (row key, position, token id).

    Being stateless, the same row draws the same tokens at any tensor parallel size, batch composition or rank.
    """
    tokens_v = torch.arange(shard.start, shard.start + shard.size, device=keys_B.device)
    keys_B = _mix(keys_B ^ _mix(positions_B + 0x9E3779B9 & _MASK))
    bits_Bv = _mix(keys_B[:, None] ^ _mix(tokens_v + 0x85EBCA6B & _MASK)[None])
    uniform_Bv = (bits_Bv.to(torch.float64) + 0.5) / 2**32
    return uniform_Bv.log_().neg_().log_().neg_()


@torch.no_grad()
def sample(
    logits_Bv: Tensor,
    keys_B: Tensor,
    positions_B: Tensor,
    temperature_B: Tensor,
    shard: VocabShard,
    truncation: Truncation | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by the Gumbel-max trick: argmax_v(z_v / temperature + g_v); temperature 0 is greedy.

    Args:
        logits_Bv: this rank's columns, any floating dtype.
        keys_B, positions_B: int64, which noise a row gets: its random key (`row_keys`) and the position it draws for.
        temperature_B: float64.
        shard: which columns these are.
        truncation: top-k and top-p, counted at the row's temperature; None where no row asks for them.

    Returns the tokens [B] (int64) and their log-probabilities [B] (fp64, nats, at temperature 1 and of the whole
    distribution, as a training forward would give them). Collectives over the tensor parallel group: one all-gather of
    five numbers a row; with `truncation`, one more of two and eight all-reduces of 256. Nothing of size V is
    communicated. No gradient.
    """
    logits_Bv = logits_Bv.double()
    num_rows = logits_Bv.shape[0]
    if shard.size:
        greedy_B = temperature_B <= 0
        scores_Bv = logits_Bv
        if not bool(greedy_B.all()):
            noise_Bv = gumbel_noise(keys_B, positions_B, shard)
            warm_Bv = logits_Bv / temperature_B.clamp(min=torch.finfo(torch.float64).tiny)[:, None] + noise_Bv
            scores_Bv = torch.where(greedy_B[:, None], logits_Bv, warm_Bv)
    if truncation is not None:
        allowed_Bv = _allowed(logits_Bv, temperature_B, truncation, shard)
        if shard.size:
            scores_Bv = scores_Bv.masked_fill(~allowed_Bv, -torch.inf)
    if shard.size:
        best_B, index_B = scores_Bv.max(-1)
        chosen_B = logits_Bv.gather(1, index_B[:, None]).squeeze(1)
        peak_B = logits_Bv.amax(-1)
        total_B = torch.exp(logits_Bv - peak_B[:, None]).sum(-1)
        local = torch.stack([best_B, (index_B + shard.start).double(), chosen_B, peak_B, total_B])
    else:
        local = logits_Bv.new_full((5, num_rows), -torch.inf)
        local[1], local[4] = 0, 0
    best, token, chosen, peak, total = gather_ranks(local, shard.tp_group).unbind(1)
    winner_B = best.argmax(0, keepdim=True)
    top_B = peak.amax(0)
    log_normaliser_B = top_B + torch.log((total * torch.exp(peak - top_B)).sum(0))
    return token.gather(0, winner_B).squeeze(0).long(), chosen.gather(0, winner_B).squeeze(0) - log_normaliser_B


def _allowed(logits_Bv: Tensor, temperature_B: Tensor, truncation: Truncation, shard: VocabShard) -> Tensor:
    """Which of this rank's tokens may be drawn, [B, v]; those whose logits are equal in fp32 stand or fall together."""
    order_Bv = _ordered_bits(logits_Bv)
    count_B = torch.where(truncation.top_k_B > 0, truncation.top_k_B.clamp(max=shard.vocab_size), shard.vocab_size)
    floor_B = _floor(order_Bv, torch.ones_like(logits_Bv), count_B.double(), shard)
    allowed_Bv = order_Bv >= floor_B[:, None]

    lowest = torch.finfo(logits_Bv.dtype).min
    peak_B = logits_Bv.amax(-1) if shard.size else logits_Bv.new_full((len(logits_Bv),), lowest)
    peak_B = gather_ranks(peak_B, shard.tp_group).amax(0)
    # A greedy row draws the likeliest token in any case; any positive temperature keeps its arithmetic finite.
    temperature_B = torch.where(temperature_B > 0, temperature_B, 1.0)
    weight_Bv = ((logits_Bv - peak_B[:, None]) / temperature_B[:, None]).exp() * allowed_Bv
    total_B = sum_ranks(weight_Bv.sum(-1), shard.tp_group)
    floor_B = _floor(order_Bv, weight_Bv, truncation.top_p_B * total_B, shard)
    nucleus_Bv = (order_Bv >= floor_B[:, None]) | (truncation.top_p_B >= 1)[:, None]
    return allowed_Bv & nucleus_Bv


def _ordered_bits(values: Tensor) -> Tensor:
    """Integers in 0..2^32-1 (int64) in the order of `values` rounded to fp32."""
    bits = values.float().view(torch.int32).long()
    return torch.where(bits >= 0, bits + 2**31, -1 - bits)  # a sign bit and a magnitude, turned into one line


def _floor(order_Bv: Tensor, weight_Bv: Tensor, target_B: Tensor, shard: VocabShard) -> Tensor:
    """The largest key τ of each row such that tokens with keys >= τ weigh at least `target_B` together: [B] int64.

    A radix selection, byte by byte from the highest: a histogram of the weights tells which byte τ has, and only tokens
    that share τ's bytes so far are looked at in the next. Collectives: four all-reduces of [B, 256].
    """
    floor_B = torch.zeros_like(target_B, dtype=torch.long)
    above_B = torch.zeros_like(target_B)
    for shift in (24, 16, 8, 0):
        here_Bv = (order_Bv >> (shift + 8)) == (floor_B >> (shift + 8))[:, None]
        local_BN = weight_Bv.new_zeros(len(target_B), 256)
        local_BN.scatter_add_(1, (order_Bv >> shift) & 255, weight_Bv * here_Bv)
        histogram_BN = sum_ranks(local_BN, shard.tp_group)
        reached_BN = above_B[:, None] + histogram_BN.flip(1).cumsum(1).flip(1)  # weight of keys with this byte or more
        # Byte 0 reaches all there is; rounding of the sum must not make it miss a target of all.
        byte_B = (reached_BN >= target_B[:, None]).sum(1).clamp(min=1) - 1
        above_B = reached_BN.gather(1, byte_B[:, None])[:, 0] - histogram_BN.gather(1, byte_B[:, None])[:, 0]
        floor_B = floor_B | (byte_B << shift)
    return floor_B
