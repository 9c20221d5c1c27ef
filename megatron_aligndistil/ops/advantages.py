"""Generalised advantage estimation over flattened rows, and moments over a batch that is spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def gae(rewards_T: Tensor, values_T: Tensor, lengths_B: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each position (Schulman et al., 2016, eq. 16): [T] both.

        δ_t = r_t + γ V_{t+1} - V_t,      A_t = δ_t + γ λ A_{t+1},      R_t = A_t + V_t

    V_t is the value of the state that predicts token t, r_t is earned on leaving that state, and behind the last
    token of a row V and A are 0, whether the response ended by itself or was cut at the limit.

    Args:
        rewards_T, values_T: by row, then by time; computed with in fp32 at least.
        lengths_B: int64, positions of each row, T in all; rows may be empty.
        gamma, lam: γ and λ.

    No gradient, no collectives.
    """
    dtype = torch.promote_types(torch.promote_types(rewards_T.dtype, values_T.dtype), torch.float32)
    rows_T = torch.arange(lengths_B.numel(), device=lengths_B.device).repeat_interleave(lengths_B)
    starts_B = lengths_B.cumsum(0) - lengths_B
    columns_T = torch.arange(rows_T.numel(), device=lengths_B.device) - starts_B[rows_T]
    longest = int(lengths_B.max()) if lengths_B.numel() else 0
    # Zeros stand behind the end of each row, as the definition wants them.
    delta_BS = torch.zeros(lengths_B.numel(), longest, dtype=dtype, device=rewards_T.device)
    values_BS = delta_BS.new_zeros(lengths_B.numel(), longest + 1)
    values_BS[rows_T, columns_T] = values_T.to(dtype)
    delta_BS[rows_T, columns_T] = rewards_T.to(dtype) + gamma * values_BS[rows_T, columns_T + 1] - values_T
    for column in reversed(range(longest - 1)):
        delta_BS[:, column] += gamma * lam * delta_BS[:, column + 1]
    advantages_T = delta_BS[rows_T, columns_T]
    return advantages_T, advantages_T + values_T


@torch.no_grad()
def moments(parts: Sequence[Tensor], total: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Means and (population) variances of K numbers a position over all positions of all ranks: [K] both, in fp64.

    Args:
        parts: this rank's share, [K, T] each; at least one, and T may be 0.
        total: sums a tensor over the ranks.

    The variance is summed from differences to the mean, so that it is exact where the mean is large. Collectives: two
    calls of `total` on K + 1 and K numbers.
    """
    values_KT = torch.cat(list(parts), dim=1).double()
    count = values_KT.new_tensor([values_KT.size(1)])
    summed = total(torch.cat([values_KT.sum(1), count]))
    num_positions = summed[-1].clamp(min=1)
    mean_K = summed[:-1] / num_positions
    variance_K = total(((values_KT - mean_K[:, None]) ** 2).sum(1)) / num_positions
    return mean_K, variance_K
