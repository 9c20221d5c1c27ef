"""The passes of :mod:`megatron_aligndistil.ops.passes` as Triton kernels, a program a row.

Each kernel walks its row in blocks. The statistics read three logits a token of the vocabulary, the distance two, the
teacher three, and the teacher's writes the gradient; nothing else of the vocabulary's size is read or written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_aligndistil.ops.passes import Normalised

_BLOCK, _WARPS = 4096, 8


@triton.jit
def _grow(peak, total, block):
    """A row's peak and sum of exp(z - peak) with one more block."""
    new = tl.maximum(peak, tl.max(block, 0))
    return new, total * tl.exp(peak - new) + tl.sum(tl.exp(block - new), 0)


@triton.jit
def _statistics(logits0, logits1, logits2, out, num_columns, stride, num_rows, K: tl.constexpr, BLOCK: tl.constexpr):
    """Running peak and sum of K models' rows, and Σ e_0·(z - first), `first` being the largest of the first block."""
    row = tl.program_id(0).to(tl.int64)
    kind = logits0.dtype.element_ty
    low = tl.full((), float("-inf"), kind)
    zero = tl.full((), 0.0, kind)
    peak0, peak1, peak2 = low, low, low
    sum0, sum1, sum2 = zero, zero, zero
    dot0, dot1, dot2 = zero, zero, zero
    first0, first1, first2 = zero, zero, zero
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        z0 = tl.load(logits0 + row * stride + columns, mask=inside, other=float("-inf"))
        before = peak0
        peak0, sum0 = _grow(peak0, sum0, z0)
        decay = tl.exp(before - peak0)
        e0 = tl.exp(z0 - peak0)
        if start == 0:
            first0 = peak0
        dot0 = dot0 * decay + tl.sum(tl.where(inside, e0 * (z0 - first0), 0.0), 0)
        if K > 1:
            z1 = tl.load(logits1 + row * stride + columns, mask=inside, other=float("-inf"))
            peak1, sum1 = _grow(peak1, sum1, z1)
            if start == 0:
                first1 = peak1
            dot1 = dot1 * decay + tl.sum(tl.where(inside, e0 * (z1 - first1), 0.0), 0)
        if K > 2:
            z2 = tl.load(logits2 + row * stride + columns, mask=inside, other=float("-inf"))
            peak2, sum2 = _grow(peak2, sum2, z2)
            if start == 0:
                first2 = peak2
            dot2 = dot2 * decay + tl.sum(tl.where(inside, e0 * (z2 - first2), 0.0), 0)
    tl.store(out + row, peak0)
    tl.store(out + K * num_rows + row, sum0)
    tl.store(out + 2 * K * num_rows + row, dot0 + sum0 * (first0 - peak0))
    if K > 1:
        tl.store(out + num_rows + row, peak1)
        tl.store(out + (K + 1) * num_rows + row, sum1)
        tl.store(out + (2 * K + 1) * num_rows + row, dot1 + sum0 * (first1 - peak1))
    if K > 2:
        tl.store(out + 2 * num_rows + row, peak2)
        tl.store(out + (K + 2) * num_rows + row, sum2)
        tl.store(out + (2 * K + 2) * num_rows + row, dot2 + sum0 * (first2 - peak2))


@triton.jit
def _distance(dpo, negative, peaks, offsets, out, num_columns, stride, num_rows, BLOCK: tl.constexpr):
    """½ Σ_v |p_dpo - p_negative| over a row."""
    row = tl.program_id(0).to(tl.int64)
    peak1, peak2 = tl.load(peaks + num_rows + row), tl.load(peaks + 2 * num_rows + row)
    offset1, offset2 = tl.load(offsets + num_rows + row), tl.load(offsets + 2 * num_rows + row)
    total = tl.full((), 0.0, dpo.dtype.element_ty)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        z1 = tl.load(dpo + row * stride + columns, mask=inside, other=float("-inf"))
        z2 = tl.load(negative + row * stride + columns, mask=inside, other=float("-inf"))
        total += tl.sum(tl.abs(tl.exp(z1 - peak1 + offset1) - tl.exp(z2 - peak2 + offset2)), 0)
    tl.store(out + row, 0.5 * total)


@triton.jit
def _teacher(
    policy,
    dpo,
    negative,
    peaks,
    offsets,
    alphas,
    means,
    scales,
    out,
    gradient,
    num_columns,
    stride,
    num_rows,
    BASE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Peak and sum of the teacher's row, Σ p (d - mean), and the gradient of the policy's logits."""
    row = tl.program_id(0).to(tl.int64)
    kind = policy.dtype.element_ty
    peak0, peak1, peak2 = (
        tl.load(peaks + row),
        tl.load(peaks + num_rows + row),
        tl.load(peaks + 2 * num_rows + row),
    )
    offset0, offset1, offset2 = (
        tl.load(offsets + row),
        tl.load(offsets + num_rows + row),
        tl.load(offsets + 2 * num_rows + row),
    )
    alpha, mean = tl.load(alphas + row), tl.load(means + row)
    if GRADIENT:
        scale = tl.load(scales + row)
    peak = tl.full((), float("-inf"), kind)
    total = tl.full((), 0.0, kind)
    rest = tl.full((), 0.0, kind)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        log0 = tl.load(policy + row * stride + columns, mask=inside, other=0.0) - peak0 + offset0
        log1 = tl.load(dpo + row * stride + columns, mask=inside, other=0.0) - peak1 + offset1
        log2 = tl.load(negative + row * stride + columns, mask=inside, other=0.0) - peak2 + offset2
        star = alpha * (log1 - log2) + (log1 if BASE == 1 else log2)
        pull = tl.where(inside, tl.exp(log0) * (log0 - star - mean), 0.0)
        rest += tl.sum(pull, 0)
        if GRADIENT:
            tl.store(gradient + row * num_columns + columns, scale * pull, mask=inside)
        star = tl.where(inside, star, float("-inf"))
        new = tl.maximum(peak, tl.max(star, 0))
        total = total * tl.exp(peak - new) + tl.sum(tl.exp(star - new), 0)
        peak = new
    tl.store(out + row, peak)
    tl.store(out + num_rows + row, total)
    tl.store(out + 2 * num_rows + row, rest)


@triton.jit
def _label_gradient(
    logits,
    max_,
    logsum,
    targets,
    grads,
    other_logits,
    other_max,
    other_logsum,
    kl_grads,
    num_columns,
    stride,
    OTHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """g ([v is the target] - p) + h (p - q) in the place of the model's logits."""
    row = tl.program_id(0).to(tl.int64)
    peak, logarithm, target, grad = (
        tl.load(max_ + row),
        tl.load(logsum + row),
        tl.load(targets + row),
        tl.load(grads + row),
    )
    if OTHER:
        other_peak, other_logarithm, kl_grad = (
            tl.load(other_max + row),
            tl.load(other_logsum + row),
            tl.load(kl_grads + row),
        )
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        places = logits + row * stride + columns
        p = tl.exp(tl.load(places, mask=inside, other=float("-inf")) - peak - logarithm)
        found = grad * (tl.where(columns == target, 1.0, 0.0).to(p.dtype) - p)
        if OTHER:
            z = tl.load(other_logits + row * stride + columns, mask=inside, other=float("-inf"))
            found += kl_grad * (p - tl.exp(z - other_peak - other_logarithm))
        tl.store(places, found, mask=inside)


def _options(logits_Cv: Tensor) -> dict[str, int]:
    return {"BLOCK": min(_BLOCK, triton.next_power_of_2(logits_Cv.size(1))), "num_warps": _WARPS}


def _check(logits: Sequence[Tensor]) -> None:
    strides = {logits_Cv.stride() for logits_Cv in logits}
    assert len(strides) == 1 and logits[0].stride(1) == 1, strides


def statistics(logits: Sequence[Tensor]) -> Tensor:
    """See :func:`megatron_aligndistil.ops.passes.statistics`; up to three models."""
    _check(logits)
    (num_rows, num_columns), count = logits[0].shape, len(logits)
    out_3KC = logits[0].new_empty(3, count, num_rows)
    three = [*logits, logits[0], logits[0]][:3]
    sizes = num_columns, logits[0].stride(0), num_rows
    _statistics[(num_rows,)](*three, out_3KC, *sizes, K=count, **_options(logits[0]))
    return out_3KC


def label_gradient(
    own: Normalised, columns_C: Tensor, grad_C: Tensor, other: Normalised | None, kl_grad_C: Tensor | None
) -> Tensor:
    """See :func:`megatron_aligndistil.ops.passes.label_gradient`."""
    logits_Cv = own.logits_Cv
    second, kl_grads_C = other or own, grad_C if kl_grad_C is None else kl_grad_C
    parts = own.normaliser.max_T, own.normaliser.logsum_T, columns_C, grad_C
    second_parts = second.normaliser.max_T, second.normaliser.logsum_T, kl_grads_C
    _check([logits_Cv, second.logits_Cv])
    _label_gradient[(len(logits_Cv),)](
        logits_Cv,
        *(part_C.contiguous() for part_C in parts),
        second.logits_Cv,
        *(part_C.contiguous() for part_C in second_parts),
        logits_Cv.size(1),
        logits_Cv.stride(0),
        OTHER=other is not None,
        **_options(logits_Cv),
    )
    return logits_Cv


class TritonPasses:
    """AlignDistil's passes of one chunk; logits stay as they are, and the gradient is a new tensor of `grad_dtype`."""

    def __init__(self, logits: Sequence[Tensor], grad_dtype: torch.dtype) -> None:
        self._logits, self._grad_dtype = logits, grad_dtype
        self._num_rows, num_columns = logits[0].shape
        self._sizes = num_columns, logits[0].stride(0), self._num_rows
        self._peaks_KC = logits[0].new_empty(0)

    def statistics(self) -> Tensor:
        found_3KC = statistics(self._logits)
        self._peaks_KC = found_3KC[0]
        return found_3KC

    def relative(self, column_C1: Tensor) -> Tensor:
        return (
            torch.stack([logits_Cv.gather(1, column_C1)[:, 0] for logits_Cv in self._logits[1:]]) - self._peaks_KC[1:]
        )

    def distance(self, offsets_KC: Tensor) -> Tensor:
        out_C = self._logits[0].new_empty(self._num_rows)
        _distance[(self._num_rows,)](
            *self._logits[1:], self._peaks_KC, offsets_KC, out_C, *self._sizes, **_options(self._logits[0])
        )
        return out_C

    def teacher(
        self, base: Literal[1, 2], alpha_C: Tensor, offsets_KC: Tensor, mean_C: Tensor, scale_C: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        policy_Cv = self._logits[0]
        out_3C = policy_Cv.new_empty(3, self._num_rows)
        grad_Cv = None
        if scale_C is not None:
            grad_Cv = policy_Cv.new_empty(policy_Cv.shape, dtype=self._grad_dtype)
        _teacher[(self._num_rows,)](
            *self._logits,
            self._peaks_KC,
            offsets_KC,
            alpha_C.contiguous(),
            mean_C.contiguous(),
            alpha_C if scale_C is None else scale_C.contiguous(),
            out_3C,
            policy_Cv if grad_Cv is None else grad_Cv,
            *self._sizes,
            BASE=base,
            GRADIENT=grad_Cv is not None,
            **_options(self._logits[0]),
        )
        return out_3C, grad_Cv
