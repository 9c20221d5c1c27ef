"""What AlignDistil sees at each position, over a split vocabulary: for people to look at, not for a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.ops.chunks import chunks, logits_of
from megatron_aligndistil.ops.collectives import gather_ranks, sum_ranks
from megatron_aligndistil.ops.distil import TeacherForm, distil
from megatron_aligndistil.ops.head import LMHead, VocabShard
from megatron_aligndistil.ops.passes import statistics
from megatron_aligndistil.ops.vocab_parallel import combine, target_logits


@dataclass(frozen=True)
class Positions:
    """What :func:`inspect_positions` finds, the same on every rank.

    Suffixes beside the usual ones: M the models, which are the policy (where it was given), dpo, negative and the
    teacher, in this order; k the likeliest tokens, the likeliest first.

    Attributes:
        reward_T: log π_dpo(y_t) - log π_negative(y_t), in nats: eq. 12 (or 6) without its β0.
        tvd_T, alpha_T: total variation distance of dpo and negative, and the coefficient α_t (eq. 16).
        kl_T: KL(π_θ ‖ π*), in nats; None without a policy.
        logprobs_MT: log π(y_t), in nats.
        top_tokens_MTk: int64, the likeliest tokens.
        top_logprobs_MTk: their log-probabilities, in nats.
    """

    reward_T: Tensor
    tvd_T: Tensor
    alpha_T: Tensor
    kl_T: Tensor | None
    logprobs_MT: Tensor
    top_tokens_MTk: Tensor
    top_logprobs_MTk: Tensor

    def part(self, start: int, stop: int) -> Positions:
        """Positions start..stop-1, as tensors on the CPU."""
        return Positions(
            *(None if values is None else values[start:stop].cpu() for values in self._by_position()),  # type: ignore[arg-type]
            *(values[:, start:stop].cpu() for values in self._by_model()),
        )

    def _by_position(self) -> tuple[Tensor | None, ...]:
        return self.reward_T, self.tvd_T, self.alpha_T, self.kl_T

    def _by_model(self) -> tuple[Tensor, ...]:
        return self.logprobs_MT, self.top_tokens_MTk, self.top_logprobs_MTk


@torch.no_grad()
def inspect_positions(
    policy: LMHead | None,
    dpo: LMHead,
    negative: LMHead,
    targets_T: Tensor,
    form: TeacherForm,
    top: int,
    rows: int | None = None,
) -> Positions:
    """Reward, distance, coefficient and KL of each position, and the likeliest tokens of every model and the teacher.

    TVD, α_t and KL are those of :func:`distil`, which training uses. The arguments are its arguments, beside `top`: how
    many tokens to give, at most the whole vocabulary. All distributions are softmax(z / form.temperature).

    Collectives over ``dpo.shard.tp_group``, a chunk: three of :func:`distil`; two all-gathers of [2, M, C] in all; and
    for each of the M models one all-reduce of [C] and two all-gathers of [C, k]. No gradient.
    """
    found = distil(policy or dpo, dpo, negative, targets_T, torch.zeros_like(targets_T), form, 1.0, rows)
    heads = [head for head in (policy, dpo, negative) if head is not None]
    top = min(top, dpo.shard.vocab_size)
    parts = [_chunk(heads, targets_T[each], found.alpha_T[each], form, top, each) for each in chunks(dpo, rows)]
    if not parts:  # no response at all
        empty_M0 = found.alpha_T.new_zeros(len(heads) + 1, 0)
        parts = [(empty_M0, targets_T.new_zeros(len(heads) + 1, 0, top), empty_M0[..., None].expand(-1, -1, top))]
    logprobs_MT, tokens_MTk, top_MTk = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    reward_T = logprobs_MT[-3] - logprobs_MT[-2]
    kl_T = None if policy is None else found.kl_T
    return Positions(reward_T, found.tvd_T, found.alpha_T, kl_T, logprobs_MT, tokens_MTk, top_MTk)


def _chunk(
    heads: Sequence[LMHead], targets_C: Tensor, alpha_C: Tensor, form: TeacherForm, top: int, rows: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the targets [M, C], and the likeliest tokens with theirs, [M, C, k] both."""
    shard = heads[0].shard
    models = _logprobs([logits_of(head, rows, form.temperature) for head in heads], shard.tp_group)
    dpo_Cv, negative_Cv = models[-2:]
    star_Cv = (dpo_Cv if form.base == "dpo" else negative_Cv) + alpha_C[:, None] * (dpo_Cv - negative_Cv)
    models += _logprobs([star_Cv], shard.tp_group)
    targets = [sum_ranks(target_logits(logprobs_Cv, targets_C, shard), shard.tp_group) for logprobs_Cv in models]
    tokens, tops = zip(*(_likeliest(logprobs_Cv, top, shard) for logprobs_Cv in models), strict=True)
    return torch.stack(targets), torch.stack(tokens), torch.stack(tops)


def _logprobs(logits: list[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Log-probabilities of this rank's columns, [C, v], of each model's logits. Collectives: one all-gather."""
    local_2KC = statistics([logits_Cv.clone() for logits_Cv in logits])[:2]
    max_RKC, sum_RKC = gather_ranks(local_2KC, group).unbind(1)
    return [combine(max_RKC[:, model], sum_RKC[:, model]).logprobs(logits_Cv) for model, logits_Cv in enumerate(logits)]


def _likeliest(logprobs_Cv: Tensor, top: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The `top` likeliest tokens of the whole vocabulary and their log-probabilities, [C, k] both.

    Each rank offers its own `top`, or all that it has and nothing (minus infinity) in the place of the rest.
    """
    num_rows, mine = len(logprobs_Cv), min(top, shard.size)
    tokens_Ck = torch.zeros(num_rows, top, dtype=torch.int64, device=logprobs_Cv.device)
    top_Ck = logprobs_Cv.new_full((num_rows, top), -torch.inf)
    top_Ck[:, :mine], tokens_Ck[:, :mine] = logprobs_Cv.topk(mine)
    tokens_RCk, top_RCk = gather_ranks(tokens_Ck + shard.start, shard.tp_group), gather_ranks(top_Ck, shard.tp_group)
    best_Ck, places_Ck = top_RCk.transpose(0, 1).flatten(1).topk(top)
    return tokens_RCk.transpose(0, 1).flatten(1).gather(1, places_Ck), best_Ck
