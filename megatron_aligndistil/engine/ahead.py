"""Sampling in the background, from a copy of the policy, while the policy itself is being updated."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from megatron_aligndistil.config import PrecisionConfig
from megatron_aligndistil.engine.completions import Completion, Sampling
from megatron_aligndistil.engine.generate import MegatronSampler
from megatron_aligndistil.engine.model import build_model, freeze
from megatron_aligndistil.engine.parallel import Parallel
from megatron_aligndistil.engine.schedule import Model


class AheadSampler:
    """Answers one list of prompts at a time in a thread, with the weights that the policy had when it was started.

    The copy has tensor and pipeline parallel groups of its own, so that its collectives and those of training cannot be
    taken for each other. Costs one more set of weights. With nccl, two communicators in use at a time on one GPU want
    NCCL_LAUNCH_ORDER_IMPLICIT=1 (NCCL 2.26 and later) where tp or pp is above 1.
    """

    def __init__(
        self,
        policy: Model,
        precision: PrecisionConfig,
        parallel: Parallel,
        batch_size: int,
        to_text: Callable[[Sequence[int]], str],
    ) -> None:
        self._policy, self._device = policy, parallel.backend.device
        groups = ProcessGroupCollection.use_mpu_process_groups()
        groups.tp, groups.pp = _same_ranks(parallel.tp_group), _same_ranks(parallel.pp_group)
        own = replace(parallel, tp_group=groups.tp, pp_group=groups.pp)
        chunks = build_model(policy.arch, own, precision, groups=groups)
        freeze(chunks)
        self._copy = Model(chunks, policy.arch)
        self._sampler = MegatronSampler(self._copy, own, batch_size, to_text)
        self._stream = torch.cuda.Stream()
        self._thread: threading.Thread | None = None
        self._result: list[Completion | None] | BaseException = []
        self._seconds = 0.0

    def start(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Take over the policy's weights as they are now and begin to sample."""
        assert self._thread is None, "one list of prompts at a time"
        with torch.no_grad():
            for source, target in zip(self._policy.chunks, self._copy.chunks, strict=True):
                for new, old in zip(unwrap_model(source).parameters(), target.parameters(), strict=True):
                    old.copy_(new)
        self._stream.wait_stream(torch.cuda.current_stream())
        # A daemon: where training fails, nobody waits for samples that other ranks will never finish.
        self._thread = threading.Thread(target=self._run, args=(prompts, sampling), daemon=True)
        self._thread.start()

    def finish(self) -> tuple[list[Completion | None], float]:
        """Wait for what was started. Returns it (None for what another data parallel rank samples) and its seconds."""
        assert self._thread is not None, "something was started"
        self._thread.join()
        self._thread = None
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result, self._seconds

    def _run(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        began = time.perf_counter()
        try:
            torch.cuda.set_device(self._device)  # the current device is a thread's own
            with torch.cuda.stream(self._stream):
                self._result = self._sampler.generate(prompts, sampling)
                self._stream.synchronize()
            self._seconds = time.perf_counter() - began
        except BaseException as error:  # raised where the result is asked for
            self._result = error


def _same_ranks(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A second group of the same processes. Called by all processes of the job; collectives over the world."""
    members: list = [None] * dist.get_world_size()
    dist.all_gather_object(members, tuple(dist.get_process_group_ranks(group)))
    mine, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in sorted(set(members))])
    assert mine is not None, "every process is in one of them"
    return mine
