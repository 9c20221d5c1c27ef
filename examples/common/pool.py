"""Runs of `aligndistil pipeline`: whether one is done, and how several go on side by side."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megatron_aligndistil.commands.options import parse
from megatron_aligndistil.commands.pipeline import PipelineConfig, read_stages

WORKER = Path(__file__).with_name("worker.py")
FAILED = "failed.json"  # in the folder of a run that failed where that was tolerated


class Job(Protocol):
    """One run of a pipeline.

    Attributes:
        folder: what it writes; the `dir` of its pipeline.
        arguments: those of ``aligndistil pipeline``.
        work: how long it takes, in no unit.
        leftovers: folders that nobody needs once it is done.
    """

    @property
    def folder(self) -> Path: ...
    @property
    def arguments(self) -> list[str]: ...
    @property
    def work(self) -> float: ...
    @property
    def leftovers(self) -> Iterable[Path]: ...


def is_done(job: Job) -> bool:
    """Whether every stage is done with these very settings, as the record of the pipeline says."""
    record = job.folder / "pipeline.json"
    done = json.loads(record.read_text()) if record.is_file() else {}
    return all(done.get(stage.name) == stage.fingerprint for stage in read_stages(parse(PipelineConfig, job.arguments)))


def has_failed(job: Job) -> bool:
    """Whether it failed with these very arguments, and that was tolerated."""
    record = job.folder / FAILED
    return record.is_file() and json.loads(record.read_text())["arguments"] == job.arguments


class Pool:
    """Does runs side by side, each in one worker process; a worker does many, as its start takes seconds.

    Args:
        size: workers.
        gpus: numbers of the GPUs to deal out to the workers, each worker as many as the others.
        processes: processes of one run.
    """

    def __init__(self, size: int, gpus: Sequence[int] = (), processes: int = 1) -> None:
        self._finished = 0
        self._work, self._seconds = 0.0, 0.0  # done by this process
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._size, self._processes = size, processes
        self._workers = [_Worker(gpus[number::size] if gpus else None) for number in range(size)]
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, trace: TracebackType | None) -> None:
        for worker in self._workers:
            worker.end()

    def do(
        self, jobs: Sequence[Any], later: Sequence[Any], describe: Callable[[Any], str], tolerate: bool = False
    ) -> None:
        """Do what is not done yet, saying after each run how it went and when all will be, those of `later` included.

        Ends the script if one fails, when the others in progress are finished. With `tolerate`, a failure is noted in
        the run's folder instead, and not tried again.
        """
        left = [job for job in jobs if not is_done(job) and not (tolerate and has_failed(job))]
        self._finished += len(jobs) - len(left)
        began, before = time.monotonic(), self._seconds
        with ThreadPoolExecutor(self._size) as executor:
            tasks = {executor.submit(self._do, job, tolerate): job for job in left}
            try:
                for task in as_completed(tasks):
                    seconds, job = task.result(), tasks[task]
                    left.remove(job)
                    self._finished += 1
                    self._work += job.work
                    self._seconds = before + time.monotonic() - began
                    said = f"{job.folder} failed" if tolerate and has_failed(job) else describe(job)
                    print(f"{self._progress([*left, *later])} {said} ({seconds:.0f} s)", flush=True)
            except BaseException:
                executor.shutdown(cancel_futures=True)
                raise

    def _progress(self, left: Sequence[Any]) -> str:
        minutes = sum(job.work for job in left) * self._seconds / self._work / 60
        return f"[{self._finished}/{self._finished + len(left)}, about {minutes:.0f} min left]"

    def _do(self, job: Job, tolerate: bool) -> float:
        """Run the pipeline of one run; returns the seconds that it took."""
        began = time.monotonic()
        job.folder.mkdir(parents=True, exist_ok=True)
        log = job.folder / "log.txt"
        worker = self._idle.get()
        try:
            code = worker.run([*job.arguments, "--nproc", str(self._processes)], log)
        finally:
            self._idle.put(worker)
        if code:
            last = "\n".join(log.read_text(encoding="utf-8").splitlines()[-3:]) if log.is_file() else ""
            if not tolerate or code != 1:
                raise SystemExit(f"a run ended with exit code {code}; all that it said is in {log}, which ends\n{last}")
            (job.folder / FAILED).write_text(json.dumps({"arguments": job.arguments, "said": last}, indent=1))
            return time.monotonic() - began
        for folder in job.leftovers:
            shutil.rmtree(folder, ignore_errors=True)
        return time.monotonic() - began


class _Worker:
    """A process of worker.py, started when it is first needed and again after a run that failed."""

    def __init__(self, gpus: Sequence[int] | None) -> None:
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if gpus is not None:
            self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        self._process: subprocess.Popen[str] | None = None

    def run(self, arguments: list[str], log: Path) -> int:
        """Run one pipeline; returns its exit code, that of the process where it died."""
        if self._process is None:
            command = [sys.executable, str(WORKER)]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._process = subprocess.Popen(command, env=self._environment, **pipes)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"arguments": arguments, "log": str(log)}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if answer.strip() == "0":
            return 0
        code = self.end()
        return int(answer) if answer else code or 1

    def end(self) -> int:
        """Let the process end; returns its exit code, 0 where there is none."""
        if self._process is None:
            return 0
        process, self._process = self._process, None
        process.communicate()
        return process.returncode
