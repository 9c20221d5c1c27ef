"""Which response each prompt gets where it is to be another's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_aligndistil.data.dataset import TokenDataset
from megatron_aligndistil.data.loader import GlobalBatches
from megatron_aligndistil.data.mismatched import mismatch
from megatron_aligndistil.data.tokens import make_row
from tests.data.test_loader import PAD, read_rows


def shown(rows):
    return [(row.tokens[: row.prompt_length].tolist(), row.tokens[row.prompt_length :].tolist()) for row in rows]


def test_responses_move_by_one_around_the_rows_that_have_one():
    rows = [make_row([1], [10, 2]), make_row([], []), make_row([3, 4], [11]), make_row([5], [12, 13, 2])]
    assert shown(mismatch(rows, 9)) == [([1], [11]), ([], []), ([3, 4], [12, 13, 2]), ([5], [10, 2])]
    # The prompts stay whole and a response loses its end.
    assert shown(mismatch(rows, 4)) == [([1], [11]), ([], []), ([3, 4], [12, 13]), ([5], [10, 2])]
    assert all(row.rating is None for row in mismatch([replace(row, rating=1.0) for row in rows], 9))


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([1, 1, 2, 2, 3, 3], [12, 13, 14, 15, 10, 11]),  # pairs in their order
        ([1, 1, 1, 2, 3, 4], [13, 14, 15, 10, 11, 12]),
        ([1, 2, 1], [11, 12, None]),  # any rotation gives one row a response to its own prompt
        ([1, 1, 1, 2], [None, None, 13, 10]),
        ([1, 1], [None, None]),
        ([1], [None]),
    ],
)
def test_no_prompt_gets_a_response_of_its_own(prompts, expected):
    rows = [make_row([prompt], [10 + place]) for place, prompt in enumerate(prompts)]
    found = shown(mismatch(rows, 2))
    assert found == [
        ([], []) if answer is None else ([prompt], [answer]) for prompt, answer in zip(prompts, expected, strict=True)
    ]


def test_the_cut_does_not_matter():
    """Fillers come last, rows meet those of other ranks, and S is the mismatched rows' own."""
    dataset = TokenDataset(
        (make_row([100 + index // 2] * (1 + index // 2 % 3), [1000 + index] * (1 + 5 * index % 7)),)
        for index in range(14)
    )

    def read(dp_size, micro_size, step, **settings):
        rows, lengths = [], set()
        for dp_rank in range(dp_size):
            batches = GlobalBatches(
                dataset, global_size=8, micro_size=micro_size, pad_id=PAD, dp_rank=dp_rank, dp_size=dp_size, seed=3,
                drop_last=False, pad_multiple=4, **settings,
            )  # fmt: skip
            own, others = batches.at(step), batches.mismatched(step)
            assert len(own) == len(others)
            lengths |= {batch.tokens_BS.shape[1] for batch in others}
            for one, other in zip(own, others, strict=True):
                assert other.responses.ratings_B.isnan().all()
                for (mine, mine_T), (theirs, theirs_T) in zip(read_rows(one), read_rows(other), strict=True):
                    prompt = mine[: len(mine) - len(mine_T)]
                    assert theirs[: len(prompt)] == prompt and (mine_T == [] or theirs_T != mine_T)
                    rows.append(theirs)
        (length,) = lengths
        return rows, length

    for step in (0, 1, 3):
        expected, length = read(1, 8, step)
        for dp_size, micro_size in ((1, 1), (2, 2), (4, 2)):
            assert read(dp_size, micro_size, step) == (expected, length)
        # Without a limit of its own, no row is longer than those of the data.
        assert max(map(len, expected)) <= max(len(row.tokens) for (row,) in dataset)
        longer, _ = read(2, 2, step, max_length=99)
        assert [row[: len(cut)] for row, cut in zip(longer, expected, strict=True)] == expected
        responses = sorted(token for row in longer for token in row if token >= 1000)
        examples = GlobalBatches(dataset, global_size=8, micro_size=8, pad_id=PAD, seed=3, drop_last=False).examples(
            step
        )
        assert responses == sorted(token for (row,) in examples for token in row.tokens.tolist() if token >= 1000)
