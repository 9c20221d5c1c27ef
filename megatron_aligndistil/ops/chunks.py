"""Output-layer products by chunks of positions: nothing of size [T, V] is alive as a whole. Suffix C: a chunk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_aligndistil.ops.head import LMHead
from megatron_aligndistil.ops.vocab_parallel import in_loss_dtype

# Logits of one model in one chunk. A CPU's caches like few; a GPU's matrix products want rows enough to be efficient.
_CPU_ELEMENTS, _GPU_ELEMENTS = 2**21, 2**26


def chunks(head: LMHead, rows: int | None = None) -> Iterator[slice]:
    """Slices that cover the positions of `head`: `rows` at a time, or as many as its device works well with.

    The same on every rank of the tensor parallel group, whose collectives must agree: it goes by the whole vocabulary.
    """
    if rows is None:
        elements = _CPU_ELEMENTS if head.hidden_TH.is_cpu else _GPU_ELEMENTS
        rows = max(32, elements // head.shard.vocab_size)
    for start in range(0, len(head.hidden_TH), rows):
        yield slice(start, min(start + rows, len(head.hidden_TH)))


def logits_of(head: LMHead, rows: slice, temperature: float = 1.0) -> Tensor:
    """This rank's logits at some positions over a temperature, [C, v], a new tensor in the dtype of loss arithmetic.

    No gradient.
    """
    logits_Cv = in_loss_dtype(head.hidden_TH[rows].detach() @ head.weight_vH.detach().T)
    return logits_Cv if temperature == 1 else logits_Cv.div_(temperature)


def hidden_gradient(grad_Cv: Tensor, weight_vH: Tensor) -> Tensor:
    """This rank's part of the gradient of hidden states, [C, H]; the product is taken in the dtype of the weights."""
    return grad_Cv.to(weight_vH.dtype) @ weight_vH


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
    else:  # half-precision factors, products summed in fp32 on tensor cores
        total_vH += torch.mm(grad_Cv.to(hidden_CH.dtype).T, hidden_CH, out_dtype=total_vH.dtype)
