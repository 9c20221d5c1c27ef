"""Micro-batches by hand, and global batches that do not depend on how they are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_aligndistil.data.batch import MicroBatch
from megatron_aligndistil.data.collate import collate
from megatron_aligndistil.data.dataset import TokenDataset
from megatron_aligndistil.data.loader import GlobalBatches
from megatron_aligndistil.data.tokens import Row, make_row
from megatron_aligndistil.errors import ConfigError

PAD = 0
FILLER = (make_row([], []),)


def make_dataset(count: int, pairs: bool = False) -> TokenDataset:
    """Rows of different lengths whose tokens tell the example and the row."""

    def row(index: int, place: int):
        return make_row([100 + index] * (1 + index % 3), [1000 + 10 * index + place] * (1 + (5 * index + place) % 7))

    return TokenDataset(tuple(row(index, place) for place in range(1 + pairs)) for index in range(count))


def read_rows(batch: MicroBatch) -> list[tuple[list[int], list[int]]]:
    """(tokens without padding, predicted tokens) of each row, from what a model and a loss see."""
    rows = []
    flat = batch.tokens_BS.flatten()
    for index, tokens_S in enumerate(batch.tokens_BS):
        mine = batch.responses.rows_T == index
        targets_T = batch.responses.targets_T[mine]
        assert torch.equal(flat[batch.positions_T[mine] + 1], targets_T)
        rows.append((tokens_S[tokens_S != PAD].tolist(), targets_T.tolist()))
    return rows


def test_a_micro_batch_worked_by_hand():
    batch = collate([(make_row([7, 8], [9, 2]),), (make_row([], [5, 6, 2]),), FILLER], length=5, pad_id=PAD)
    assert batch.tokens_BS.tolist() == [[7, 8, 9, 2, 0], [5, 6, 2, 0, 0], [0, 0, 0, 0, 0]]
    assert batch.positions_T.tolist() == [1, 2, 5, 6]
    assert batch.responses.targets_T.tolist() == [9, 2, 6, 2]
    assert batch.responses.rows_T.tolist() == [0, 0, 1, 1]
    assert batch.responses.lengths_B.tolist() == [2, 2, 0]
    assert batch.ends_B.tolist() == [3, 7, 10]
    responses = batch.responses
    for tensor in (batch.tokens_BS, batch.positions_T, responses.targets_T, responses.rows_T, responses.lengths_B):
        assert tensor.dtype == torch.int64 and tensor.is_contiguous()
    assert responses.ratings_B.isnan().all() and responses.sampled_T.isnan().all()


def test_a_row_brings_its_rating_and_the_log_probabilities_it_was_sampled_with():
    sampled = Row(np.array([7, 8, 9, 2], np.int32), 2, rating=1.5, logprobs=np.array([-0.5, -0.25], np.float32))
    bare = Row(np.array([5, 6, 2], np.int32), 0, rating=0.0, logprobs=np.array([-4, -2, -1], np.float32))
    responses = collate([(sampled,), (bare,)], length=4, pad_id=PAD).responses
    assert responses.ratings_B.tolist() == [1.5, 0.0]
    assert responses.sampled_T.tolist() == [-0.5, -0.25, -2, -1]  # no state predicts the first of a bare text


def test_the_shifted_mask_is_one_position_late():
    examples = [(make_row([7, 8], [9, 2]),), (make_row([7], [9, 5, 2]),), (make_row([], [5, 2]),), FILLER]
    right = collate(examples, length=4, pad_id=PAD)
    late = collate(examples, length=4, pad_id=PAD, shifted_mask=True)
    assert right.positions_T.tolist() == [1, 2, 4, 5, 6, 8]
    assert late.positions_T.tolist() == [2, 3, 5, 6, 7, 9]
    assert late.responses.targets_T.tolist() == [2, PAD, 5, 2, PAD, PAD]
    assert torch.equal(late.responses.lengths_B, right.responses.lengths_B)
    assert torch.equal(late.responses.rows_T, right.responses.rows_T)
    assert torch.equal(late.tokens_BS, right.tokens_BS)


def test_pairs_come_as_chosen_then_rejected():
    first, second = (make_row([1], [2]), make_row([1], [3])), (make_row([4], [5]), make_row([4], [6]))
    batch = collate([first, second], length=2, pad_id=PAD)
    assert batch.tokens_BS.tolist() == [[1, 2], [4, 5], [1, 3], [4, 6]]


def test_a_micro_batch_of_fillers_has_no_positions():
    batch = collate([FILLER, FILLER], length=4, pad_id=PAD)
    assert batch.tokens_BS.shape == (2, 4) and batch.positions_T.numel() == 0
    assert batch.responses.sum_rows(torch.zeros(0)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_global_batch_is_the_same_however_it_is_cut(pairs, drop_last):
    dataset = make_dataset(19, pairs)

    def read(dp_size, micro_size, step):
        rows, shapes = [], set()
        for dp_rank in range(dp_size):
            batches = GlobalBatches(
                dataset, global_size=8, micro_size=micro_size, pad_id=PAD, dp_rank=dp_rank, dp_size=dp_size, seed=3,
                drop_last=drop_last, pad_multiple=4,
            )  # fmt: skip
            micro_batches = batches.at(step)
            assert len(micro_batches) == 8 // (dp_size * micro_size)
            for batch in micro_batches:
                shapes.add(tuple(batch.tokens_BS.shape))
                mine = read_rows(batch)
                rows += list(zip(mine[:micro_size], mine[micro_size:], strict=True)) if pairs else mine
        assert len(shapes) == 1
        return rows, shapes.pop()[1]

    longest = 0
    for step in range(6):
        expected, length = read(1, 8, step)
        longest = max(len(row[0]) for example in expected for row in (example if pairs else [example]))
        assert length == -(-longest // 4) * 4
        for dp_size, micro_size in ((1, 1), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)):
            assert read(dp_size, micro_size, step) == (expected, length)


def test_epochs_and_resuming():
    dataset = make_dataset(10)
    batches = GlobalBatches(dataset, global_size=4, micro_size=2, pad_id=PAD, seed=1, drop_last=False)
    assert batches.steps_per_epoch == len(batches) == 3
    epochs = [[index for step in range(3) for index in batches.indices(3 * epoch + step)] for epoch in range(3)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(10))
    again = GlobalBatches(dataset, global_size=4, micro_size=2, pad_id=PAD, seed=1, drop_last=False)
    for step in (7, 2, 5):
        for old, new in zip(batches.at(step), again.at(step), strict=True):
            assert torch.equal(old.tokens_BS, new.tokens_BS) and torch.equal(old.positions_T, new.positions_T)
    other_seed = GlobalBatches(dataset, global_size=4, micro_size=2, pad_id=PAD, seed=2, drop_last=False)
    assert other_seed.indices(0) != batches.indices(0)


def test_without_shuffling_every_epoch_is_in_order_and_fillers_come_last():
    dataset = make_dataset(5)
    batches = GlobalBatches(dataset, global_size=4, micro_size=2, pad_id=PAD, shuffle=False, drop_last=False)
    assert [batches.indices(step) for step in range(4)] == [[0, 1, 2, 3], [4], [0, 1, 2, 3], [4]]
    lengths = [batch.responses.lengths_B.tolist() for batch in batches.at(1)]
    assert lengths == [[dataset[4][0].num_targets, 0], [0, 0]]
    assert [len(micro_batches) for micro_batches in batches] == [2, 2]


def test_dropping_the_last():
    batches = GlobalBatches(make_dataset(11), global_size=4, micro_size=4, pad_id=PAD)
    assert batches.steps_per_epoch == 2
    assert len({index for step in range(2) for index in batches.indices(step)}) == 8


def test_sizes_that_do_not_fit():
    with pytest.raises(
        ConfigError, match=r"global_size 6 is not a multiple of batch.micro_size 2 x 2 data .*= 4.* to 8"
    ):
        GlobalBatches(make_dataset(9), global_size=6, micro_size=2, pad_id=PAD, dp_size=2)
    with pytest.raises(ConfigError, match=r"has 3 examples, fewer than batch.global_size 4.*lower batch.global_size"):
        GlobalBatches(make_dataset(3), global_size=4, micro_size=1, pad_id=PAD)
    small = GlobalBatches(make_dataset(3), global_size=4, micro_size=1, pad_id=PAD, drop_last=False)
    assert small.steps_per_epoch == 1 and len(small.at(0)) == 4
