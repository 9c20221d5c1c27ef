"""Global batches: the same examples in the same order however many ranks share them and however they are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch

from megatron_aligndistil.data.batch import MicroBatch, Responses
from megatron_aligndistil.data.dataset import Example, TokenDataset
from megatron_aligndistil.data.mismatched import mismatch
from megatron_aligndistil.data.tokens import make_row
from megatron_aligndistil.errors import ConfigError


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
    rows = [row for column in zip(*examples, strict=True) for row in column]
    # One column more than S, so that the last state of a full row has a target too (of the shifted mask).
    tokens_BS1 = np.full((len(rows), length + 1), pad_id, dtype=np.int64)
    lengths_B = np.array([row.num_targets for row in rows], dtype=np.int64)
    ratings_B = np.array([np.nan if row.rating is None else row.rating for row in rows], dtype=np.float32)
    position_lists, row_lists, sampled_lists = [], [], []
    for index, row in enumerate(rows):
        tokens_BS1[index, : len(row.tokens)] = row.tokens
        stop = len(row.tokens) if shifted_mask else len(row.tokens) - 1
        position_lists.append(np.arange(stop - lengths_B[index], stop))
        row_lists.append(np.full(lengths_B[index], index))
        sampled = np.full(lengths_B[index], np.nan) if row.logprobs is None else row.logprobs
        sampled_lists.append(sampled[len(sampled) - lengths_B[index] :].astype(np.float32))
    columns_T = np.concatenate(position_lists).astype(np.int64)
    rows_T = np.concatenate(row_lists).astype(np.int64)
    return MicroBatch(
        tokens_BS=torch.from_numpy(np.ascontiguousarray(tokens_BS1[:, :-1])),
        positions_T=torch.from_numpy(rows_T * length + columns_T),
        responses=Responses(
            targets_T=torch.from_numpy(tokens_BS1[rows_T, columns_T + 1]),
            rows_T=torch.from_numpy(rows_T),
            lengths_B=torch.from_numpy(lengths_B),
            ratings_B=torch.from_numpy(ratings_B),
            sampled_T=torch.from_numpy(np.concatenate(sampled_lists)),
        ),
    )


class GlobalBatches:
    """One data parallel rank's micro-batches of every optimiser step.

    The order of examples is a function of (seed, epoch) alone. A global batch is cut into `dp_size` contiguous blocks,
    and a block into micro-batches, so that reading ranks and micro-batches one after another gives the global batch in
    its order, whatever `dp_size` and `micro_size`. All micro-batches of a step, on all ranks, have one length S: the
    longest row of the global batch, rounded up to a multiple of `pad_multiple`; so every rank works on the same shapes.

    Args:
        dataset: the examples.
        global_size: examples in a step, over all ranks (`batch.global_size`), repetitions included.
        micro_size: examples in a micro-batch (`batch.micro_size`).
        pad_id: the token that fills rows up.
        dp_rank, dp_size: which rank this is, of how many.
        seed: seed of the order.
        shuffle: draw a new order each epoch; otherwise the order of the dataset.
        pad_multiple: what S is a multiple of (the tensor parallel size under sequence parallelism; 16 for FP8).
        drop_last: leave out the examples of an epoch that fill no whole step; otherwise the last step is filled up with
            rows of length 0, which count for nothing, so that every rank has equally many micro-batches.
        shifted_mask: see :func:`collate`.
        repeat: how many times in a row an example stands in a global batch (a prompt that is to be answered n times).
        max_length: the longest row that may be made of a prompt and another's response; None: the longest of `dataset`.

    Raises ConfigError where `global_size` cannot be cut so, or the dataset fills no step.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        global_size: int,
        micro_size: int,
        pad_id: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        pad_multiple: int = 1,
        drop_last: bool = True,
        shifted_mask: bool = False,
        repeat: int = 1,
        max_length: int | None = None,
    ) -> None:
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        if global_size % (micro_size * dp_size):
            above = -(-global_size // (micro_size * dp_size)) * micro_size * dp_size
            raise ConfigError(
                f"batch.global_size {global_size} is not a multiple of batch.micro_size {micro_size} x {dp_size} data "
                f"parallel ranks = {micro_size * dp_size}; set batch.global_size to {above}, or lower batch.micro_size"
            )
        if global_size % repeat:
            raise ConfigError(
                f"batch.global_size {global_size} counts responses and is not a multiple of {repeat} a prompt; set it "
                f"to {-(-global_size // repeat) * repeat}"
            )
        self._num_distinct = global_size // repeat
        if drop_last and len(dataset) < self._num_distinct:
            each = f" / {repeat} responses each" if repeat > 1 else ""
            raise ConfigError(
                f"the training data has {len(dataset)} examples, fewer than batch.global_size {global_size}{each}, so "
                f"no step can be made; lower batch.global_size or add data"
            )
        self._dataset = dataset
        self._global_size = global_size
        self._micro_size = micro_size
        self._pad_id = pad_id
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._seed = seed
        self._shuffle = shuffle
        self._pad_multiple = pad_multiple
        self._shifted_mask = shifted_mask
        self._orders: dict[int, list[int]] = {}
        self._repeat = repeat
        self._max_length = max_length
        whole, rest = divmod(len(dataset), self._num_distinct)
        self.steps_per_epoch: int = whole + (1 if rest and not drop_last else 0)

    def __len__(self) -> int:
        """Steps in an epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """One epoch, the first."""
        return (self.at(step) for step in range(self.steps_per_epoch))

    def indices(self, step: int) -> list[int]:
        """Which examples the global batch of a step holds, in order; fewer than `global_size` where it is filled up."""
        epoch, within = divmod(step, self.steps_per_epoch)
        chosen = self._order(epoch)[within * self._num_distinct : (within + 1) * self._num_distinct]
        return [index for index in chosen for _ in range(self._repeat)]

    def examples(self, step: int) -> list[Example]:
        """The global batch of a step, of all ranks."""
        return [self._dataset[index] for index in self.indices(step)]

    def num_tokens(self, step: int) -> int:
        """Tokens in the global batch of a step, prompts included and padding left out."""
        return sum(len(row.tokens) for example in self.examples(step) for row in example)

    def at(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step, counted from 0 over all epochs; any step, in any order."""
        return self.cut(self.examples(step))

    def mismatched(self, step: int) -> list[MicroBatch]:
        """The micro-batches of :meth:`at` with the responses of other prompts, chosen by :func:`mismatch`.

        For examples of one row. As many micro-batches, row for row with the same prompts, but without ratings; their S
        may be another. Which prompt gets which response depends on the global batch alone, not on how it is cut.
        """
        assert self._dataset.rows_per_example == 1, "pairs have no mismatched responses"
        rows = mismatch([row for (row,) in self.examples(step)], self._max_length or self._longest)
        return self.cut([(row,) for row in rows])

    def cut(self, examples: Sequence[Example]) -> list[MicroBatch]:
        """This rank's micro-batches of a global batch of these examples, filled up where they are fewer."""
        batch = list(examples)
        longest = max(1, *(len(row.tokens) for example in batch for row in example))
        length = -(-longest // self._pad_multiple) * self._pad_multiple
        filler = (make_row([], []),) * self._dataset.rows_per_example
        batch += [filler] * (self._global_size - len(batch))
        share = self._global_size // self._dp_size
        first = self._dp_rank * share
        return [
            collate(
                batch[start : start + self._micro_size],
                length=length,
                pad_id=self._pad_id,
                shifted_mask=self._shifted_mask,
            )
            for start in range(first, first + share, self._micro_size)
        ]

    @cached_property
    def _longest(self) -> int:
        return max(len(row.tokens) for example in self._dataset for row in example)

    def _order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            epoch = 0
        if epoch not in self._orders:
            count = len(self._dataset)
            order = np.random.default_rng([self._seed, epoch]).permutation(count) if self._shuffle else np.arange(count)
            self._orders = {epoch: order.tolist()}
        return self._orders[epoch]
