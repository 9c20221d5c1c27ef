"""Where the computation runs. The rest of the project asks :func:`select` once and never looks again."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Backend:
    """The device of this process and how processes talk.

    Attributes:
        device: where tensors live.
        collectives: name of the torch.distributed backend.
        default_dtype: what `precision.dtype: auto` means here.
    """

    device: torch.device
    collectives: str
    default_dtype: torch.dtype

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has done what it was given, so that a clock tells how long that took."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)


def select() -> Backend:
    """Take this process's CUDA device if there is one; otherwise make Megatron-Core run on the CPU over gloo.

    Must be called before anything of Megatron runs; calling it again gives the same answer.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return Backend(device, "nccl", torch.bfloat16)
    from megatron_aligndistil.backends import cpu

    cpu.activate()
    return Backend(torch.device("cpu"), "gloo", torch.float32)


def import_megatron() -> None:
    """Import Megatron-Core in the way that suits this machine; what imports it first should call this before."""
    if not torch.cuda.is_available():
        from megatron_aligndistil.backends import cpu

        cpu.import_megatron()
