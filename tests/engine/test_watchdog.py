"""Processes that really stop, die, hang or leave, and what the others of their job say of it before they end."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_aligndistil.engine.standing import Standing, table
from megatron_aligndistil.engine.watchdog import Watchdog

INTERVAL, PATIENCE, WORLD_SIZE = 0.25, 8.0, 3
HOST = socket.gethostname()
# What happens to whom, once all watch one another; "store" is a process that holds nothing but the job's store.
CASES = {
    "a process is killed": (2, signal.SIGKILL),
    "a process is silent": (2, signal.SIGSTOP),
    "the first process is silent": (0, signal.SIGSTOP),
    "the store is silent": ("store", signal.SIGSTOP),
    "the store is killed": ("store", signal.SIGKILL),
    "a process has failed": (2, signal.SIGUSR1),
    "all do their work": (None, None),
}


def hold_store(port_file: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port_file.with_suffix(".partial").write_text(str(store.port))
    port_file.with_suffix(".partial").rename(port_file)
    time.sleep(1000)


def take_part(rank: int, port_file: Path) -> None:
    """One process of a job. Those that do their work leave one after another, the first one last."""
    errors = os.open(port_file.parent / f"stderr{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, sys.stderr.fileno())
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port_file.read_text()}
    store = dist.TCPStore("127.0.0.1", int(port_file.read_text()), is_master=False)
    # As in a real job, nobody is watched who has not met the others: a connection may take torch seconds.
    (port_file.parent / f"met{rank}").touch()
    for other in range(WORLD_SIZE):
        wait_for(port_file.parent / f"met{other}")
    watch = Watchdog(store, rank, WORLD_SIZE, interval=INTERVAL, patience=PATIENCE)
    watch.at(7, "update of policy")

    def fail(*_: object) -> None:
        watch.failed()
        os._exit(1)

    signal.signal(signal.SIGUSR1, fail)
    (port_file.parent / f"ready{rank}").touch()
    if port_file.parent.name != "all do their work":
        time.sleep(1000)
    ctypes.PyDLL(None).usleep(int(PATIENCE / 2 * 1e6))  # with Python's lock, as a long call of C++ may
    time.sleep((WORLD_SIZE - rank) * PATIENCE / 2)
    watch.leave()


@dataclass
class Job:
    """A job of three processes and its store."""

    folder: Path
    store: BaseProcess
    ranks: list[BaseProcess]

    def said(self) -> list[list[str]]:
        return [(self.folder / f"stderr{rank}").read_text().splitlines() for rank in range(WORLD_SIZE)]


def begin(case: str, folder: Path) -> Job:
    # One process imports torch, and all others are its copies.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    folder = folder / case
    folder.mkdir()
    store = context.Process(target=hold_store, args=(folder / "port",), daemon=True)
    store.start()
    wait_for(folder / "port")
    ranks = [context.Process(target=take_part, args=(rank, folder / "port"), daemon=True) for rank in range(WORLD_SIZE)]
    for process in ranks:
        process.start()
    return Job(folder, store, ranks)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """All cases at once: they mostly wait. Each has had what happens to it done."""
    folder = tmp_path_factory.mktemp("watchdog")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line does
        jobs = {case: begin(case, folder) for case in CASES}
    for case, job in jobs.items():
        for rank in range(WORLD_SIZE):
            wait_for(job.folder / f"ready{rank}")
        whom, number = CASES[case]
        if number is not None:
            time.sleep(4 * INTERVAL)  # for the others to have heard of it
            pid = (job.store if whom == "store" else job.ranks[int(whom)]).pid
            os.kill(pid or 0, number)
    yield jobs
    for job in jobs.values():
        for process in (job.store, *job.ranks):
            process.kill()
            process.join()


@pytest.mark.parametrize("case", CASES)
def test_the_others_end_and_one_says_why(jobs: dict[str, Job], case: str) -> None:
    job, whom = jobs[case], CASES[case][0]
    survivors = [rank for rank in range(WORLD_SIZE) if rank != whom]
    for rank in survivors:
        job.ranks[rank].join(60)
    said = job.said()
    codes = [job.ranks[rank].exitcode for rank in survivors]
    if case == "all do their work":
        assert (codes, said) == ([0, 0, 0], [[], [], []])
        return
    assert codes == [1] * len(survivors)
    told = [line for lines in said for line in lines]
    if case == "a process has failed":
        assert told == [], "it has said itself what was wrong"
    elif whom == "store":
        assert [len(lines) for lines in said] == [1, 1, 0], "one process of each machine, and rank 1"
        how = "has not answered for" if "silent" in case else "is gone"
        assert "on the machine of rank 0" in said[1][0] and how in said[1][0]
        assert "last seen at step 7, update of policy" in said[1][0]
    else:
        assert len(told) == 1, said
        how = "has ended without a word" if "killed" in case else "says nothing: its process or machine is gone"
        assert told[0].startswith(f"aligndistil: rank {whom} on {HOST}, last seen ")
        assert "at step 7, update of policy" in told[0] and how in told[0]


def test_a_table_of_many_processes_has_few_lines() -> None:
    standings = {
        rank: Standing(9, 4, 3, "update of policy" if rank != 2000 else "batch", f"node{rank // 8}", 1, "")
        for rank in range(4096)
    }
    stacks = {rank: "here" for rank in range(4096) if rank != 5}
    assert table(standings, stacks).splitlines() == [
        "  rank 5 on node0: step 3, update of policy",
        "      no answer",
        "  rank 2000 on node250: step 3, batch",
        "      here",
        "  ranks 0-4, 6-1999, 2001-4095 on node0, node1, node10, node100 and 508 more: step 3, update of policy",
        "      here",
    ]
