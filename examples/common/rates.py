"""The search for a learning rate: which one is best, and where to look next."""

from __future__ import annotations

from collections.abc import Mapping


def best_rate(scores: Mapping[float, float]) -> float:
    """The learning rate with the highest score, the lower one of equals."""
    return max(sorted(scores), key=lambda rate: scores[rate])


def rate_to_try(scores: Mapping[float, float], factor: float) -> float | None:
    """The learning rate beyond the edge of the grid where the best one lies, None where it lies inside."""
    best = best_rate(scores)
    if best == min(scores):
        return float(f"{best / factor:.6g}")  # written as people would write it
    return float(f"{best * factor:.6g}") if best == max(scores) else None
