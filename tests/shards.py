"""A vocabulary cut over ranks as Megatron cuts it, and how a sharded result is compared with a whole one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.ops.head import VocabShard

# (real tokens, padded tokens): even; padded; no real token on the last of 4 ranks; real tokens on the first rank only.
VOCABULARIES = [(12, 12), (10, 16), (9, 12), (4, 16)]
SIZES = [1, 2, 4]


def this_shard(vocab_size: int, padded_size: int) -> VocabShard:
    """The real columns of the calling rank, all ranks of the world sharing the vocabulary."""
    per_rank = padded_size // dist.get_world_size()
    start = min(dist.get_rank() * per_rank, vocab_size)
    return VocabShard(start, min(per_rank, vocab_size - start), vocab_size, dist.group.WORLD)


def columns(full_TV: Tensor, shard: VocabShard) -> Tensor:
    """A leaf of its own with the columns of `full_TV` that belong to `shard`."""
    return full_TV[:, shard.start : shard.start + shard.size].clone().requires_grad_()


def assert_same(actual: Tensor | Sequence[Tensor], expected: Tensor, tolerance: float = 1e-9) -> None:
    """`actual` (parts by rank are joined along the last dimension) equals `expected` relative to its largest entry."""
    if not isinstance(actual, Tensor):
        actual = torch.cat(list(actual), dim=-1)
    assert actual.shape == expected.shape
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    difference = float((actual.to(torch.float64) - expected).abs().max()) if expected.numel() else 0.0
    assert difference <= tolerance * max(scale, 1e-300), f"differs by {difference:.3e} on a scale of {scale:.3e}"
