"""What is found at each position: a dense fp64 reference's numbers, however the vocabulary and the chunks are cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_aligndistil.ops.distil import TeacherForm
from megatron_aligndistil.ops.head import VocabShard
from megatron_aligndistil.ops.positions import Positions, inspect_positions
from tests.ops.test_distil import ADAPTIVE, VANILLA, Case, make_case
from tests.shards import VOCABULARIES, assert_same, this_shard
from tests.workers import Workers


def inspected(case: Case, form: TeacherForm, top: int, padded: int, with_policy: bool, rows: int) -> Positions:
    """Call it in a worker."""
    policy, dpo, negative = case.heads(this_shard(len(case.weights[0]), padded), torch.float64)
    found = inspect_positions(policy if with_policy else None, dpo, negative, case.targets_T, form, top, rows)
    assert not any(value.requires_grad for value in vars(found).values() if value is not None)
    return found


def dense(case: Case, form: TeacherForm) -> tuple[dict[str, Tensor], Tensor]:
    """The values of each position, and the log-probabilities [4, T, V] of policy, dpo, negative and teacher."""
    policy, dpo, negative = (
        (hidden_TH @ weight_VH.T / form.temperature).log_softmax(1)
        for hidden_TH, weight_VH in zip(case.hidden, case.weights, strict=True)
    )
    tvd_T = (dpo.exp() - negative.exp()).abs().sum(1) / 2
    alpha_T = form.rate * tvd_T + form.offset
    star = ((dpo if form.base == "dpo" else negative) + alpha_T[:, None] * (dpo - negative)).log_softmax(1)
    logprobs = torch.stack([policy, dpo, negative, star])
    target_MT = logprobs.gather(2, case.targets_T[None, :, None].expand(4, -1, 1))[..., 0]
    values = {
        "reward_T": target_MT[1] - target_MT[2],
        "tvd_T": tvd_T,
        "alpha_T": alpha_T,
        "kl_T": (policy.exp() * (policy - star)).sum(1),
        "logprobs_MT": target_MT,
    }
    return values, logprobs


@pytest.mark.parametrize("form", [ADAPTIVE, VANILLA], ids=["adaptive", "vanilla"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_equals_dense(workers: Workers, tp: int, vocabulary: tuple[int, int], form: TeacherForm) -> None:
    size, padded = vocabulary
    top = min(5, size)
    case = make_case(7, size, 6)
    values, logprobs = dense(case, form)
    for found in workers.run(tp, inspected, case, form, 5, padded, True, 3):
        for name, expected in values.items():
            assert_same(getattr(found, name), expected)
        best, tokens = logprobs.topk(top)
        assert torch.equal(found.top_tokens_MTk, tokens)
        assert_same(found.top_logprobs_MTk, best)


def test_without_a_policy(workers: Workers) -> None:
    case = make_case(5, 12, 4)
    values, logprobs = dense(case, ADAPTIVE)
    for found in workers.run(2, inspected, case, ADAPTIVE, 3, 16, False, 2):
        assert found.kl_T is None
        assert_same(found.reward_T, values["reward_T"])
        assert_same(found.logprobs_MT, values["logprobs_MT"][1:])
        assert torch.equal(found.top_tokens_MTk, logprobs[1:].topk(3).indices)


def test_no_positions_at_all(workers: Workers) -> None:
    for found in workers.run(2, inspected, make_case(0, 12, 4), ADAPTIVE, 3, 12, True, 2):
        assert found.kl_T is not None and found.kl_T.shape == (0,)
        assert found.logprobs_MT.shape == (4, 0)
        assert found.top_tokens_MTk.shape == found.top_logprobs_MTk.shape == (4, 0, 3)


def test_equal_models_say_nothing() -> None:
    """No reward, no distance; the teacher is the DPO model, and the policy that is this model has reached it."""
    case = make_case(4, 9, 4)
    same = Case([case.hidden[0]] * 3, [case.weights[0]] * 3, case.targets_T, case.weights_T)
    found = inspect_positions(*same.heads(VocabShard(0, 9, 9), torch.float64), case.targets_T, ADAPTIVE, 9)
    assert found.kl_T is not None
    assert not found.reward_T.any() and not found.tvd_T.any() and float(found.kl_T.abs().max()) < 1e-15
    assert torch.equal(found.alpha_T, torch.full((4,), 1e-3, dtype=torch.float64))
    torch.testing.assert_close(found.top_logprobs_MTk.exp().sum(2), torch.ones(4, 4, dtype=torch.float64))


def test_a_part_of_the_positions() -> None:
    case = make_case(6, 9, 4)
    found = inspect_positions(*case.heads(VocabShard(0, 9, 9), torch.float64), case.targets_T, ADAPTIVE, 2)
    part = found.part(2, 5)
    assert part.kl_T is not None and found.kl_T is not None
    assert torch.equal(part.kl_T, found.kl_T[2:5])
    assert torch.equal(part.top_tokens_MTk, found.top_tokens_MTk[:, 2:5])
