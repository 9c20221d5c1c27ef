"""A trained model: Megatron's gradient reduction, optimiser and learning rate schedule around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_aligndistil.config import OptimConfig
from megatron_aligndistil.engine.parallel import Parallel
from megatron_aligndistil.engine.schedule import Model
from megatron_aligndistil.engine.skips import Skips
from megatron_aligndistil.models.architecture import Architecture


@dataclass(frozen=True)
class Trained:
    """One model under training, with its optimiser and schedule."""

    name: str
    model: Model
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    skips: Skips = field(default_factory=Skips)

    def zero_grad(self) -> None:
        """Clear gradient buffers before a step."""
        for chunk in self.model.chunks:
            cast(DistributedDataParallel, chunk).zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, loss_sums: Sequence[Tensor]) -> float:
        """Clip, update the weights and advance the learning rate; returns the gradient norm before clipping.

        Where a loss or the gradient norm is not finite on any rank, all ranks leave the update out: weights, master
        weights and the optimiser's moments and step counts stay as they are, and `skips` counts it. The learning rate
        advances all the same: it belongs to the place in the data, and a run with skipped steps ends at its final rate.

        Arguments:
            loss_sums: the loss of every micro-batch on the last pipeline stage; empty on others.

        Collectives: one all-reduce of the norm; one of a flag over the world, which is the decision; with the
        distributed optimiser an all-gather of updated weights.
        """
        # What `self.optimizer.step()` does, with a look at the norm before anything is changed.
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        finite = self._all_finite(loss_sums, grad_norm)
        if finite:
            for part in self._parts:
                weights = part.get_parameters()
                if weights and part.config.clip_grad > 0:
                    clip_grad_by_total_norm_fp32(weights, part.config.clip_grad, grad_norm)
            self.optimizer.step_with_ready_grads()
        self.scheduler.step(increment=1)
        self.skips.count(not finite)
        return grad_norm

    def _all_finite(self, loss_sums: Sequence[Tensor], grad_norm: float) -> bool:
        device = next(self.model.chunks[0].parameters()).device
        wrong = torch.tensor(float(not math.isfinite(grad_norm)), device=device)
        if loss_sums:
            wrong += (~torch.stack(list(loss_sums)).isfinite()).any()
        dist.all_reduce(wrong, op=dist.ReduceOp.MAX)
        return wrong.item() == 0

    def release(self) -> None:
        """Let go of the weights at the end; nothing here can be used afterwards.

        Megatron's wrapper and (through fp32 shards, which are views with a gradient function) its optimiser keep
        autograd nodes whose hooks hold the wrapper in turn: a cycle that Python's collector cannot see.
        """
        for chunk in self.model.chunks:
            cast(DistributedDataParallel, chunk).grad_accs.clear()
        for part in self._parts:
            vars(part).clear()

    def prepare_states(self) -> None:
        """Give AdamW the states that its first step would make, where it has none.

        A checkpoint needs them: one that is loaded, somewhere to load to; one that is saved before any update was made
        (where the first were skipped), something to save. Megatron's own function does not know torch's step count.
        """
        for part in self._parts:
            if isinstance(part.optimizer, torch.optim.Adam):  # AdamW is one
                _make_states(part.optimizer)
            elif part.optimizer is not None:
                part.init_state_fn(part.optimizer, part.config)

    @torch.no_grad()  # fp32 weights are leaves with gradient, and are written in place
    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Take over a state loaded from a checkpoint."""
        for part in self._parts:
            if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.Adam):
                part._set_main_param_and_optimizer_states = partial(_set_all_but_step, part)
        self.optimizer.load_state_dict(state)
        for part in self._parts:
            if isinstance(part.optimizer, torch.optim.Adam):
                # Megatron hands one step count to all weights, and each weight's update would count it up for all.
                for weight_state in part.optimizer.state.values():
                    weight_state["step"] = weight_state["step"].clone()

    def load_scheduler(self, state: dict[str, Any]) -> None:
        """Take over the place in the learning rate schedule from a checkpoint."""
        self.scheduler.num_steps = 0  # Megatron adds the saved steps to those already counted
        self.scheduler.load_state_dict(state)

    @property
    def _parts(self) -> Sequence[MegatronOptimizer]:
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


def _make_states(adam: torch.optim.Adam) -> None:
    for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
        if not adam.state[parameter]:
            zeros = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.tensor(0.0), **zeros}


def _set_all_but_step(part: DistributedOptimizer, weight: torch.nn.Parameter, tensors: dict[str, Tensor]) -> None:
    """Copy a weight's loaded states; megatron-core 0.16.1 asks for torch's step count too, which it has set before."""
    step = part._get_main_param_and_optimizer_states(weight)["step"]
    DistributedOptimizer._set_main_param_and_optimizer_states(part, weight, {**tensors, "step": step})


def _keep_places(part: DistributedOptimizer) -> None:
    """Save the state of every weight from where it lies.

    To save, megatron-core 0.16.1 gathers a buffer's states without the padding between its buckets, and then looks for
    each weight at its place in the buffer with padding: states behind a padded bucket are read from the wrong place,
    with no more than a warning. Here the padding is put back before it looks.
    """
    gather = part.get_parameter_state_dp_zero

    def gather_in_place(*args: Any, **kwargs: Any) -> dict[Any, Any] | None:
        gathered = gather(*args, **kwargs)
        if gathered is not None:
            for index, buffer in enumerate(part.buffers):
                for states in gathered[index].values():
                    for key in ("param", "exp_avg", "exp_avg_sq"):
                        states[key] = _with_padding(states[key], buffer.buckets)
        return gathered

    part.get_parameter_state_dp_zero = gather_in_place


def _with_padding(packed: Tensor, buckets: Sequence[Any]) -> Tensor:
    """Buckets laid end to end [numel without padding], moved to their offsets in the buffer."""
    if len(buckets) == 1:
        return packed
    padded = packed.new_zeros(buckets[-1].offset + buckets[-1].numel_unpadded)
    parts = packed.split([bucket.numel_unpadded for bucket in buckets])
    for bucket, part in zip(buckets, parts, strict=True):
        padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = part
    return padded


def make_trained(
    name: str,
    chunks: Sequence[torch.nn.Module],
    arch: Architecture,
    config: OptimConfig,
    num_steps: int,
    parallel: Parallel,
) -> Trained:
    """Wrap `chunks` for training: fp32 gradients summed over data parallel ranks, AdamW with fp32 master weights.

    Gradients are summed, not averaged: the division by the global count happens once, in `finalize_model_grads`.
    """
    model_config = get_model_config(chunks[0])
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.distributed,
        overlap_grad_reduce=parallel.backend.is_cuda,
    )
    wrapped = [
        DistributedDataParallel(model_config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.lr * config.min_lr_ratio,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.clip,
            bf16=model_config.bf16,
            params_dtype=model_config.params_dtype,
            use_distributed_optimizer=config.distributed,
        ),
        wrapped,
    )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            _keep_places(part)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.lr * config.min_lr_ratio,
        lr_warmup_steps=min(math.ceil(config.warmup * num_steps), num_steps - 1),
        lr_decay_steps=num_steps,
        lr_decay_style=config.decay,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
    )
    # The learning rate of step k is that of k steps done: with a warm-up the first step would have rate 0 and be lost.
    scheduler.step(increment=1)
    model_config.finalize_model_grads_func = finalize_model_grads
    single = len(wrapped) == 1
    model_config.no_sync_func = wrapped[0].no_sync if single else [chunk.no_sync for chunk in wrapped]
    if ddp_config.overlap_grad_reduce:
        starts = [partial(chunk.start_grad_sync) for chunk in wrapped]
        model_config.grad_sync_func = starts[0] if single else starts
    model_config.grad_scale_func = optimizer.scale_loss
    for chunk in wrapped:
        chunk.train()
    return Trained(name, Model(wrapped, arch), optimizer, scheduler)
