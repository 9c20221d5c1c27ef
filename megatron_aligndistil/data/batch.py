"""The batches that models and losses see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Responses:
    """The response positions of a micro-batch, flattened: what a loss knows about the data.

    Position t is the state that *predicts* a response token (the last prompt token's state predicts the first
    one), so a response of n tokens, its end-of-sequence token included, has n positions. The T positions are ordered
    by row, then by time. For preference pairs rows come as [chosen of every pair, rejected of every pair], so
    row i and row i + B/2 are one pair.

    Attributes:
        targets_T: int64, the token that each position predicts.
        rows_T: int64, the row in 0..B-1 that each position belongs to.
        lengths_B: int64, the number of positions |y| of each row; 0 marks a filler row, which counts for nothing.
        ratings_B: fp32, a number that rates each response (see :class:`~megatron_aligndistil.data.tokens.Row`), NaN
            where there is none.
        sampled_T: fp32, the log-probability of each target when it was sampled, in nats, NaN where it was not.
        prepared: what an algorithm's `prepare` has found for this micro-batch.
    """

    targets_T: Tensor
    rows_T: Tensor
    lengths_B: Tensor
    ratings_B: Tensor | None = None
    sampled_T: Tensor | None = None
    prepared: Mapping[str, Tensor] = field(default_factory=dict)

    def sum_rows(self, values_T: Tensor) -> Tensor:
        """Sum a value per position over each row: [T] -> [B]. Differentiable; no collectives."""
        return values_T.new_zeros(self.lengths_B.numel()).index_add(0, self.rows_T, values_T)

    def mean_rows(self, values_T: Tensor) -> Tensor:
        """Mean of a value per position over each row, 0 for a filler row: [T] -> [B]. Differentiable."""
        return self.sum_rows(values_T) / self.lengths_B.clamp(min=1)


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded rows of tokens with the response positions marked.

    Attributes:
        tokens_BS: int64, padded on the right; padding needs no mask under causal attention.
        positions_T: int64, indices into the flattened B·S grid of the states that predict response tokens.
        responses: the same positions as losses see them.
    """

    tokens_BS: Tensor
    positions_T: Tensor
    responses: Responses

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on `device`."""
        r = self.responses
        return MicroBatch(
            self.tokens_BS.to(device, non_blocking=True),
            self.positions_T.to(device, non_blocking=True),
            replace(
                r,
                targets_T=r.targets_T.to(device),
                rows_T=r.rows_T.to(device),
                lengths_B=r.lengths_B.to(device),
                ratings_B=None if r.ratings_B is None else r.ratings_B.to(device),
                sampled_T=None if r.sampled_T is None else r.sampled_T.to(device),
            ),
        )

    @property
    def ends_B(self) -> Tensor:
        """int64, index into the flattened B·S grid of each row's last token; of a filler row, its first place.

        It is one place after the state that predicts that token.
        """
        num_rows, length = self.tokens_BS.shape
        ends_B = torch.arange(num_rows, device=self.tokens_BS.device) * length
        return ends_B.scatter_reduce(0, self.responses.rows_T, self.positions_T + 1, "amax")
