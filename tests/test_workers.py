"""The pool that the distributed tests stand on: a failure must never pass for a success, nor hang."""

from __future__ import annotations

import os
import subprocess
import time

import pytest
import torch
import torch.distributed as dist

from megatron_aligndistil.errors import ConfigError
from tests.workers import Workers


def total_of_ranks(scale: int) -> torch.Tensor:
    total = torch.tensor(dist.get_rank() * scale)
    dist.all_reduce(total)
    return total


def fail_on_one_rank() -> None:
    if dist.get_rank() == 1:
        raise ConfigError("tp 4 does not fit")
    dist.barrier()


def sleep_for_ever() -> None:
    time.sleep(1000)


def leave_a_process_behind() -> int:
    return subprocess.Popen(["sleep", "1000"]).pid


def die() -> None:
    os._exit(7)


@pytest.mark.parametrize("world_size", [1, 2, 4, 2])
def test_world_has_the_size_asked_for(workers: Workers, world_size: int) -> None:
    expected = sum(10 * rank for rank in range(world_size))
    assert [int(total) for total in workers.run(world_size, total_of_ranks, 10)] == [expected] * world_size


def test_failure_of_one_rank_is_raised_and_frees_the_others(workers: Workers) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match="tp 4 does not fit") as caught:
        workers.run(2, fail_on_one_rank)
    assert "fail_on_one_rank" in caught.value.__notes__[0]
    assert time.monotonic() - start < 20
    assert [int(total) for total in workers.run(2, total_of_ranks, 1)] == [1, 1]


def test_hung_or_dead_worker_is_replaced() -> None:
    workers = Workers()
    try:
        with pytest.raises(TimeoutError, match=r"ranks \[0\] of 1"):
            workers.run(1, sleep_for_ever, timeout=1)
        with pytest.raises(RuntimeError, match="exit code 7"):
            workers.run(1, die)
        assert int(workers.run(1, total_of_ranks, 1)[0]) == 0
    finally:
        workers.close()


def test_processes_that_workers_started_end_with_the_pool() -> None:
    workers = Workers()
    child = workers.run(1, leave_a_process_behind)[0]
    os.kill(child, 0)
    workers.close()
    deadline = time.monotonic() + 10
    while _is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    """Whether the process runs; one that has ended and that nobody has waited for does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")
