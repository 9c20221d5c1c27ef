"""Models of any size built on the meta device: every tensor has its shape, and none has memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_aligndistil.backends import Backend, select
from megatron_aligndistil.config import ParallelConfig, PrecisionConfig
from megatron_aligndistil.engine.model import build_model
from megatron_aligndistil.engine.parallel import parallel_session
from megatron_aligndistil.models.architecture import Architecture

META = torch.device("meta")


@dataclass(frozen=True)
class Held:
    """What one process of a layout holds of a model.

    Attributes:
        held: parameters in its memory: padding, and copies of what others hold too, included.
        stage: parameters of the model in its whole pipeline stage, each counted once.
    """

    held: int
    stage: int


def build_on_meta(cases: Sequence[tuple[Architecture, ParallelConfig]]) -> list[list[Held]]:
    """For each case what one process of every pipeline stage holds; runs in one process, which plays them one by one.

    The tensor parallel processes of a stage hold equal parts, so the first of them stands for all. torch's fake process
    group has the ranks and sizes of a real one and does not communicate.
    """
    from megatron.core import parallel_state  # after the engine, which knows how Megatron-Core is imported

    select()  # so that Megatron-Core's uses of CUDA are redirected once and for all
    without_gloo = partial(parallel_state.initialize_model_parallel, create_gloo_process_groups=False)
    with (
        mock.patch("megatron_aligndistil.engine.parallel.select", lambda: Backend(META, "fake", torch.bfloat16)),
        mock.patch("torch.cuda.current_device", lambda: META),
        mock.patch.object(parallel_state, "initialize_model_parallel", without_gloo),
    ):
        return [[_build_stage(arch, layout, stage) for stage in range(layout.pp)] for arch, layout in cases]


def _build_stage(arch: Architecture, layout: ParallelConfig, stage: int) -> Held:
    if dist.is_initialized():  # the worker's own group, or that of the stage before
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=stage * layout.tp, world_size=layout.tp * layout.pp, store=FakeStore())
    with parallel_session(layout) as parallel:
        assert (parallel.pp_rank, parallel.tp_rank) == (stage, 0)
        chunks = build_model(arch, parallel, PrecisionConfig(dtype="bf16"))
        named = [item for chunk in chunks for item in chunk.named_parameters()]
        assert all(parameter.device == META and parameter.dtype == torch.bfloat16 for _, parameter in named)
        model = 0
        for _, parameter in named:
            is_split = getattr(parameter, "tensor_model_parallel", False)
            model += parameter.numel() * (layout.tp if is_split else 1)
        model -= _not_of_the_model(arch, layout, stage)
    return Held(sum(parameter.numel() for _, parameter in named), model)


def _not_of_the_model(arch: Architecture, layout: ParallelConfig, stage: int) -> int:
    """Parameters of a stage that only the layout needs: padding of the vocabulary, and a tied output layer's copy."""
    rows = arch.padded_vocab_size(layout.tp)
    padding = (rows - arch.vocab_size) * arch.hidden_size
    extra = padding if stage == 0 else 0
    if stage == layout.pp - 1:
        if not arch.tied_embeddings:
            extra += padding
        elif layout.pp > 1:
            extra += rows * arch.hidden_size
    return extra
