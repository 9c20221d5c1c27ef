"""Global batches: the same examples in the same order however many ranks share them and however they are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_aligndistil.data.batch import MicroBatch
from megatron_aligndistil.data.collate import collate, pack
from megatron_aligndistil.data.dataset import Example, TokenDataset
from megatron_aligndistil.data.mismatched import mismatch
from megatron_aligndistil.data.packing import share_out
from megatron_aligndistil.data.tokens import make_row
from megatron_aligndistil.errors import ConfigError


class GlobalBatches:
    """One data parallel rank's micro-batches of every optimiser step.

    The order of examples is a function of (seed, epoch) alone. How a global batch is cut depends on it alone too:

    - With `micro_size`, into `dp_size` contiguous blocks, and a block into micro-batches, so that reading ranks and
      micro-batches one after another gives the global batch in its order, whatever `dp_size` and `micro_size`.
    - With `max_tokens`, by the tokens of its examples (:func:`~megatron_aligndistil.data.packing.share_out`); the rows
      of a micro-batch then stand one behind another (:func:`~megatron_aligndistil.data.collate.pack`).

    All micro-batches of a step, on all ranks, have one length S: the longest row of the global batch, or the tokens of
    its largest micro-batch, rounded up to a multiple of `pad_multiple`; so every rank works on the same shapes.

    Args:
        dataset: the examples.
        global_size: examples in a step, over all ranks (`batch.global_size`), repetitions included.
        micro_size: examples in a micro-batch (`batch.micro_size`), where `max_tokens` is not given.
        max_tokens: places of a micro-batch (`batch.max_tokens`): pack rows.
        micro_multiple: what the number of packed micro-batches of a rank is a multiple of (the pipeline parallel size
            under the interleaved schedule).
        pad_id: the token that fills rows up.
        dp_rank, dp_size: which rank this is, of how many.
        seed: seed of the order.
        shuffle: draw a new order each epoch; otherwise the order of the dataset.
        pad_multiple: what S is a multiple of (the tensor parallel size under sequence parallelism; 16 for FP8).
        drop_last: leave out the examples of an epoch that fill no whole step; otherwise the last step is filled up with
            rows of length 0, which count for nothing, so that every rank has equally many micro-batches.
        shifted_mask: see :func:`~megatron_aligndistil.data.collate.collate`.
        repeat: how many times in a row an example stands in a global batch (a prompt that is to be answered n times).
        max_length: the longest row that may be made of a prompt and another response; None: the longest of `dataset`.
        with_mismatched: whether :meth:`mismatched` will be asked for; packed micro-batches leave room for its rows.

    Raises ConfigError where `global_size` cannot be cut so, an example has more than `max_tokens`, or the dataset fills
    no step.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        global_size: int,
        micro_size: int = 1,
        max_tokens: int | None = None,
        micro_multiple: int = 1,
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
        with_mismatched: bool = False,
    ) -> None:
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        if max_tokens is None and global_size % (micro_size * dp_size):
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
        self._micro_multiple = micro_multiple
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
        self._with_mismatched = with_mismatched
        # Of a packed micro-batch without its padding; None where rows are padded.
        self._capacity = None if max_tokens is None else self._capacity_of(max_tokens)
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
        return int(self._dataset.row_lengths[self.indices(step)].sum())

    def at(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step, counted from 0 over all epochs; any step, in any order."""
        examples = self.examples(step)
        # Only packed rows need room for others.
        beside = self._mismatch(examples) if self._with_mismatched and self._capacity is not None else ()
        return self.cut(examples, beside)

    def mismatched(self, step: int) -> list[MicroBatch]:
        """The micro-batches of :meth:`at` with the responses of other prompts, chosen by :func:`mismatch`.

        For examples of one row. As many micro-batches, row for row with the same prompts, but without ratings; their S
        may be another. Which prompt gets which response depends on the global batch alone, not on how it is cut.
        """
        assert self._capacity is None or self._with_mismatched, "there would be no room for them"
        examples = self.examples(step)
        return self.cut(self._mismatch(examples), examples)

    def cut(self, examples: Sequence[Example], beside: Sequence[Example] = ()) -> list[MicroBatch]:
        """This rank's micro-batches of a global batch of these examples, filled up where they are fewer.

        `beside`, where given, is another global batch of as many examples that is to be cut alike.
        """
        if self._capacity is None:
            form, mine = collate, self._block(examples)
            longest = max((len(row.tokens) for example in examples for row in example), default=0)
        else:
            tokens = list(map(_num_tokens, examples))
            room = list(map(max, tokens, map(_num_tokens, beside))) if beside else tokens
            shares = share_out(room, max_tokens=self._capacity, dp_size=self._dp_size, multiple=self._micro_multiple)
            form, mine = pack, [[examples[index] for index in share] for share in shares[self._dp_rank]]
            longest = max(sum(tokens[index] for index in share) for rank in shares for share in rank)
        length = -(-max(longest, 1) // self._pad_multiple) * self._pad_multiple
        return [
            form(each or [self._filler], length=length, pad_id=self._pad_id, shifted_mask=self._shifted_mask)
            for each in mine
        ]

    def _block(self, examples: Sequence[Example]) -> list[list[Example]]:
        """This rank's block of a global batch, by micro-batches of `micro_size`."""
        full = [*examples, *[self._filler] * (self._global_size - len(examples))]
        share = self._global_size // self._dp_size
        starts = range(self._dp_rank * share, (self._dp_rank + 1) * share, self._micro_size)
        return [full[start : start + self._micro_size] for start in starts]

    @property
    def _filler(self) -> Example:
        return (make_row([], []),) * self._dataset.rows_per_example

    def _mismatch(self, examples: Sequence[Example]) -> list[Example]:
        assert self._dataset.rows_per_example == 1, "pairs have no mismatched responses"
        return [(row,) for row in mismatch([row for (row,) in examples], self._max_length or self._dataset.longest_row)]

    def _capacity_of(self, max_tokens: int) -> int:
        """The multiple of `pad_multiple` within `max_tokens`. Raises ConfigError where an example has more."""
        capacity = max_tokens // self._pad_multiple * self._pad_multiple
        largest = max(int(self._dataset.row_lengths.sum(1).max(initial=0)), self._max_length or 0)
        if largest > capacity:
            needed = -(-largest // self._pad_multiple) * self._pad_multiple
            what = "a pair of responses with their prompts" if self._dataset.rows_per_example == 2 else "an example"
            raise ConfigError(
                f"{what} may have {largest} tokens, more than the {max_tokens} of batch.max_tokens; set it to {needed} "
                f"or more, or lower data.max_length (for what the policy samples, rollout.max_new_tokens)"
            )
        return capacity

    def _order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            epoch = 0
        if epoch not in self._orders:
            count = len(self._dataset)
            order = np.random.default_rng([self._seed, epoch]).permutation(count) if self._shuffle else np.arange(count)
            self._orders = {epoch: order.tolist()}
        return self._orders[epoch]


def _num_tokens(example: Example) -> int:
    return sum(len(row.tokens) for row in example)
