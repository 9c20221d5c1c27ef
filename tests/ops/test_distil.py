"""The fused operation: the composed version's numbers at any chunk size and dtype, and nothing of size [T, V] alive."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.composed import compose_teacher, reverse_kl
from megatron_aligndistil.ops import collectives
from megatron_aligndistil.ops.distil import TeacherForm, distil
from megatron_aligndistil.ops.head import LMHead, VocabShard
from megatron_aligndistil.ops.logprobs import expectations, label_logprobs
from tests.shards import assert_same, this_shard
from tests.workers import Workers

BETA0 = 0.1
ADAPTIVE, VANILLA = TeacherForm("dpo", 10.0, 1e-3), TeacherForm("negative", 0.0, 1.25, temperature=1.5)


@dataclass(frozen=True)
class Case:
    """Hidden states [T, H] and output layers [V, H] of policy, dpo and negative, with targets and weights."""

    hidden: list[Tensor]
    weights: list[Tensor]
    targets_T: Tensor
    weights_T: Tensor

    def heads(self, shard: VocabShard, dtype: torch.dtype) -> list[LMHead]:
        mine = slice(shard.start, shard.start + shard.size)
        found = [
            LMHead(h.to(dtype, copy=True), w[mine].to(dtype, copy=True), shard)
            for h, w in zip(self.hidden, self.weights, strict=True)
        ]
        found[0].hidden_TH.requires_grad_()
        found[0].weight_vH.requires_grad_()
        return found


def make_case(T: int, V: int, H: int, *, scale: float = 3.0, seed: int = 0) -> Case:
    """Three models whose logits are about `scale` in size; every other one is near the policy."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden, weight = draw(T, H), scale * H**-0.5 * draw(V, H)
    return Case(
        [hidden, hidden + 0.3 * draw(T, H), hidden + 0.3 * draw(T, H)],
        [weight, weight + 0.1 * draw(V, H), weight + 0.1 * draw(V, H)],
        torch.randint(0, V, (T,), generator=generator),
        torch.rand(T, dtype=torch.float64, generator=generator),
    )


def fused(case: Case, form: TeacherForm, rows: int | None, padded: int, dtype: torch.dtype) -> list[Tensor]:
    """Loss, everything found at each position, and the gradients; call it in a worker."""
    heads = case.heads(this_shard(len(case.weights[0]), padded), dtype)
    found = distil(*heads, case.targets_T, case.weights_T, form, BETA0, rows)
    (3 * found.loss_sum).backward()
    values = [found.loss_sum.detach(), found.kl_T, found.alpha_T, found.tvd_T, found.expected_3T, found.sampled_2T]
    assert not any(value.requires_grad for value in values)
    grads = [heads[0].hidden_TH.grad, heads[0].weight_vH.grad]
    return values + [grad / 3 for grad in grads if grad is not None]


def dense(case: Case, form: TeacherForm) -> list[Tensor]:
    """The same by plain autograd from whole logits in fp64."""
    hidden_TH, weight_VH = case.hidden[0].clone().requires_grad_(), case.weights[0].clone().requires_grad_()
    z = [hidden_TH @ weight_VH.T, *(h @ w.T for h, w in zip(case.hidden[1:], case.weights[1:], strict=True))]
    policy, dpo, negative = ((logits_TV / form.temperature).log_softmax(1) for logits_TV in z)
    tvd_T = (dpo.exp() - negative.exp()).abs().sum(1) / 2
    alpha_T = form.rate * tvd_T + form.offset
    base = dpo if form.base == "dpo" else negative
    star = (base + alpha_T[:, None] * (dpo - negative)).log_softmax(1)
    kl_T = (policy.exp() * (policy - star)).sum(1)
    loss = (case.weights_T * BETA0 / alpha_T * kl_T).sum()
    loss.backward()
    p = policy.exp().detach()
    expected = torch.stack([(p * each.detach()).sum(1) for each in (policy, dpo, negative)])
    sampled = torch.stack([each.gather(1, case.targets_T[:, None])[:, 0] for each in (dpo, negative)])
    assert hidden_TH.grad is not None and weight_VH.grad is not None
    found = [loss.detach(), kl_T.detach(), alpha_T, tvd_T, expected, sampled, hidden_TH.grad, weight_VH.grad]
    return found


def assert_equal_lists(ranks: list[list[Tensor]], expected: list[Tensor], tolerance: float) -> None:
    for found in ranks:
        for actual, true in zip(found[:-1], expected[:-1], strict=True):
            assert_same(actual, true, tolerance)
    assert_same(torch.cat([found[-1] for found in ranks]), expected[-1], tolerance)


@pytest.mark.parametrize("form", [ADAPTIVE, VANILLA])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_chunk_size_changes_nothing(workers: Workers, tp: int, rows: int, form: TeacherForm) -> None:
    case = make_case(7, 10, 5)
    assert_equal_lists(workers.run(tp, fused, case, form, rows, 16, torch.float64), dense(case, form), 1e-9)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_sweep(workers: Workers, data: st.DataObject) -> None:
    """Sizes, chunk sizes, teachers and scales at random: logits up to some 60 and coefficients up to 20."""
    T, V, H = (data.draw(st.integers(low, high)) for low, high in ((1, 6), (2, 17), (1, 5)))
    form = TeacherForm(
        data.draw(st.sampled_from(["dpo", "negative"])),
        data.draw(st.floats(0, 20)),
        data.draw(st.floats(1e-3, 2)),
        data.draw(st.sampled_from([0.5, 1.0, 2.0])),
    )
    case = make_case(T, V, H, scale=data.draw(st.floats(0.1, 20)), seed=data.draw(st.integers(0, 99)))
    rows = data.draw(st.integers(1, 7))
    (found,) = workers.run(1, fused, case, form, rows, V, torch.float64)
    for actual, true in zip(found, dense(case, form), strict=True):
        # Tiny divergences are differences of log-probabilities up to 100, whose rounding of 1e-14 a coefficient of 1e-3
        # makes a hundred times as large: what is below 1e-2 is held to 1e-11 absolutely.
        torch.testing.assert_close(actual.double(), true, rtol=0, atol=1e-9 * max(float(true.abs().max()), 1e-2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_lower_precisions(workers: Workers, dtype: torch.dtype, tolerance: float) -> None:
    """Real logits' sizes; the reference starts from the same rounded inputs."""
    case = make_case(12, 200, 16, scale=15.0)
    rounded = Case(
        [h.to(dtype).double() for h in case.hidden],
        [w.to(dtype).double() for w in case.weights],
        case.targets_T,
        case.weights_T,
    )
    form = TeacherForm("dpo", 20.0, 1e-3)
    expected = dense(rounded, form)
    for found in workers.run(2, fused, rounded, form, 5, 256, dtype):
        loss, hidden_grad = found[0].double(), found[-2].double()
        assert abs(float(loss - expected[0])) < tolerance * float(expected[0])
        assert float((hidden_grad - expected[-2]).norm()) < 3 * tolerance * float(expected[-2].norm())


def test_equals_the_composed_version() -> None:
    case = make_case(9, 50, 8)
    shard = VocabShard(0, 50, 50)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        one, other = case.heads(shard, dtype), case.heads(shard, dtype)
        found = distil(*one, case.targets_T, case.weights_T, ADAPTIVE, BETA0, 4)
        policy_Tv, dpo_Tv, negative_Tv = (head.logits() for head in other)
        teacher = compose_teacher(dpo_Tv, dpo_Tv, negative_Tv, rate=10.0, offset=1e-3, tp_group=None)
        kl_T = reverse_kl(policy_Tv, teacher.logits_Tv, None)
        loss = (case.weights_T.to(dtype) * BETA0 / teacher.alpha_T * kl_T).sum()
        found.loss_sum.backward()
        loss.backward()
        assert_same(found.loss_sum.detach(), loss.detach(), tolerance)
        assert_same(found.kl_T, kl_T.detach(), tolerance)
        for mine, theirs in ((one[0].hidden_TH, other[0].hidden_TH), (one[0].weight_vH, other[0].weight_vH)):
            assert mine.grad is not None and theirs.grad is not None
            assert_same(mine.grad, theirs.grad.double(), tolerance)


class _Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor made inside has."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor) and not each._is_view():
                self.elements = max(self.elements, each.numel())
        return result


def test_nothing_of_all_positions_by_vocabulary() -> None:
    case, rows = make_case(64, 96, 4), 8
    heads = case.heads(VocabShard(0, 96, 96), torch.float32)
    for backward in (False, True):
        with _Largest() as largest, torch.set_grad_enabled(backward):
            distilled = distil(*heads, case.targets_T, case.weights_T, ADAPTIVE, BETA0, rows).loss_sum
            logprobs_T, _ = label_logprobs(heads[0], case.targets_T, rows)
            expectations(heads[0], heads[1:], rows)
            assert distilled.requires_grad == logprobs_T.requires_grad == backward
            if backward:
                (distilled + logprobs_T.sum()).backward()
        assert largest.elements == rows * 96


def count_collectives(case: Case, rows: int, backward: bool) -> int:
    """Calls of a collective during one pass; call it in a worker."""
    heads = case.heads(this_shard(96, 96), torch.float32)
    calls = 0

    def counting(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return call

    originals = dist.all_reduce, dist.all_gather_into_tensor
    collectives.dist.all_reduce, collectives.dist.all_gather_into_tensor = map(counting, originals)
    try:
        with torch.set_grad_enabled(backward):
            loss = distil(*heads, case.targets_T, case.weights_T, ADAPTIVE, BETA0, rows).loss_sum
            if backward:
                loss.backward()
    finally:
        collectives.dist.all_reduce, collectives.dist.all_gather_into_tensor = originals
    return calls


def test_three_collectives_a_chunk(workers: Workers) -> None:
    case = make_case(20, 96, 4)
    assert workers.run(2, count_collectives, case, 5, False) == [12, 12]
    assert workers.run(2, count_collectives, case, 5, True) == [13, 13]  # and one of the hidden states' gradient


def test_gradients_reach_main_grad_unrounded() -> None:
    """bf16 weights with an fp32 buffer: it gets the gradient that fp32 arithmetic gives, and autograd gets zeros."""
    case = make_case(6, 20, 4)
    shard = VocabShard(0, 20, 20)
    for loss in (
        lambda head, others: distil(head, *others, case.targets_T, case.weights_T, ADAPTIVE, BETA0, 4).loss_sum,
        lambda head, others: label_logprobs(head, case.targets_T, 4)[0].sum(),
    ):
        plain, *others = case.heads(shard, torch.bfloat16)
        loss(plain, others).backward()
        buffer_vH = torch.full((20, 4), 2.0)
        head = replace(plain, weight_vH=plain.weight_vH.detach().clone().requires_grad_(), main_grad_vH=buffer_vH)
        for _ in range(2):
            loss(head, others).backward()
        assert head.weight_vH.grad is not None and not head.weight_vH.grad.any()
        added_vH = (buffer_vH - 2.0) / 2
        assert plain.weight_vH.grad is not None
        assert not torch.equal(added_vH, added_vH.bfloat16().float())
        torch.testing.assert_close(added_vH, plain.weight_vH.grad.float(), rtol=1e-2, atol=1e-4)


def test_no_positions_at_all(workers: Workers) -> None:
    for found in workers.run(2, fused, make_case(0, 10, 4), ADAPTIVE, None, 16, torch.float32):
        assert float(found[0]) == 0.0
        assert not found[-1].any() and found[-2].shape == (0, 4)
