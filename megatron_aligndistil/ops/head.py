"""A model's next-token distributions over a vocabulary that is split across the tensor parallel group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """This rank's contiguous columns of the vocabulary.

    Only real tokens are columns: Megatron pads the vocabulary at its end, and those rows of the output layer are sliced
    away before any product is formed, so that padding cannot enter a sum. A shard may be empty.

    Attributes:
        start: id of the first token of this shard.
        size: number of real tokens in this shard.
        vocab_size: number of real tokens in the whole vocabulary.
        tp_group: the group that shares the vocabulary; None means one process.
    """

    start: int
    size: int
    vocab_size: int
    tp_group: dist.ProcessGroup | None = None


class _CopyToGroup(torch.autograd.Function):
    """Identity forward; the gradient is summed over the group (each rank's logits use the same hidden states)."""

    @staticmethod
    def forward(ctx, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        if ctx.group is not None and dist.get_world_size(ctx.group) > 1:
            grad = grad.contiguous().clone()
            dist.all_reduce(grad, group=ctx.group)
        return grad, None


@dataclass(frozen=True)
class LMHead:
    """Hidden states at response positions together with this rank's shard of the output layer.

    Attributes:
        hidden_TH: final hidden states, the same on every rank of the group; their gradient is too.
        weight_vH: the real rows of this rank's output layer (see VocabShard).
        shard: which columns those rows are.
        main_grad_vH: where the gradient of these rows is accumulated over micro-batches, if anywhere: a loss whose
            gradient is of a higher precision than the weights adds it there itself.
    """

    hidden_TH: Tensor
    weight_vH: Tensor
    shard: VocabShard
    main_grad_vH: Tensor | None = None

    def logits(self) -> Tensor:
        """This rank's columns of the logits, [T, v].

        Gradient flows into the hidden states and the output layer. Collectives: none forward; backward one all-reduce
        of [T, H] over the tensor parallel group.
        """
        hidden_TH = _CopyToGroup.apply(self.hidden_TH, self.shard.tp_group)
        return torch.nn.functional.linear(hidden_TH, self.weight_vH)


@dataclass(frozen=True)
class ScalarHead:
    """Hidden states together with an output layer of one row: a value, or a score, at each position.

    Attributes:
        hidden_TH: final hidden states, the same on every rank of the tensor parallel group.
        weight_1H: the output layer, whole on every rank.
    """

    hidden_TH: Tensor
    weight_1H: Tensor

    def values(self) -> Tensor:
        """The number at each position, [T], in the dtype of loss arithmetic (fp32 at least).

        Gradient flows into hidden states and weight, the same on every rank of the tensor parallel group; no
        collectives.
        """
        dtype = torch.promote_types(self.hidden_TH.dtype, torch.float32)
        return self.hidden_TH.to(dtype) @ self.weight_1H[0].to(dtype)
