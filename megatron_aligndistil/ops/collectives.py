"""The two collectives of the vocab-parallel operations. Neither is seen by autograd: callers state their gradients."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def _alone(group: dist.ProcessGroup | None) -> bool:
    return group is None or dist.get_world_size(group) == 1


def gather_ranks(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's `local`, stacked along a new first dimension R: [...] -> [R, ...].

    Collectives: one all-gather over `group`; none where the group is one process or `local` is empty.
    """
    if _alone(group):
        return local.detach().unsqueeze(0)
    num_ranks = dist.get_world_size(group)
    gathered = local.new_empty(num_ranks * local.numel())  # flat: gloo knows no new dimension
    if local.numel():
        dist.all_gather_into_tensor(gathered, local.detach().flatten(), group=group)
    return gathered.view(num_ranks, *local.shape)


def sum_ranks(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of every rank's `local`, in its place.

    Collectives: one all-reduce over `group`; none where the group is one process or `local` is empty.
    """
    total = local.detach()
    if total.numel() and not _alone(group):
        dist.all_reduce(total, group=group)
    return total
