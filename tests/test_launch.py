"""Local processes: each knows its place, a failure is the job's, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_aligndistil.commands.launch import run_local, under_torchrun

WORKER = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[2]), int(os.environ["RANK"])
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS".split()

def interrupted(number, _):
    (folder / f"signal{rank}").open("a").write(f"{number} ")
    sys.exit(40 + rank)

signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[1] == "deaf" else interrupted)
(folder / f"env{rank}.partial").write_text(" ".join(os.environ[name] for name in names))
(folder / f"env{rank}.partial").rename(folder / f"env{rank}")
if sys.argv[1] == "fail" and rank == 1:
    sys.exit(7)
if sys.argv[1] == "die" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] != "pass":
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    time.sleep(1000)
"""

LAUNCHER = "import sys; from megatron_aligndistil.commands.launch import run_local; "
LAUNCHER += "sys.exit(run_local(2, sys.argv[1:], module='launch_worker'))"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the workers' traces; the module that they run is importable."""
    (tmp_path / "launch_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A killed process that nobody has waited for still has its number.
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def pid_of(folder: Path, rank: int) -> int:
    path = folder / f"pid{rank}"
    wait_for(lambda: path.exists() and path.read_text())
    return int(path.read_text())


def test_each_process_knows_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert run_local(3, ["pass", str(folder)], module="launch_worker") == 0
    rows = [(folder / f"env{rank}").read_text().split() for rank in range(3)]
    ports = {row[5] for row in rows}
    assert len(ports) == 1 and 1024 <= int(ports.pop()) < 65536
    for rank, row in enumerate(rows):
        assert row[:5] == [str(rank), str(rank), "3", "3", "127.0.0.1"]
        assert row[6] == "3"  # what the user set stands


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_processes_share_the_cores(folder: Path, monkeypatch: pytest.MonkeyPatch, nproc: int) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert run_local(nproc, ["pass", str(folder)], module="launch_worker") == 0
    threads = {(folder / f"env{rank}").read_text().split()[6] for rank in range(nproc)}
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    assert threads == {str(max(1, cores // nproc))}


def test_a_failure_is_the_jobs_and_ends_the_others(folder: Path) -> None:
    start = time.monotonic()
    assert run_local(2, ["fail", str(folder)], module="launch_worker") == 7
    assert time.monotonic() - start < 20
    assert not is_alive(pid_of(folder, 0))


def test_a_process_that_a_signal_ended_is_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_local(2, ["die", str(folder)], module="launch_worker") == 128 + signal.SIGKILL
    assert "the process of rank 1 was ended by SIGKILL" in capfd.readouterr().err


def test_interrupt_is_passed_on_once(folder: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, "sleep", str(folder)])
    pids = [pid_of(folder, rank) for rank in range(2)]
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(20) in (40, 41)
    assert [(folder / f"signal{rank}").read_text() for rank in range(2)] == [f"{signal.SIGINT:d} "] * 2
    assert not any(map(is_alive, pids))


def test_a_second_interrupt_ends_what_the_first_left(folder: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, "deaf", str(folder)])
    pids = [pid_of(folder, rank) for rank in range(2)]
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert launcher.poll() is None and all(map(is_alive, pids))
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(20) == 128 + signal.SIGTERM
    assert not any(map(is_alive, pids))


def test_termination_is_passed_on(folder: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, "sleep", str(folder)])
    pids = [pid_of(folder, rank) for rank in range(2)]
    launcher.terminate()
    assert launcher.wait(20) == 128 + signal.SIGTERM
    assert not any(map(is_alive, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_no_process_outlives_a_killed_launcher(folder: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, "sleep", str(folder)])
    pids = [pid_of(folder, rank) for rank in range(2)]
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(map(is_alive, pids)))


def test_under_torchrun_needs_rank_and_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not under_torchrun()
    monkeypatch.setenv("RANK", "0")
    assert under_torchrun()
