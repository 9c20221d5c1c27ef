"""Lives of a training run: processes that may be killed at any moment, and started again with the same command.

They are forked from a server that has imported everything, so that a life costs its steps and not its imports.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.engine.lives_preload"])
_TIMING = {"time", "tokens_per_second", "seconds"}


def run_training(values: dict[str, Any]) -> None:
    """Begin or go on with the run of a configuration."""
    from megatron_aligndistil.config import TrainConfig, build
    from megatron_aligndistil.engine.trainer import train

    train(build(TrainConfig, values))


def start(
    world_size: int, values: dict[str, Any], function: Callable[..., None] = run_training, *args: Any
) -> list[BaseProcess]:
    """Call ``function(values, *args)`` in new processes; what they print goes to files beside the run's folder."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes: list[BaseProcess] = [
        _CONTEXT.Process(target=_live, args=(rank, world_size, port, values, function, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def _live(
    rank: int, world_size: int, port: int, values: dict[str, Any], function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = (Path(values["run"]["dir"]).parent / f"rank{rank}.log").open("ab")
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())

    from megatron_aligndistil.engine.parallel import process_group

    with process_group():
        function(values, *args)


def finish(processes: Sequence[BaseProcess], seconds: float = 120.0) -> list[int | None]:
    """Wait for the processes to end by themselves; returns their exit codes, negative for a signal."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


def kill(processes: Sequence[BaseProcess], ranks: Sequence[int]) -> None:
    """SIGKILL some ranks; the others are given a moment to run into it, and are killed then."""
    for rank in ranks:
        processes[rank].kill()
    finish(processes, 1.0)
    for process in processes:
        process.kill()
        process.join()


def wait_until(condition: Callable[[], bool], processes: Sequence[BaseProcess], seconds: float = 60.0) -> bool:
    """Poll a condition closely while all processes live; returns whether it came true."""
    deadline = time.monotonic() + seconds
    while all(process.exitcode is None for process in processes):
        if condition():
            return True
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.0005)
    return False


def lines(folder: Path) -> list[dict[str, float]]:
    """What a run measured, without what depends on the machine's mood."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if not _TIMING & set(key.split("/"))} for record in records]


def steps_done(folder: Path) -> int:
    """The last step that a run has written down."""
    try:
        written = (folder / "metrics.jsonl").read_text().splitlines()
        return max((int(json.loads(line)["step"]) for line in written), default=0)
    except (OSError, ValueError):
        return 0
