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
class Packing:
    """Where sequences lie that stand one behind another in a single row of the grid.

    Attributes:
        cu_seqlens: int32, strictly increasing from 0 to the length of the grid's row: the place where each sequence
            begins, and the end of the last. What is left behind the last row of the data is a sequence of padding.
        longest: the length of the longest of these sequences.
    """

    cu_seqlens: Tensor
    longest: int


@dataclass(frozen=True)
class MicroBatch:
    """Rows of tokens with the response positions marked, on a grid in one of two layouts.

    Padded: B rows of S places, each row on its own and padded on the right. Packed: one row of S places that holds all
    B rows of the data, one behind another (`packing` says where), each seen by a model as if it were alone.

    Attributes:
        tokens_BS: int64; packed [1, S]. Padding is behind the tokens, so that causal attention needs no mask for it.
        positions_T: int64, indices into the flattened grid of the states that predict response tokens.
        responses: the same positions as losses see them.
        packing: None in the padded layout.
    """

    tokens_BS: Tensor
    positions_T: Tensor
    responses: Responses
    packing: Packing | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on `device`."""
        r, packing = self.responses, self.packing
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
            packing and replace(packing, cu_seqlens=packing.cu_seqlens.to(device)),
        )

    @property
    def columns_BS(self) -> Tensor:
        """int64, of the shape of `tokens_BS`: the place of each token in its own sequence, counted from 0."""
        length = self.tokens_BS.shape[1]
        columns_S = torch.arange(length, device=self.tokens_BS.device)
        if self.packing is not None:
            starts = self.packing.cu_seqlens.long()
            columns_S = columns_S - starts[:-1].repeat_interleave(starts.diff(), output_size=length)
        return columns_S.expand_as(self.tokens_BS)

    @property
    def ends_B(self) -> Tensor:
        """int64, index into the flattened grid of each row's last token; of a filler row, some place of the grid.

        It is one place after the state that predicts that token.
        """
        ends_B = torch.zeros_like(self.responses.lengths_B)
        if self.packing is None:
            num_rows, length = self.tokens_BS.shape
            ends_B = torch.arange(num_rows, device=self.tokens_BS.device) * length
        return ends_B.scatter_reduce(0, self.responses.rows_T, self.positions_T + 1, "amax")
