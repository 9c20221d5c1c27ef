"""Drawing tokens from a split vocabulary: what is allowed, how often, and the same at any tensor parallel size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_aligndistil.ops.head import VocabShard
from megatron_aligndistil.ops.sampling import Truncation, row_keys, sample
from tests.shards import SIZES, VOCABULARIES, columns, this_shard
from tests.workers import Workers


def draw(logits_BV: Tensor, padded: int, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """One token a row, each row with a random stream of its own; call it in a worker."""
    num_rows, vocab = logits_BV.shape
    shard = this_shard(vocab, padded)
    rows_B = torch.arange(num_rows)
    truncation = Truncation(torch.full((num_rows,), top_k), torch.full((num_rows,), top_p, dtype=torch.float64))
    return sample(
        columns(logits_BV, shard),
        row_keys(torch.full_like(rows_B, 5), rows_B),
        torch.full_like(rows_B, 3),
        torch.full((num_rows,), temperature, dtype=torch.float64),
        shard,
        truncation if top_k or top_p < 1 else None,
    )


def allowed(logits_V: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The probabilities that remain, by sorting the whole vocabulary: top-k first, then top-p of what is left."""
    order = logits_V.argsort(descending=True)
    probs = (logits_V[order].double() / temperature).softmax(-1)
    if top_k:
        probs[top_k:] = 0
    probs = probs / probs.sum()
    before = probs.cumsum(-1) - probs
    probs[before >= top_p] = 0
    kept = torch.zeros_like(probs)
    kept[order] = probs / probs.sum()
    return kept


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize(("vocab", "padded"), VOCABULARIES)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (5, 0.5), (1, 1.0), (0, 1e-9), (99, 1.0)])
def test_only_what_is_allowed_is_drawn_and_as_often(
    workers: Workers, tp: int, vocab: int, padded: int, top_k: int, top_p: float
) -> None:
    num_rows, temperature = 4000, 1.3
    logits_V = 1.5 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    logits_BV = logits_V.expand(num_rows, vocab).contiguous()
    results = workers.run(tp, draw, logits_BV, padded, temperature, top_k, top_p)
    for tokens_B, _ in results[1:]:
        assert torch.equal(tokens_B, results[0][0])
    tokens_B, logprobs_B = results[0]
    probs = allowed(logits_V, temperature, top_k, top_p)
    counts = torch.bincount(tokens_B, minlength=vocab)
    assert not counts[probs == 0].any()
    expected = probs * num_rows
    # Binomial counts, within 4.5 standard deviations; a certain token has none.
    assert bool(((counts - expected).abs() <= 4.5 * (expected * (1 - probs)).sqrt() + 1e-6).all())
    torch.testing.assert_close(logprobs_B, logits_V.double().log_softmax(-1)[tokens_B], rtol=0, atol=1e-12)
    if tp > 1:
        (alone,) = workers.run(1, draw, logits_BV, padded, temperature, top_k, top_p)
        assert torch.equal(alone[0], tokens_B)


def test_rows_are_independent_and_greedy_rows_ignore_the_noise(workers: Workers) -> None:
    logits_BV = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    ((tokens_B, _),) = workers.run(1, draw, logits_BV, 16, 0.0, 4, 0.3)
    assert torch.equal(tokens_B, logits_BV.argmax(-1))


def test_logits_of_any_size_are_told_apart() -> None:
    """The selection goes by the bits of fp32: both signs, huge, tiny and equal values."""
    logits_BV = torch.tensor([[-1e30, -3.0, -0.0, 0.0, 1e-30, 2.0, 2.0, 1e30]])
    shard = VocabShard(0, 8, 8)
    keys_B, positions_B = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    one_B, drawn = torch.ones(1, dtype=torch.float64), set()
    for position in range(200):
        # Hot enough that all but the extremes are equally likely.
        flat_BV, hot_B = logits_BV.clamp(-4, 4), 1000 * one_B
        truncation = Truncation(torch.tensor([3]), one_B)
        drawn.add(int(sample(flat_BV, keys_B, positions_B + position, hot_B, shard, truncation)[0]))
    assert drawn == {5, 6, 7}  # the two equal ones stand together
    truncation = Truncation(torch.tensor([1]), one_B)
    assert int(sample(logits_BV, keys_B, positions_B, one_B, shard, truncation)[0]) == 7
