"""A pool of gloo processes, started once and used by every distributed test.

Each call of :meth:`Workers.run` gets a default process group of exactly the size asked for and gives it back at the
end, so that no test sees another's groups. The functions that run in a worker live at the top level of a test module
and are sent by name; arguments and results are sent by value.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MAX_WORLD_SIZE = 4
_GRACE_SECONDS = 5.0  # how long the other ranks may take to end once one has failed


class Workers:
    """Runs a function on several ranks at once; see the `workers` fixture."""

    def __init__(self, timeout: float = 120.0) -> None:
        self.timeout = timeout
        self._members: list[tuple[BaseProcess, Connection]] = []
        self._rendezvous = tempfile.TemporaryDirectory(prefix="aligndistil-workers-")
        self._calls = 0

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """Call ``function(*args)`` on ranks 0..world_size-1 and return their results in the order of ranks.

        In each worker torch.distributed is initialised with `world_size` ranks over gloo, and RANK, LOCAL_RANK and
        WORLD_SIZE are set as torchrun sets them.

        Raises what the first rank to fail raised, with that rank's traceback as a note; TimeoutError when a rank does
        not end within `timeout` seconds; RuntimeError when a worker dies. After the last two the pool starts anew.
        """
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"world size {world_size} is not between 1 and {MAX_WORLD_SIZE}")
        while len(self._members) < world_size:
            self._members.append(_start())
        self._calls += 1
        store = Path(self._rendezvous.name) / str(self._calls)
        members = self._members[:world_size]
        for rank, (_, connection) in enumerate(members):
            connection.send_bytes(pickle.dumps((sys.path, rank, world_size, str(store))))
            connection.send_bytes(pickle.dumps((function, args)))
        return self._collect(members, time.monotonic() + (timeout or self.timeout))

    def _collect(self, members: list[tuple[BaseProcess, Connection]], deadline: float) -> list[Any]:
        ranks = {connection: rank for rank, (_, connection) in enumerate(members)}
        results: list[Any] = [None] * len(members)
        failure: BaseException | None = None
        first_failed = float("inf")
        while ranks:
            ready = wait(list(ranks), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                waiting = sorted(ranks.values())
                self.close(patience=0)
                raise failure or TimeoutError(f"ranks {waiting} of {len(members)} did not end in time")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = ranks.pop(connection)
                try:
                    results[rank], error, failed = pickle.loads(connection.recv_bytes())
                except EOFError:
                    members[rank][0].join()
                    self.close(patience=0)
                    raise failure or RuntimeError(
                        f"the worker of rank {rank} died with exit code {members[rank][0].exitcode}"
                    ) from None
                if error is not None and failed < first_failed:
                    failure, first_failed = error, failed
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if failure is not None:
            raise failure
        return results

    def close(self, patience: float = 10.0) -> None:
        """End the pool's processes, within `patience` seconds by themselves. The next call starts new ones."""
        for _, connection in self._members:
            connection.close()
        deadline = time.monotonic() + patience
        for process, _ in self._members:
            process.join(max(0.0, deadline - time.monotonic()))
            with suppress(ProcessLookupError):
                os.killpg(_pid(process), signal.SIGKILL)  # with any process that it has left behind
            process.kill()
            process.join()
        self._members.clear()


def _start() -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    # Not a daemon: Megatron's checkpointing starts processes of its own. A worker ends when its pipe closes.
    process = context.Process(target=_serve, args=(there,), daemon=False)
    process.start()
    there.close()
    return process, here


def _pid(process: BaseProcess) -> int:
    assert process.pid is not None, "it was started"
    return process.pid


def _serve(connection: Connection) -> None:
    """A worker's life: take a call, answer it, until the pipe closes."""
    os.setpgid(0, 0)  # a process group of its own, for `close` to end with all that the calls started
    torch.set_num_threads(1)
    while True:
        try:
            path, rank, world_size, store = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        sys.path[:] = path  # the module of the next function may lie in a folder that pytest has added since
        connection.send_bytes(_answer(connection.recv_bytes(), rank, world_size, store))
        # Also frees the other ranks: a collective that waits for a rank that has failed ends with an error.
        _forget_groups()


def _answer(call: bytes, rank: int, world_size: int, store: str) -> bytes:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        function, args = pickle.loads(call)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        result = function(*args)
        dist.barrier()
        return pickle.dumps((result, None, 0.0))
    except Exception as error:
        return _pack_error(error, rank)


def _forget_groups() -> None:
    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    # A gloo group keeps threads, busy ones once its peers are gone, until the last model that holds it is collected.
    gc.collect()
    gc.freeze()  # what is alive now stays, so the next collection need not walk all of torch again


def _pack_error(error: Exception, rank: int) -> bytes:
    now = time.monotonic()  # one clock for all processes: tells the failure from those that follow from it
    note = f"raised on rank {rank}:\n{traceback.format_exc()}"
    try:
        error.add_note(note)
        packed = pickle.dumps((None, error, now))
        pickle.loads(packed)  # some exceptions pickle and cannot be built again
        return packed
    except Exception:
        return pickle.dumps((None, RuntimeError(note), now))
