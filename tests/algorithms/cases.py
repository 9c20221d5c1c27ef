"""One small case seen twice: whole, for the dense reference, and as the shards that an algorithm is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_aligndistil import algorithms
from megatron_aligndistil.algorithms.base import Frozen, LossOutput
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.ops.head import LMHead
from megatron_aligndistil.ops.logprobs import label_logprobs
from tests.shards import columns, this_shard

HIDDEN_SIZE = 6
MODELS = ("policy", "reference", "dpo", "reverse")


@dataclass(frozen=True)
class Case:
    """Rows of responses with, for each model, the hidden states of every position and the whole output layer.

    `ratings` are of rows, and `prepared` is what an algorithm's `prepare` is to have found, where a loss reads these.
    """

    lengths: tuple[int, ...]
    padded: int
    targets_T: Tensor
    hidden: dict[str, Tensor]
    weights: dict[str, Tensor]
    ratings: tuple[float, ...] | None = None
    prepared: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, chosen: Sequence[int]) -> Case:
        """The case with only these rows, in this order."""
        starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        keep_T = torch.tensor([t for row in chosen for t in range(starts[row], starts[row + 1])], dtype=torch.int64)
        return replace(
            self,
            lengths=tuple(self.lengths[row] for row in chosen),
            targets_T=self.targets_T[keep_T],
            hidden={name: hidden_TH[keep_T] for name, hidden_TH in self.hidden.items()},
            ratings=None if self.ratings is None else tuple(self.ratings[row] for row in chosen),
        )

    def logits(self, name: str) -> Tensor:
        """[T, V], differentiable where the model's tensors are."""
        return self.hidden[name] @ self.weights[name].T

    @property
    def spans(self) -> list[slice]:
        """The positions of each row."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]


def make_case(
    lengths: Sequence[int], *, vocab: int = 10, padded: int = 16, scale: float = 1.0, same: bool = False
) -> Case:
    """Random models of fp64; targets take every token in turn, so each side of each shard boundary."""
    generator = torch.Generator().manual_seed(17)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    num_positions = sum(lengths)
    hidden = {name: draw(num_positions, HIDDEN_SIZE) for name in MODELS}
    weights = {name: scale * draw(vocab, HIDDEN_SIZE) for name in MODELS}
    if same:
        hidden, weights = (dict.fromkeys(MODELS, values["policy"]) for values in (hidden, weights))
    return Case(tuple(lengths), padded, torch.arange(num_positions) % vocab, hidden, weights)


@dataclass(frozen=True)
class Result:
    """What one rank computed: the loss with its gradients into hidden states and into this rank's output layer."""

    output: LossOutput
    hidden_grad_TH: Tensor
    weight_grad_Hv: Tensor


def run_sharded(section: Mapping[str, Any], model: str, case: Case) -> Result:
    """The loss of the algorithm that `section` describes, for the trained model named `model`; call it in a worker."""
    algorithm = algorithms.build(section)
    shard = this_shard(case.weights["policy"].size(0), case.padded)
    lengths_B = torch.tensor(case.lengths)
    responses = Responses(
        case.targets_T,
        torch.arange(len(lengths_B)).repeat_interleave(lengths_B),
        lengths_B,
        ratings_B=None if case.ratings is None else torch.tensor(case.ratings),
        prepared=case.prepared,
    )

    def head_of(name: str) -> LMHead:
        return LMHead(case.hidden[name].clone(), columns(case.weights[name].T, shard).T.detach(), shard)

    frozen = {}
    for name, need in algorithm.frozen.items():
        head = head_of(name)
        if need == "logprobs":
            frozen[name] = Frozen(logprobs_T=label_logprobs(head, responses.targets_T)[0].detach())
        else:
            frozen[name] = Frozen(head=head)
    head = head_of("policy")
    hidden_TH, weight_vH = head.hidden_TH.requires_grad_(), head.weight_vH.requires_grad_()
    output = algorithm.loss(model, head, responses, frozen)
    output.loss_sum.backward()
    assert hidden_TH.grad is not None and weight_vH.grad is not None
    assert not any(part.requires_grad for pair in output.metrics.values() for part in pair)
    detached = replace(output, loss_sum=output.loss_sum.detach())
    return Result(detached, hidden_TH.grad, weight_vH.grad.T)


def dense_gradients(loss: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """(d loss / d hidden [T, H], d loss / d weight transposed [H, V]) of the policy by plain autograd."""
    hidden_TH, weight_VH = torch.autograd.grad(loss, [case.hidden["policy"], case.weights["policy"]])
    return hidden_TH, weight_VH.T


def with_gradient(case: Case) -> Case:
    """The same case with the policy's tensors as leaves that require gradients."""
    hidden = case.hidden | {"policy": case.hidden["policy"].clone().requires_grad_()}
    weights = case.weights | {"policy": case.weights["policy"].clone().requires_grad_()}
    return replace(case, hidden=hidden, weights=weights)
