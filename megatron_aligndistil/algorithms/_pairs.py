"""What the losses on preference pairs share. Suffix P: one number a pair."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_aligndistil.algorithms.base import LossOutput
from megatron_aligndistil.data.batch import Responses


def pair_loss(responses: Responses, loss_P: Tensor, metrics_P: Mapping[str, Tensor]) -> LossOutput:
    """A loss and metrics of each pair, counted in pairs; a pair with an empty response counts for nothing."""
    first_P, second_P = responses.lengths_B.chunk(2)
    full_P = (first_P > 0) & (second_P > 0)
    count = full_P.sum()
    metrics = {name: ((value_P.detach() * full_P).sum(), count) for name, value_P in metrics_P.items()}
    return LossOutput((loss_P * full_P).sum(), count, metrics)


def margin_metrics(chosen_P: Tensor, rejected_P: Tensor) -> dict[str, Tensor]:
    """`reward_chosen`, `reward_rejected`, their difference `margin`, and `accuracy`, the share of it above 0."""
    margin_P = chosen_P - rejected_P
    return {
        "accuracy": (margin_P > 0).to(margin_P.dtype),
        "margin": margin_P,
        "reward_chosen": chosen_P,
        "reward_rejected": rejected_P,
    }
