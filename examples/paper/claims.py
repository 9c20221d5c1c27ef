"""What the paper's tables say, one comparison at a time, and whether our figures say so too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from methods import CONSTANTS
from summary import Figure

ERRORS = 2.0  # standard errors that a difference takes


@dataclass(frozen=True)
class Claim:
    """A comparison of the paper.

    Attributes:
        table: where the paper says it.
        sentence: what it says.
        difference: ours, positive where it agrees: mean and standard error.
    """

    table: int
    sentence: str
    difference: Figure

    @property
    def verdict(self) -> str:
        """Whether ours agrees; a difference within two standard errors tells nothing."""
        mean, error = self.difference["mean"], self.difference["stderr"] or 0.0
        if abs(mean) <= ERRORS * error:
            return "cannot be told"
        return "agrees" if mean > 0 else "does not agree"


def minus(first: Figure, second: Figure) -> Figure:
    """The difference of two independent means."""
    error = math.hypot(first["stderr"] or 0.0, second["stderr"] or 0.0)
    return {"mean": first["mean"] - second["mean"], "stderr": error, "count": min(first["count"], second["count"])}


def claims(found: Mapping[str, Any]) -> list[Claim]:
    """Every comparison that there are figures for."""
    return [*_table_1(found), *_table_2(found), *_table_3(found), *_table_4(found)]


def _mean(found: Mapping[str, Any], name: str, measure: str = "reward") -> Figure | None:
    if name in found["models"]:
        return found["models"][name][measure]
    method = found["methods"].get(name)
    return method and method["mean"][measure]


def _above(
    found: Mapping[str, Any], table: int, first: str, second: str, measure: str, sentence: str
) -> Iterator[Claim]:
    """`first` above `second` in a measure, where both are there."""
    ours, theirs = _mean(found, first, measure), _mean(found, second, measure)
    if ours and theirs:
        yield Claim(table, sentence, minus(ours, theirs))


def _table_1(found: Mapping[str, Any]) -> Iterator[Claim]:
    for name in ("dpo", "kto", "tdpo1", "tdpo2", "simpo", "ppo", "rto", "rto_terminal"):
        if name in found["methods"]:
            label = found["methods"][name]["label"]
            for ours, kind in (("off_policy", "off-policy"), ("on_policy", "on-policy")):
                yield from _above(found, 1, ours, name, "reward", f"AlignDistil {kind} has more reward than {label}")


def _table_2(found: Mapping[str, Any]) -> Iterator[Claim]:
    names = {"reward_model": "the reward model", "dpo_reward": "the DPO reward"}
    for part in ("train", "test"):
        for name, label in names.items():
            if name in found["accuracy"]:
                pair = (found["accuracy"][each][part] for each in ("contrastive_reward", name))
                yield Claim(2, f"the contrastive reward is more accurate than {label} on {part} pairs", minus(*pair))
    sentence = "distilled with the contrastive reward, the policy has more reward than with the DPO reward"
    yield from _above(found, 2, "off_policy", "vanilla", "reward", sentence)


def _table_3(found: Mapping[str, Any]) -> Iterator[Claim]:
    first, last = (f"constant_{each:g}" for each in (CONSTANTS[0], CONSTANTS[-1]))
    for measure, label in (("kl_dpo", "KL from DPO"), ("length", "length"), ("reward", "reward")):
        sentence = f"{label} rises from constant {CONSTANTS[0]:g} to {CONSTANTS[-1]:g}"
        yield from _above(found, 3, last, first, measure, sentence)
    adaptive, divergence = _mean(found, "off_policy"), _mean(found, "off_policy", "kl_dpo")
    for measure, sign, label in (("reward", 1, "has more reward"), ("length", -1, "is shorter")):
        constant = at_kl(found, divergence["mean"], measure) if adaptive and divergence else None
        ours = _mean(found, "off_policy", measure)
        if constant and ours:
            difference = minus(ours, constant)
            sentence = f"the adaptive coefficient {label} than a constant at the same KL from DPO (between two of them)"
            yield Claim(3, sentence, {**difference, "mean": sign * difference["mean"]})


def at_kl(found: Mapping[str, Any], divergence: float, measure: str) -> Figure | None:
    """A measure of constants at a KL from DPO, linear between the two constants around it; None beyond them."""
    points = []
    for constant in CONSTANTS:
        kl, value = (_mean(found, f"constant_{constant:g}", name) for name in ("kl_dpo", measure))
        if kl and value:
            points.append((kl["mean"], value))
    for (low, before), (high, after) in zip(points, points[1:], strict=False):
        if low <= divergence <= high:
            share = (divergence - low) / (high - low) if high > low else 0.0
            mean = (1 - share) * before["mean"] + share * after["mean"]
            error = math.hypot((1 - share) * (before["stderr"] or 0.0), share * (after["stderr"] or 0.0))
            return {"mean": mean, "stderr": error, "count": before["count"]}
    return None


def _table_4(found: Mapping[str, Any]) -> Iterator[Claim]:
    order = (("dpo", "initial"), ("rto", "dpo"), ("ppo", "rto"), ("off_policy", "ppo"), ("on_policy", "off_policy"))
    labels = {"initial": "the initial model", "dpo": "DPO", "rto": "RTO", "ppo": "PPO"}
    labels |= {"off_policy": "AlignDistil off-policy", "on_policy": "AlignDistil on-policy"}
    for first, second in order:
        yield from _above(found, 4, first, second, "reward", f"{labels[first]} has more reward than {labels[second]}")
