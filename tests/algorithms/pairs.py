"""Preference pairs for dense references: whole distributions in fp64, pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tests.algorithms.cases import Case

# Three pairs: rows 0 and 3, 1 and 4, 2 and 5; the last has an empty rejected response.
LENGTHS = [3, 1, 2, 4, 2, 0]
FULL_PAIRS = 2
CUTS = [[[0, 3], [1, 4], [2, 5]], [[0, 2, 3, 5], [1, 4]], [[2, 5], [1, 0, 4, 3]]]


@dataclass(frozen=True)
class Side:
    """One response y, [|y|] each: log π_θ and log π_ref of its tokens, and KL(π_ref || π_θ) at their positions."""

    policy: Tensor
    reference: Tensor
    kl: Tensor

    @property
    def log_ratio(self) -> Tensor:
        return (self.policy - self.reference).sum()


Pair = tuple[Side, Side]


def full_pairs(case: Case, reverse: bool = False) -> list[Pair]:
    """(winner, loser) of every pair that has both; with `reverse` the rejected response wins."""
    policy_TV, reference_TV = (case.logits(name).log_softmax(1) for name in ("policy", "reference"))
    kl_T = (reference_TV.exp() * (reference_TV - policy_TV)).sum(1)
    target_T1 = case.targets_T[:, None]
    sides = [
        Side(
            policy_TV[span].gather(1, target_T1[span])[:, 0],
            reference_TV[span].gather(1, target_T1[span])[:, 0],
            kl_T[span],
        )
        for span in case.spans
    ]
    half = len(sides) // 2
    pairs = [pair for pair in zip(sides[:half], sides[half:], strict=True) if all(len(side.kl) for side in pair)]
    return [(rejected, chosen) if reverse else (chosen, rejected) for chosen, rejected in pairs]


def metrics_of(pairs: Sequence[Pair], reward: Callable[[Side], Tensor]) -> dict[str, tuple[float, int]]:
    """Sums over pairs of what every preference loss reports, with their count."""
    found = dict.fromkeys(
        ["accuracy", "margin", "reward_chosen", "reward_rejected", "logps_chosen", "logps_rejected"], 0.0
    )
    for winner, loser in pairs:
        chosen, rejected = float(reward(winner).detach()), float(reward(loser).detach())
        found["accuracy"] += float(chosen > rejected)
        found["margin"] += chosen - rejected
        found["reward_chosen"] += chosen
        found["reward_rejected"] += rejected
        found["logps_chosen"] += float(winner.policy.detach().sum())
        found["logps_rejected"] += float(loser.policy.detach().sum())
    return {name: (total, len(pairs)) for name, total in found.items()}
