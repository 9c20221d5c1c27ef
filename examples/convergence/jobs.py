"""The runs of the comparison: what each is, whether it is done, and how several go on side by side."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from megatron_aligndistil.commands.options import parse
from megatron_aligndistil.commands.pipeline import PipelineConfig, read_stages

FOLDER, MODELS = Path("runs/convergence"), Path("runs/demo")
CONFIGS = "examples/convergence"


@dataclass(frozen=True)
class Method:
    """One way to use the reward: its name for people, its pipeline, and what tells it from others of that pipeline."""

    label: str
    config: str
    options: tuple[str, ...] = ()


METHODS = {
    "distribution": Method("distribution, token level", "distribution.yaml"),
    "token": Method("scalar, token level", "reinforce.yaml", ("--vars.level", "token")),
    "sentence": Method("scalar, sentence level", "reinforce.yaml", ("--vars.level", "sentence")),
}


@dataclass(frozen=True)
class Run:
    """One training run with the samples and the KL of its policy."""

    method: str
    batch: int
    steps: int
    lr: float
    seed: int

    @property
    def folder(self) -> Path:
        return FOLDER / f"batch{self.batch}" / self.method / f"lr{self.lr:g}-seed{self.seed}"

    @property
    def arguments(self) -> list[str]:
        """Arguments of ``aligndistil pipeline``."""
        method = METHODS[self.method]
        given = {"batch": self.batch, "steps": self.steps, "lr": f"{self.lr:g}", "seed": self.seed}
        variables = [part for name, value in given.items() for part in (f"--vars.{name}", str(value))]
        return ["--config", f"{CONFIGS}/{method.config}", "--dir", str(self.folder), *method.options, *variables]

    @property
    def work(self) -> float:
        """How long it takes, in no unit: a start, then steps."""
        return 20 + self.steps * self.batch / 64

    def is_done(self) -> bool:
        """Whether every stage is done with these very settings, as the record of the pipeline says."""
        record = self.folder / "pipeline.json"
        done = json.loads(record.read_text()) if record.is_file() else {}
        return all(done.get(s.name) == s.fingerprint for s in read_stages(parse(PipelineConfig, self.arguments)))


class Pool:
    """Does runs side by side, each in one process with one thread."""

    def __init__(self, size: int) -> None:
        self._size, self._finished = size, 0
        self._work, self._seconds = 0.0, 0.0  # done by this process

    def do(self, runs: Sequence[Run], later: Sequence[Run], describe: Callable[[Run], str]) -> None:
        """Do what is not done yet, saying after each run how it went and when all will be, those of `later` included.

        Ends the script if one fails; the others in progress are finished first.
        """
        left = [run for run in runs if not run.is_done()]
        self._finished += len(runs) - len(left)
        began, before = time.monotonic(), self._seconds
        with ThreadPoolExecutor(self._size) as executor:
            tasks = {executor.submit(_do, run): run for run in left}
            try:
                for task in as_completed(tasks):
                    seconds, run = task.result(), tasks[task]
                    left.remove(run)
                    self._finished += 1
                    self._work += run.work
                    self._seconds = before + time.monotonic() - began
                    print(f"{self._progress([*left, *later])} {describe(run)} ({seconds:.0f} s)", flush=True)
            except BaseException:
                executor.shutdown(cancel_futures=True)
                raise

    def _progress(self, left: Sequence[Run]) -> str:
        minutes = sum(run.work for run in left) * self._seconds / self._work / 60
        return f"[{self._finished}/{self._finished + len(left)}, about {minutes:.0f} min left]"


def _do(run: Run) -> float:
    """Run the pipeline of one run; returns the seconds that it took."""
    began = time.monotonic()
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / "log.txt"
    command = [sys.executable, "-m", "megatron_aligndistil", "pipeline", *run.arguments, "--nproc", "1"]
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        ).returncode
    if code:
        last = "\n".join(log.read_text(encoding="utf-8").splitlines()[-3:])
        raise SystemExit(f"a run ended with exit code {code}; all that it said is in {log}, which ends\n{last}")
    # The policy has been exported: what is left there only serves to go on training it.
    shutil.rmtree(run.folder / "train" / "checkpoints")
    return time.monotonic() - began
