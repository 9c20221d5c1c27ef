"""PPO against a reference in plain loops: rewards, advantages, both losses and their gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron_aligndistil.errors import ConfigError
from tests.algorithms.actor_critic import (
    Reward,
    Rollout,
    assert_deal_does_not_matter,
    assert_equals_dense_step,
    make_rollout,
    run_step,
    score_at_end,
)
from tests.shards import SIZES
from tests.workers import Workers


def from_dpo(rollout: Rollout, row: int, t: int, *, against: str) -> float:
    """0.3 (log π_dpo - log π_against) of the whole response, earned with its last token."""
    if t < rollout.case.lengths[row] - 1:
        return 0.0
    difference_T = rollout.logprobs("dpo") - rollout.logprobs(against)
    return 0.3 * float(difference_T[rollout.case.spans[row]].sum())


REWARDS: dict[str, Reward] = {
    "model": lambda rollout, row, t: score_at_end(rollout.scores_B, rollout, row, t),
    "function": lambda rollout, row, t: score_at_end(rollout.ratings_B, rollout, row, t),
    "dpo": partial(from_dpo, against="reference"),
    "contrastive": partial(from_dpo, against="reverse"),
}


@pytest.mark.parametrize("source", REWARDS)
def test_equals_dense(workers: Workers, source: str) -> None:
    section = {"name": "ppo", "reward": source, "beta0": 0.3, "kl": 0.05}
    assert_equals_dense_step(workers, 2, section, REWARDS[source], kl=0.05)


@pytest.mark.parametrize("tp", SIZES)
def test_settings(workers: Workers, tp: int) -> None:
    changed = {"clip": 0.1, "gamma": 0.9}
    section = {"name": "ppo", "reward": "function", "kl": 0.0, "gae_lambda": 0.5, **changed}
    assert_equals_dense_step(workers, tp, section, REWARDS["function"], kl=0.0, lam=0.5, **changed)


def test_the_case_has_tokens_on_both_sides_of_the_clip(workers: Workers) -> None:
    section = {"name": "ppo", "reward": "function"}
    rollout = make_rollout()
    (policy,) = workers.run(1, run_step, section, "policy", [[rollout]], "tp")
    assert 0 < policy.metrics["clip_share"][0] < policy.count


def test_deal_does_not_matter(workers: Workers) -> None:
    assert_deal_does_not_matter(workers, {"name": "ppo", "reward": "model", "kl": 0.05})


def test_what_was_not_sampled_is_told_on_every_rank(workers: Workers) -> None:
    rollout = make_rollout()
    given = replace(rollout, sampled_T=torch.full_like(rollout.sampled_T, torch.nan))
    with pytest.raises(ConfigError, match="set rollout.on_policy_fraction to 1"):
        workers.run(2, run_step, {"name": "ppo"}, "policy", [[given], [rollout]], "dp")
