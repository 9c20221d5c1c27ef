"""RTO against a reference in plain loops, with and without the terminal reward."""

from __future__ import annotations

from functools import partial

import pytest

from tests.algorithms.actor_critic import (
    Rollout,
    assert_deal_does_not_matter,
    assert_equals_dense_step,
    score_at_end,
)
from tests.shards import SIZES
from tests.workers import Workers


def reward(rollout: Rollout, row: int, t: int, *, terminal: str) -> float:
    """β1 log π_dpo/π_ref of this very token, and on the last one what is given at the end."""
    place = rollout.case.spans[row].start + t
    token = 0.2 * float((rollout.logprobs("dpo") - rollout.logprobs("reference"))[place])
    scores = {"none": None, "model": rollout.scores_B, "function": rollout.ratings_B}[terminal]
    return token if scores is None else token + score_at_end(scores, rollout, row, t)


@pytest.mark.parametrize(("tp", "terminal"), [*((tp, "none") for tp in SIZES), (2, "model"), (2, "function")], ids=str)
def test_equals_dense(workers: Workers, tp: int, terminal: str) -> None:
    section = {"name": "rto", "beta1": 0.2, "beta2": 0.07, "terminal": terminal}
    assert_equals_dense_step(workers, tp, section, partial(reward, terminal=terminal), kl=0.07)


def test_deal_does_not_matter(workers: Workers) -> None:
    assert_deal_does_not_matter(workers, {"name": "rto", "terminal": "function"})
