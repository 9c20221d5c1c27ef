"""Examples become micro-batches: rows side by side and padded, or one behind another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_aligndistil.data.batch import MicroBatch, Packing, Responses
from megatron_aligndistil.data.dataset import Example
from megatron_aligndistil.data.tokens import Row


def collate(examples: Sequence[Example], *, length: int, pad_id: int, shifted_mask: bool = False) -> MicroBatch:
    """Pad examples to rows of `length` tokens and mark the states that predict their responses.

    Rows are the first row of every example, then the second of every example. The states marked for a row of n
    tokens, p of them its prompt, are p - 1 .. n - 2, of which state t predicts token t + 1. Without a prompt no state
    predicts the first token, and the marks begin at 0. A filler (a row without tokens) is all padding, of length 0.

    Args:
        examples: all with the same number of rows.
        length: S, at least the longest row.
        pad_id: the token that fills rows up.
        shifted_mask: mark p .. n - 1 instead, one position late, as the authors' off-policy code does. The last of
            these is the state after the end of sequence, which predicts nothing in the row: its target is `pad_id`, so
            this mask is for losses that look at whole distributions and not at targets.
    """
    rows = _by_column(examples)
    starts = np.arange(len(rows)) * length
    tokens_BS = _lay_out(rows, starts, len(rows) * length, pad_id).view(len(rows), length)
    positions_T, responses = _mark(rows, starts, pad_id, shifted_mask)
    return MicroBatch(tokens_BS, positions_T, responses)


def pack(examples: Sequence[Example], *, length: int, pad_id: int, shifted_mask: bool = False) -> MicroBatch:
    """As :func:`collate`, with all rows one behind another in a single row of `length` places.

    `length` is at least the tokens of all examples together. A filler takes up no place.
    """
    rows = _by_column(examples)
    ends = np.cumsum([len(row.tokens) for row in rows])
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    positions_T, responses = _mark(rows, starts, pad_id, shifted_mask)
    cu_seqlens = np.unique([0, *ends, length])
    return MicroBatch(
        _lay_out(rows, starts, length, pad_id).view(1, length),
        positions_T,
        responses,
        Packing(torch.from_numpy(cu_seqlens.astype(np.int32)), int(np.diff(cu_seqlens).max())),
    )


def _by_column(examples: Sequence[Example]) -> list[Row]:
    return [row for column in zip(*examples, strict=True) for row in column]


def _lay_out(rows: Sequence[Row], starts: NDArray[np.int64], num_places: int, pad_id: int) -> torch.Tensor:
    """The tokens of a flattened grid, int64 [num_places], each row from its start on."""
    tokens = np.full(num_places, pad_id, dtype=np.int64)
    for row, start in zip(rows, starts, strict=True):
        tokens[start : start + len(row.tokens)] = row.tokens
    return torch.from_numpy(tokens)


def _mark(
    rows: Sequence[Row], starts: NDArray[np.int64], pad_id: int, shifted_mask: bool
) -> tuple[torch.Tensor, Responses]:
    """The response positions of rows that begin at `starts` of a flattened grid, and what losses see of them."""
    positions, targets, sampled = [], [], []
    for row, start in zip(rows, starts, strict=True):
        stop = len(row.tokens) if shifted_mask else len(row.tokens) - 1
        columns = np.arange(stop - row.num_targets, stop)
        positions.append(start + columns)
        # Behind the last token stands padding, whatever follows on the grid.
        targets.append(np.append(row.tokens, pad_id)[columns + 1])
        logprobs = np.full(row.num_targets, np.nan) if row.logprobs is None else row.logprobs
        sampled.append(logprobs[len(logprobs) - row.num_targets :])
    lengths_B = np.array([row.num_targets for row in rows], dtype=np.int64)
    ratings_B = np.array([np.nan if row.rating is None else row.rating for row in rows], dtype=np.float32)
    return torch.from_numpy(np.concatenate(positions).astype(np.int64)), Responses(
        targets_T=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        rows_T=torch.from_numpy(np.repeat(np.arange(len(rows)), lengths_B)),
        lengths_B=torch.from_numpy(lengths_B),
        ratings_B=torch.from_numpy(ratings_B),
        sampled_T=torch.from_numpy(np.concatenate(sampled).astype(np.float32)),
    )
