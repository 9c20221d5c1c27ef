"""Training curves: read from metrics, smoothed, summed up over seeds, and asked when they reach a level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from records import read_jsonl

WINDOW = 5  # steps of the running mean
MEASURES = ("reward", "objective", "kl")


@dataclass(frozen=True)
class Curve:
    """One run, step by step: each value belongs to the policy after so many updates as its place in the list, from 0.

    Attributes:
        reward: token-averaged contrastive reward of the sampled responses, (1/|y|) β0 Σ_t log π_dpo/π_rev(y_t).
        objective: what the losses are derived from (eq. 13), β0 log π_dpo/π_rev(y) - β log π_θ/π_dpo(y), a response.
        kl: KL of the policy from the DPO model, in nats a response.
        length: tokens a response.
        seconds: how long the step took.
    """

    reward: list[float]
    objective: list[float]
    kl: list[float]
    length: list[float]
    seconds: list[float]


def read_curve(path: Path, beta: float) -> Curve:
    """The curve that the metrics.jsonl of an on-policy run holds; `beta` weighs the KL in the objective."""
    names = {name: f"train/policy/{name}" for name in ("reward_token", "reward_sampled", "kl_dpo_sequence", "length")}
    records = read_jsonl(path, ("seconds/total", *names.values()))
    value = {name: [float(record[key]) for record in records] for name, key in names.items()}
    rewards, kl = value["reward_sampled"], value["kl_dpo_sequence"]
    return Curve(
        reward=value["reward_token"],
        objective=[reward - beta * divergence for reward, divergence in zip(rewards, kl, strict=True)],
        kl=kl,
        length=value["length"],
        seconds=[float(record["seconds/total"]) for record in records],
    )


def mean(values: Sequence[float]) -> float:
    """The mean of all steps."""
    return sum(values) / len(values)


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean over `WINDOW` steps; near both ends over fewer, as many before as after, so that slopes stay."""
    halves = [min(n, len(values) - 1 - n, WINDOW // 2) for n in range(len(values))]
    return [mean(values[n - half : n + half + 1]) for n, half in enumerate(halves)]


def last_quarter(values: Sequence[float]) -> float:
    """Mean over the last quarter of the steps, one at least."""
    return mean(values[-max(1, len(values) // 4) :])


def steps_to(values: Sequence[float], level: float) -> float | None:
    """Updates until the curve first reaches the level, linear between two steps; None where it never does."""
    for n, value in enumerate(values):
        if value >= level:
            before = values[n - 1] if n else value
            return n - (value - level) / (value - before) if n else 0.0
    return None


def levels(start: float, finals: Sequence[float], shares: Sequence[float]) -> dict[str, float]:
    """Levels that every method reaches, by name ("90%"): shares of the way from the start to the lowest final value.

    Empty where the lowest one gained nothing: there is no level to ask for then.
    """
    gain = min(finals) - start
    return {f"{share:.0%}": start + share * gain for share in shares} if gain > 0 else {}


def band(curves: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Mean, lowest and highest of several curves at each step."""
    steps = list(zip(*curves, strict=True))
    return {
        "mean": [mean(values) for values in steps],
        "low": [min(values) for values in steps],
        "high": [max(values) for values in steps],
    }
