"""Packed micro-batches: every row once, in its budget, pairs together, evenly shared, and the same whoever asks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aligndistil.data.batch import MicroBatch
from megatron_aligndistil.data.collate import collate, pack
from megatron_aligndistil.data.dataset import TokenDataset
from megatron_aligndistil.data.loader import GlobalBatches
from megatron_aligndistil.data.packing import share_out
from megatron_aligndistil.data.tokens import Row, make_row
from megatron_aligndistil.errors import ConfigError
from tests.data.test_loader import FILLER, PAD, make_dataset


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(0, 60), max_size=60),
    spare=st.integers(0, 100),
    dp_size=st.integers(1, 5),
    multiple=st.integers(1, 3),
)
def test_examples_are_shared_out_evenly_within_the_budget(lengths, spare, dp_size, multiple):
    longest = max(lengths, default=0)
    budget = longest + spare + 1
    shares = share_out(lengths, max_tokens=budget, dp_size=dp_size, multiple=multiple)
    assert len(shares) == dp_size and len({len(rank) for rank in shares}) == 1
    (count,) = {len(rank) for rank in shares}
    assert count > 0 and count % multiple == 0
    assert sorted(index for rank in shares for share in rank for index in share) == list(range(len(lengths)))
    sums = [[sum(lengths[index] for index in share) for share in rank] for rank in shares]
    flat, ranks = [tokens for rank in sums for tokens in rank], [sum(rank) for rank in sums]
    assert max(flat) <= budget
    assert max(flat) - min(flat) <= longest and max(ranks) - min(ranks) <= longest
    # One multiple fewer would not do, but for what the next example may leave open in each.
    fewer = (count - multiple) * dp_size
    assert fewer == 0 or sum(lengths) > fewer * (budget - longest)
    assert shares == share_out(lengths, max_tokens=budget, dp_size=dp_size, multiple=multiple)


def test_a_packed_micro_batch_worked_by_hand():
    first, second = (make_row([7, 8], [9, 2]), make_row([7, 8], [3])), (make_row([], [5, 6, 2]), make_row([], [4, 2]))
    batch = pack([first, second], length=14, pad_id=PAD)
    assert batch.tokens_BS.tolist() == [[7, 8, 9, 2, 5, 6, 2, 7, 8, 3, 4, 2, 0, 0]]
    assert batch.packing is not None
    assert batch.packing.cu_seqlens.tolist() == [0, 4, 7, 10, 12, 14] and batch.packing.longest == 4
    assert batch.packing.cu_seqlens.dtype == torch.int32
    assert batch.columns_BS.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 1, 0, 1]]
    assert batch.positions_T.tolist() == [1, 2, 4, 5, 8, 10]
    assert batch.responses.targets_T.tolist() == [9, 2, 6, 2, 3, 2]
    assert batch.responses.rows_T.tolist() == [0, 0, 1, 1, 2, 3]
    assert batch.responses.lengths_B.tolist() == [2, 2, 1, 1]
    assert batch.ends_B.tolist() == [3, 6, 9, 11]
    moved = batch.to(torch.device("cpu"))
    assert moved.packing is not None and torch.equal(moved.packing.cu_seqlens, batch.packing.cu_seqlens)


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=8),
    shifted_mask=st.booleans(),
    spare=st.integers(1, 5),
)
def test_losses_see_the_same_of_both_layouts(sizes, shifted_mask, spare):
    draw = np.random.default_rng(0)
    examples = []
    for prompt, response in sizes:
        row = make_row(draw.integers(1, 99, prompt), draw.integers(1, 99, response))
        logprobs = draw.normal(size=response).astype(np.float32)
        examples.append((Row(row.tokens, prompt, rating=float(prompt), logprobs=logprobs),))
    lengths = [len(row.tokens) for (row,) in examples]
    padded = collate(examples, length=max(lengths) + spare, pad_id=PAD, shifted_mask=shifted_mask)
    packed = pack(examples, length=sum(lengths) + spare, pad_id=PAD, shifted_mask=shifted_mask)
    for name in ("targets_T", "rows_T", "lengths_B", "ratings_B", "sampled_T"):
        assert torch.equal(getattr(packed.responses, name), getattr(padded.responses, name)), name
    pairs = [(packed.positions_T, padded.positions_T)]
    if not shifted_mask:  # the state after the last token has no score
        full_B = packed.responses.lengths_B > 0
        pairs.append((packed.ends_B[full_B], padded.ends_B[full_B]))
    for mine, theirs in pairs:
        assert torch.equal(packed.tokens_BS.flatten()[mine], padded.tokens_BS.flatten()[theirs])
        assert torch.equal(packed.columns_BS.flatten()[mine], padded.columns_BS.flatten()[theirs])
    # Every position lies within its own row, whatever stands behind it.
    starts_B = torch.tensor([0, *np.cumsum(lengths)[:-1]])
    rows_T = packed.responses.rows_T
    assert (packed.positions_T >= starts_B[rows_T]).all()
    assert (packed.positions_T < (starts_B + torch.tensor(lengths))[rows_T]).all()


def test_a_micro_batch_of_fillers_is_all_padding():
    batch = pack([FILLER, FILLER], length=4, pad_id=PAD)
    assert batch.tokens_BS.tolist() == [[PAD] * 4] and batch.positions_T.numel() == 0
    assert batch.packing is not None and batch.packing.cu_seqlens.tolist() == [0, 4]
    assert batch.ends_B.tolist() == [0, 0] and batch.responses.lengths_B.tolist() == [0, 0]


def read(batch: MicroBatch) -> list[list[int]]:
    """The tokens of each sequence but that of padding."""
    assert batch.packing is not None
    rows = torch.tensor_split(batch.tokens_BS[0], batch.packing.cu_seqlens[1:-1].long())
    return [row.tolist() for row in rows if (row != PAD).any()]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_global_batch_is_packed_whole(pairs, drop_last):
    """Any number of ranks may share it, also one that does not divide it; pairs keep to one micro-batch."""
    dataset = make_dataset(19, pairs)
    for step in range(6):
        for dp_size, multiple in ((1, 1), (2, 2), (3, 1)):
            loaders = [
                GlobalBatches(
                    dataset, global_size=8, max_tokens=34, micro_multiple=multiple, pad_id=PAD, dp_rank=dp_rank,
                    dp_size=dp_size, seed=3, drop_last=drop_last, pad_multiple=4,
                )
                for dp_rank in range(dp_size)
            ]  # fmt: skip
            ranks = [loader.at(step) for loader in loaders]
            (count,) = {len(rank) for rank in ranks}
            assert count % multiple == 0
            (shape,) = {tuple(batch.tokens_BS.shape) for rank in ranks for batch in rank}
            assert shape[0] == 1 and shape[1] % 4 == 0 and shape[1] <= 32
            found = []
            for batch in (batch for rank in ranks for batch in rank):
                rows = read(batch)
                half = len(rows) // 2
                found += zip(rows[:half], rows[half:], strict=True) if pairs else ((row,) for row in rows)
            examples = [tuple(row.tokens.tolist() for row in example) for example in loaders[0].examples(step)]
            assert sorted(found) == sorted(examples)
            again = loaders[-1].at(step)
            assert all(torch.equal(one.tokens_BS, two.tokens_BS) for one, two in zip(again, ranks[-1], strict=True))


@pytest.mark.parametrize("max_length", [None, 20])
def test_mismatched_rows_keep_to_the_micro_batches_of_their_prompts(max_length):
    dataset = TokenDataset(
        (make_row([100 + index // 2] * (1 + index // 2 % 3), [1000 + index] * (1 + 5 * index % 7)),)
        for index in range(14)
    )
    for step in range(3):
        for dp_size in (1, 2):
            lengths = set()
            for dp_rank in range(dp_size):
                batches = GlobalBatches(
                    dataset, global_size=8, max_tokens=24, pad_id=PAD, dp_rank=dp_rank, dp_size=dp_size, seed=3,
                    drop_last=False, pad_multiple=4, max_length=max_length, with_mismatched=True,
                )  # fmt: skip
                own, others = batches.at(step), batches.mismatched(step)
                for one, other in zip(own, others, strict=True):
                    lengths.add(other.tokens_BS.shape[1])
                    assert other.tokens_BS.shape[1] <= 24 and one.tokens_BS.shape[1] <= 24
                    assert torch.equal(one.responses.lengths_B > 0, other.responses.lengths_B > 0)
                    for mine, theirs in zip(read(one), read(other), strict=True):
                        prompt = [token for token in mine if token < 1000]
                        assert theirs[: len(prompt)] == prompt and theirs[-1] >= 1000 and theirs[-1] != mine[-1]
            assert len(lengths) == 1


def test_an_example_above_the_budget():
    def make(pairs: bool = False, **changes) -> GlobalBatches:
        return GlobalBatches(make_dataset(9, pairs), global_size=4, pad_id=PAD, **changes)

    longest = max(len(row.tokens) for (row,) in make_dataset(9))
    make(max_tokens=longest)
    with pytest.raises(ConfigError, match=rf"an example may have {longest} .* batch.max_tokens; set it to {longest} "):
        make(max_tokens=longest - 1)
    with pytest.raises(ConfigError, match="set it to 12 or more"):
        make(max_tokens=11, pad_multiple=4)
    with pytest.raises(ConfigError, match="pair of responses"):
        make(pairs=True, max_tokens=longest)
    with pytest.raises(ConfigError, match=r"may have 30 tokens.*max_length.*max_new_tokens"):
        make(max_tokens=20, max_length=30)
