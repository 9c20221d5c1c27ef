"""Starts the processes of a job on this machine, for commands that torchrun did not start."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

GRACE_SECONDS = 5.0  # how long the others may go on once one process has failed, and how long one told to end may take
# What says to a process which one of a job it is; torchrun sets these, and so does `run_local`.
JOB_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_SECONDS = 0.05
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def under_torchrun() -> bool:
    """Whether this process is one of a job already: torchrun, or :func:`run_local`, has said which."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_local(nproc: int, argv: Sequence[str], module: str = "megatron_aligndistil") -> int:
    """Run ``python -m module *argv`` in `nproc` processes on this machine and wait for them.

    Each gets the variables that torchrun would set, this process's stdout and stderr, and an equal share of the cores
    in OMP_NUM_THREADS unless that is set already. SIGINT, SIGTERM and SIGUSR1 are passed on; a second SIGINT ends what
    the first one left. When one process fails, the others get a moment to end by themselves, then are made to. None
    outlives this one (on Linux, not even when this one is killed).

    Returns 0, or the exit code of the first process that failed, 128 + n for one that signal n ended (also reported on
    stderr, since it could say nothing itself).
    """
    shared = {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    threads = str(max(1, _num_cores() // nproc))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, **shared}
    command = [sys.executable, "-m", module, *argv]
    processes: list[subprocess.Popen[bytes]] = []
    with _signals_received() as received:
        try:
            for rank in range(nproc):
                # In a group of its own, a process does not also get the terminal's Ctrl-C beside the one passed on.
                process = subprocess.Popen(
                    command,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    process_group=0,
                    preexec_fn=_end_with_parent(),
                )
                processes.append(process)
            return _wait(processes, received)
        finally:
            _end(processes)


def _wait(processes: Sequence[subprocess.Popen[bytes]], received: list[signal.Signals]) -> int:
    """Until all have ended, or one has failed and the others had their moment; returns the exit code of the job."""
    failure, deadline, interrupted = 0, float("inf"), False
    while None in [process.poll() for process in processes]:  # every one is asked, so that every failure is seen
        while received:
            number = received.pop(0)
            _send(processes, signal.SIGTERM if interrupted else number)
            interrupted = interrupted or number == signal.SIGINT
        failure = failure or _first_failure(processes)
        if failure and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            return failure
        time.sleep(_POLL_SECONDS)
    return failure or _first_failure(processes)


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Exit code of the lowest rank that has failed so far, 0 when none has; a death by signal is reported."""
    for rank, process in enumerate(processes):
        code = process.returncode
        if code is not None and code < 0:
            hint = "; often the machine is out of memory" if code == -signal.SIGKILL else ""
            name = signal.Signals(-code).name
            print(f"aligndistil: the process of rank {rank} was ended by {name}{hint}", file=sys.stderr, flush=True)
            return 128 - code
        if code:
            return code
    return 0


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask what still runs to end; make it, when it does not."""
    _send(processes, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _send(processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        process.send_signal(number)  # does nothing to one that has ended


@contextmanager
def _signals_received() -> Iterator[list[signal.Signals]]:
    """Collects the signals to pass on, in order, in place of their usual effect."""
    received: list[signal.Signals] = []
    before = {
        number: signal.signal(number, lambda got, _: received.append(signal.Signals(got))) for number in _FORWARDED
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> Callable[[], None] | None:
    """What a new process runs first so that the kernel ends it when this one is gone; None where no kernel does."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    set_parent_death_signal = 1
    return lambda: prctl(set_parent_death_signal, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _num_cores() -> int:
    """Cores that this process may use, which in a container or a job can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
