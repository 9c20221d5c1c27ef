"""The fused loss on a GPU: Triton kernels and products with fp32 results, against the dense fp64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_aligndistil.ops import distil as module
from megatron_aligndistil.ops.distil import TeacherForm, distil
from megatron_aligndistil.ops.head import LMHead, VocabShard
from megatron_aligndistil.ops.logprobs import label_logprobs
from megatron_aligndistil.ops.passes import TorchPasses
from tests.ops.test_distil import ADAPTIVE, BETA0, VANILLA, Case, dense, make_case

pytestmark = pytest.mark.gpu

VOCABULARY = 5000  # more than one block of the kernels, and no multiple of one


def on_gpu(case: Case, dtype: torch.dtype) -> tuple[list[LMHead], Tensor, Tensor]:
    """The three heads, the targets and the weights."""
    moved = Case([h.cuda() for h in case.hidden], [w.cuda() for w in case.weights], case.targets_T, case.weights_T)
    heads = moved.heads(VocabShard(0, VOCABULARY, VOCABULARY), dtype)
    return heads, case.targets_T.cuda(), case.weights_T.cuda()


def rounded(case: Case, dtype: torch.dtype) -> Case:
    """The reference starts from the same rounded inputs."""
    return replace(
        case, hidden=[h.to(dtype).double() for h in case.hidden], weights=[w.to(dtype).double() for w in case.weights]
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("form", [ADAPTIVE, VANILLA])
@pytest.mark.parametrize("kernels", [True, False], ids=["triton", "torch"])
def test_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, kernels: bool, form: TeacherForm, dtype: torch.dtype, tolerance: float
) -> None:
    """Only the gradient is rounded to bf16, before its two products; logits are not."""
    if not kernels:
        monkeypatch.setattr(module, "make_passes", lambda logits, _: TorchPasses(logits))
    case = make_case(70, VOCABULARY, 64, scale=6.0)
    (heads, targets_T, weights_T), expected = on_gpu(case, dtype), dense(rounded(case, dtype), form)
    found = distil(*heads, targets_T, weights_T, form, BETA0, rows=32)
    found.loss_sum.backward()
    grads = heads[0].hidden_TH.grad, heads[0].weight_vH.grad
    values = (found.loss_sum, found.kl_T, found.alpha_T, found.tvd_T, found.expected_3T, found.sampled_2T)
    exact = max(tolerance / 50, 1e-9) if dtype == torch.bfloat16 else tolerance
    for actual, true, limit in zip((*values, *grads), expected, [exact] * 6 + [tolerance] * 2, strict=True):
        assert actual is not None
        assert float((actual.detach().cpu().double() - true).norm()) <= limit * float(true.norm())


def test_half_precision_gradients_are_added_up_in_fp32() -> None:
    """Many chunks into Megatron's fp32 buffer: the sum has no rounding of bf16."""
    case = make_case(512, VOCABULARY, 64, scale=6.0)
    (heads, targets_T, weights_T), results = on_gpu(case, torch.bfloat16), []
    for rows in (512, 16):
        main_grad_vH = torch.zeros_like(heads[0].weight_vH, dtype=torch.float32)
        policy = replace(heads[0], main_grad_vH=main_grad_vH)
        distil(policy, *heads[1:], targets_T, weights_T, ADAPTIVE, BETA0, rows=rows).loss_sum.backward()
        results.append(main_grad_vH)
    assert float((results[0] - results[1]).norm()) < 1e-5 * float(results[0].norm())


def test_log_probabilities() -> None:
    case = make_case(40, VOCABULARY, 64, scale=6.0)
    (heads, targets_T, weights_T) = on_gpu(case, torch.float32)
    logprobs_T, _ = label_logprobs(heads[0], targets_T, rows=16)
    (weights_T * logprobs_T).sum().backward()
    hidden_TH, weight_VH = (x[0].clone().requires_grad_() for x in (case.hidden, case.weights))
    exact_T = (hidden_TH @ weight_VH.T).log_softmax(1).gather(1, case.targets_T[:, None])[:, 0]
    (case.weights_T * exact_T).sum().backward()
    for actual, true in (
        (logprobs_T, exact_T),
        (heads[0].hidden_TH.grad, hidden_TH.grad),
        (heads[0].weight_vH.grad, weight_VH.grad),
    ):
        assert actual is not None and true is not None
        assert float((actual.detach().cpu().double() - true).norm()) < 2e-4 * float(true.norm())
