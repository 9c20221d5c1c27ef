"""The composed teacher: TVD, the coefficient and the extrapolated logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.composed import Teacher, compose_teacher
from tests.shards import SIZES, VOCABULARIES, assert_same, columns, this_shard
from tests.workers import Workers


def logits_of(*shape: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    dpo_Tv = torch.tensor([[0.0, 0.0]], dtype=torch.float64)  # (1/2, 1/2)
    reverse_Tv = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)  # (3/4, 1/4): TVD 1/4
    teacher = compose_teacher(dpo_Tv, dpo_Tv, reverse_Tv, rate=10.0, offset=1e-3, tp_group=None)
    assert teacher.tvd_T.item() == pytest.approx(1 / 4, rel=1e-14)
    assert teacher.alpha_T.item() == pytest.approx(2.501, rel=1e-14)
    assert_same(teacher.logits_Tv, torch.tensor([[-2.501 * math.log(3.0), 0.0]], dtype=torch.float64), 1e-14)


def sharded_teacher(full: list[Tensor], rate: float, offset: float, padded: int) -> Teacher:
    shard = this_shard(full[0].size(1), padded)
    base_Tv, positive_Tv, negative_Tv = (columns(full_TV, shard) for full_TV in full)
    teacher = compose_teacher(base_Tv, positive_Tv, negative_Tv, rate=rate, offset=offset, tp_group=dist.group.WORLD)
    assert not any(value.requires_grad for value in vars(teacher).values())
    return teacher


@pytest.mark.parametrize("scale", [3.0, 300.0])
@pytest.mark.parametrize(("rate", "offset"), [(10.0, 1e-3), (0.0, 1.25)])
@pytest.mark.parametrize(("vocab", "padded"), VOCABULARIES)
@pytest.mark.parametrize("tp", SIZES)
def test_equals_dense(
    workers: Workers, tp: int, vocab: int, padded: int, rate: float, offset: float, scale: float
) -> None:
    base_TV, positive_TV, negative_TV = full = [logits_of(5, vocab, scale=scale, seed=seed) for seed in range(3)]
    results = workers.run(tp, sharded_teacher, full, rate, offset, padded)

    tvd_T = (positive_TV.softmax(1) - negative_TV.softmax(1)).abs().sum(1) / 2
    alpha_T = rate * tvd_T + offset
    for teacher in results:
        assert_same(teacher.tvd_T, tvd_T)
        assert_same(teacher.alpha_T, alpha_T)
    expected_TV = base_TV + alpha_T[:, None] * (positive_TV - negative_TV)
    assert_same([teacher.logits_Tv for teacher in results], expected_TV)


def test_models_that_agree_and_that_share_nothing() -> None:
    same_Tv = logits_of(3, 8)
    agree = compose_teacher(same_Tv, same_Tv, same_Tv, rate=10.0, offset=1e-3, tp_group=None)
    assert torch.equal(agree.tvd_T, torch.zeros(3, dtype=torch.float64))
    assert_same(agree.alpha_T, torch.full((3,), 1e-3, dtype=torch.float64), 1e-15)
    assert torch.equal(agree.logits_Tv, same_Tv)

    first_Tv, last_Tv = torch.zeros(2, 1, 8).unbind()
    first_Tv[0, 0], last_Tv[0, 7] = 6000.0, 6000.0
    apart = compose_teacher(first_Tv, first_Tv, last_Tv, rate=20.0, offset=1e-3, tp_group=None)
    assert apart.tvd_T.item() == 1.0
    assert apart.logits_Tv.isfinite().all()
