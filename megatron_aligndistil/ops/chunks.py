"""Output-layer products by chunks of positions: nothing of size [T, V] is alive as a whole. Suffix C: a chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.ops.collectives import sum_ranks
from megatron_aligndistil.ops.head import LMHead, VocabShard

# Logits of one model in one chunk. A CPU's caches like few, if that leaves rows enough to be worth reading the output
# layer for; a GPU's matrix products want many rows to be efficient, and whole tiles of them.
_CPU_CACHED, _CPU_ELEMENTS, _CPU_ROWS = 600_000, 2**21, (32, 64)
_GPU_ELEMENTS, _GPU_TILE = 2**27, 256


def chunks(head: LMHead, rows: int | None = None) -> Iterator[slice]:
    """Slices that cover the positions of `head`: `rows` at a time, or as many as its device works well with.

    The same on every rank of the tensor parallel group, whose collectives must agree.
    """
    if rows is None and head.hidden_TH.is_cpu:
        most = _cpu_rows(head.shard)
        count = max(1, -(-len(head.hidden_TH) // most))
        rows = max(1, -(-len(head.hidden_TH) // count))  # chunks of one size
    elif rows is None:
        rows = max(1, _GPU_ELEMENTS // head.shard.vocab_size // _GPU_TILE) * _GPU_TILE
    for start in range(0, len(head.hidden_TH), rows):
        yield slice(start, min(start + rows, len(head.hidden_TH)))


def _cpu_rows(shard: VocabShard) -> int:
    ranks = 1 if shard.tp_group is None else dist.get_world_size(shard.tp_group)
    columns = -(-shard.vocab_size // ranks)  # of the largest shard
    fewest, enough = _CPU_ROWS
    return max(_CPU_CACHED // columns, fewest, min(enough, _CPU_ELEMENTS // shard.vocab_size))


def logits_of(head: LMHead, rows: slice, temperature: float = 1.0) -> Tensor:
    """This rank's logits at some positions over a temperature, [C, v], a new tensor in the dtype of loss arithmetic.

    Never rounded to the weights' dtype: a logit of 20 in bf16 is off by up to 0.06, and the teacher multiplies the
    difference of two of them by α. No gradient.
    """
    logits_Cv = _product(head.hidden_TH[rows].detach(), head.weight_vH.detach().T)
    return logits_Cv if temperature == 1 else logits_Cv.div_(temperature)


def gradients(head: LMHead, rows: int | None, of_logits: Callable[[slice], Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of hidden states, [T, H], and output layer, [v, H], for autograd, from those of a chunk's logits.

    `of_logits` gives the latter, [C, v], for each of ``chunks(head, rows)``. Collectives over ``head.shard.tp_group``:
    one all-reduce of [T, H].
    """
    hidden_TH, weight_vH = head.hidden_TH.detach(), head.weight_vH.detach()
    dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
    hidden_grad_TH = torch.empty_like(hidden_TH, dtype=dtype)
    weight_grad_vH = torch.zeros_like(weight_vH, dtype=dtype)
    for each in chunks(head, rows):
        grad_Cv = of_logits(each)
        hidden_grad_TH[each] = hidden_gradient(grad_Cv, weight_vH)
        add_weight_gradient(weight_grad_vH, grad_Cv, hidden_TH[each])
    hidden_grad_TH = sum_ranks(hidden_grad_TH, head.shard.tp_group)
    return hidden_grad_TH.to(hidden_TH.dtype), hand_on(weight_grad_vH, weight_vH, head.main_grad_vH)


def hidden_gradient(grad_Cv: Tensor, weight_vH: Tensor) -> Tensor:
    """This rank's part of the gradient of hidden states, [C, H], in the dtype of loss arithmetic."""
    return _product(grad_Cv.to(weight_vH.dtype), weight_vH)


def hand_on(total_vH: Tensor, weight_vH: Tensor, main_grad_vH: Tensor | None) -> Tensor:
    """The gradient of the output layer for autograd, in the dtype of its weights, from that in the loss's dtype.

    Where weights are of a lower precision and there is a `main_grad`, the gradient is added to it without rounding, and
    autograd is given zeros: Megatron's hooks wait for some gradient before they reduce what is in `main_grad`.
    """
    if main_grad_vH is None or main_grad_vH.dtype == weight_vH.dtype:
        return total_vH.to(weight_vH.dtype)
    main_grad_vH += total_vH
    return weight_vH.new_zeros(()).expand_as(weight_vH)


def add_weight_gradient(total_vH: Tensor, grad_Cv: Tensor, hidden_CH: Tensor) -> None:
    """Add a chunk's gradient of the output layer to `total_vH`, which is of the dtype of loss arithmetic."""
    if hidden_CH.dtype == total_vH.dtype:
        total_vH.addmm_(grad_Cv.T, hidden_CH)
    elif hidden_CH.is_cpu:
        total_vH.addmm_(grad_Cv.T, hidden_CH.to(total_vH.dtype))
    elif _accumulates(hidden_CH.dtype, hidden_CH.device):
        torch.addmm(total_vH, grad_Cv.to(hidden_CH.dtype).T, hidden_CH, out_dtype=total_vH.dtype, out=total_vH)
    else:
        total_vH += _product(grad_Cv.to(hidden_CH.dtype).T, hidden_CH)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product in the dtype of loss arithmetic; a GPU takes half-precision factors to its tensor cores."""
    dtype = torch.promote_types(left.dtype, torch.float32)
    if left.dtype == dtype:
        return left @ right
    if left.is_cpu:  # which has no such product
        return left.to(dtype) @ right.to(dtype)
    return torch.mm(left, right, out_dtype=dtype)


@cache
def _accumulates(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch adds products of half-precision matrices on a GPU to an fp32 matrix in its place.

    Some versions have the function and want all three of one dtype.
    """
    factor = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())
