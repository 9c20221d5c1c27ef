"""The process layout: who computes what. The only module that touches Megatron's global parallel state."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_aligndistil.backends import Backend, select
from megatron_aligndistil.config import ParallelConfig
from megatron_aligndistil.engine import watchdog
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.ops.head import VocabShard

# What torchrun would say to a process that is the only one.
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_MEETING = timedelta(minutes=10)
_COLLECTIVES = timedelta(hours=6)


@dataclass(frozen=True)
class Parallel:
    """This process's place in the layout TP x PP x DP, with the groups it communicates in.

    Attributes:
        backend: device and collectives.
        tp, pp, vpp, dp: sizes; vpp is model chunks per pipeline stage.
        tp_rank, pp_rank, dp_rank: this process's place along each.
        tp_group, pp_group, dp_group: process groups along each.
        sequence_parallel: whether activations are split along the sequence between tensor parallel regions.
    """

    backend: Backend
    tp: int
    pp: int
    vpp: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    sequence_parallel: bool

    @property
    def is_last_stage(self) -> bool:
        """Whether losses are computed here."""
        return self.pp_rank == self.pp - 1

    @property
    def is_reporter(self) -> bool:
        """Whether this one process of the last stage reports metrics and progress."""
        return self.is_last_stage and self.tp_rank == 0 and self.dp_rank == 0

    @property
    def pp_neighbours(self) -> tuple[int | None, int | None]:
        """Global ranks of the previous and the next pipeline stage; None where there is none."""
        first = dist.get_global_rank(self.pp_group, self.pp_rank - 1) if self.pp_rank > 0 else None
        return first, dist.get_global_rank(self.pp_group, self.pp_rank + 1) if not self.is_last_stage else None

    def vocab_shard(self, vocab_size: int, padded_vocab_size: int) -> VocabShard:
        """The columns of the vocabulary that this rank holds, padding left out."""
        per_rank = padded_vocab_size // self.tp
        start = min(self.tp_rank * per_rank, vocab_size)
        return VocabShard(start, min(per_rank, vocab_size - start), vocab_size, self.tp_group)


def check_layout(config: ParallelConfig, world_size: int) -> int:
    """The data parallel size of `config` on `world_size` processes. Raises ConfigError when it does not divide."""
    model_parallel = config.tp * config.pp
    if world_size % model_parallel:
        raise ConfigError(
            f"tp {config.tp} x pp {config.pp} = {model_parallel} does not divide the {world_size} processes started; "
            f"start a multiple of {model_parallel} processes, or lower tp or pp"
        )
    if config.vpp > 1 and config.pp == 1:
        raise ConfigError(f"vpp {config.vpp} needs a pipeline: set pp to 2 or more, or vpp to 1")
    if config.sequence_parallel and config.tp == 1:
        raise ConfigError(
            "sequence_parallel splits work over the tensor parallel group: set tp to 2 or more, or turn it off"
        )
    return world_size // model_parallel


def _join(backend: Backend) -> None:
    """Meet the other processes. Raises ConfigError when they do not come, or the store cannot be reached.

    From then on collectives may wait for long: for a first rank that prepares data, say. A process that is gone, or a
    job that hangs, is the watchdog's to end, with a sentence; nccl would abort with a page of its own, which is left as
    the last resort. It has not been run over nccl.
    """
    try:
        dist.init_process_group(backend.collectives, timeout=_MEETING)
    except (dist.DistError, ValueError) as error:
        rank, count = os.environ["RANK"], os.environ["WORLD_SIZE"]
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"rank {rank} of {count} did not meet the others at {where} (MASTER_ADDR, MASTER_PORT): "
            f"{str(error).splitlines()[0]}; start all {count} processes, where they can reach that address"
        ) from error
    distributed_c10d._set_pg_timeout(_COLLECTIVES)


@contextmanager
def process_group() -> Iterator[Backend]:
    """torch.distributed over all processes of the job, started here unless it already is.

    One process without torchrun's environment becomes a world of one.
    """
    backend = select()
    if dist.is_initialized():
        yield backend
        return
    added = {variable: alone for variable, alone in _ALONE.items() if variable not in os.environ}
    os.environ.update(added)
    _join(backend)
    is_alone = dist.get_world_size() == 1
    try:
        with watchdog.watched(distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()):
            yield backend
    except BaseException:
        # Among others the process ends now, and the group's store is still wanted to report the error once.
        if is_alone:
            dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()
    finally:
        for variable in added:  # else a process that this one starts would take itself for one of a job
            os.environ.pop(variable, None)


@contextmanager
def parallel_session(config: ParallelConfig) -> Iterator[Parallel]:
    """Megatron's groups for one layout; undone on leaving, so that a session with another layout may follow."""
    from megatron.core import parallel_state, tensor_parallel

    # Models of an earlier session hold its groups, in cycles; a gloo group that outlives its peers keeps a thread busy.
    gc.collect()
    with process_group() as backend:
        dp = check_layout(config, dist.get_world_size())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tp,
            pipeline_model_parallel_size=config.pp,
            virtual_pipeline_model_parallel_size=config.vpp if config.vpp > 1 else None,
            distributed_timeout_minutes=int(_COLLECTIVES.total_seconds() / 60),
        )
        try:
            # No layer draws random numbers here (dropout is 0), so Megatron's trackers have nothing to track.
            tensor_parallel.model_parallel_cuda_manual_seed(0, inference_rng_tracker=True, force_reset_rng=True)
            yield Parallel(
                backend=backend,
                tp=config.tp,
                pp=config.pp,
                vpp=config.vpp,
                dp=dp,
                tp_rank=parallel_state.get_tensor_model_parallel_rank(),
                pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
                dp_rank=parallel_state.get_data_parallel_rank(),
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                pp_group=parallel_state.get_pipeline_model_parallel_group(),
                dp_group=parallel_state.get_data_parallel_group(),
                sequence_parallel=config.sequence_parallel,
            )
        finally:
            parallel_state.destroy_model_parallel()
            _destroy_subgroups()


def _destroy_subgroups() -> None:
    """Give up every group but the world's, which Megatron only forgets, and its cache that keeps models alive."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    RotaryEmbedding.forward.cache_clear()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def on_first_rank(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Run `function` on rank 0 while the others wait; give every rank its result, or its error.

    Collectives: one object broadcast over the world.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function(*args, **kwargs)
        except Exception as error:  # handed to every rank, raised below
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def dtype_of(name: str, backend: Backend) -> torch.dtype:
    """The torch dtype that `precision.dtype` names."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return names.get(name, backend.default_dtype)
