"""Being asked to stop: a signal sets a flag, and all ranks agree at a step boundary to save and end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

# SIGTERM comes before a time limit from Slurm, Kubernetes and torchrun; SIGUSR1 from Slurm's --signal.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# One request may come twice: from the launcher, and from a scheduler that signals every process of a job.
_SAME_REQUEST_SECONDS = 2.0


class StopRequest:
    """Whether this process has been asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The handler: the first signal is remembered; another, later, ends the process at once."""
        if not self.number:
            self.number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > _SAME_REQUEST_SECONDS:
            os._exit(128 + number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, SIGTERM and SIGUSR1 ask for a stop and no longer end the process. Only the main thread can be asked."""
    request = StopRequest()
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, request.receive) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agree(device: torch.device, *numbers: int) -> list[int]:
    """The largest of every number over all ranks. Collectives: one all-reduce over the world."""
    largest = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return [int(number) for number in largest.tolist()]
