"""What a run tells its user: a progress bar with ETA, JSON lines, TensorBoard, Weights & Biases on request."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from megatron_aligndistil.data.progress import counting_bar


@contextmanager
def track(title: str, total: int, active: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar with ETA for work without metrics; yields a function to call with how much is done."""
    if not active:
        yield lambda done: None
        return
    with counting_bar(title, Console(stderr=True), "status") as progress:
        task = progress.add_task(title, total=total, status="")
        yield lambda done: progress.update(task, completed=done)


class Reporter:
    """Writes metrics of one run from one process; on every other process (`active` False) each call does nothing.

    ``metrics.jsonl`` gets one object a line: step, time (seconds since the epoch), then metrics. A resumed run drops
    lines beyond the step that it resumes from, so that no step is there twice. Where a disk is full, training goes on:
    lines wait until there is room, TensorBoard goes without what comes after.
    """

    def __init__(self, folder: Path, title: str, total: int, done: int, active: bool, wandb: str | None = None) -> None:
        self._active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._console = Console(stderr=True)
        self._progress = counting_bar(title, self._console, "status")
        self._task = self._progress.add_task(title, total=total, completed=done, status="")
        self._title, self._total = title, total
        self._path = folder / "metrics.jsonl"
        self._keep_until(done)
        # Unbuffered: what a full disk takes of a line is known, and the rest follows when there is room.
        self._lines = self._path.open("ab", buffering=0)
        self._unwritten = b""
        self._board: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._wandb = _start_wandb(wandb, folder) if wandb else None

    def _keep_until(self, step: int) -> None:
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            fresh = self._path.with_name(self._path.name + ".partial")
            fresh.write_text("".join(kept), encoding="utf-8")
            fresh.replace(self._path)  # whole, whenever this process is killed

    def __enter__(self) -> Reporter:
        if self._active:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._progress.stop()
            self._lines.close()
            self._on_board("close")
            if self._wandb is not None:
                self._wandb.finish()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of one step everywhere."""
        if not self._active:
            return
        record = {"step": step, "time": round(time.time(), 3), **metrics}
        self._write(json.dumps(record) + "\n")
        for name, value in metrics.items():
            self._on_board("add_scalar", name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def _write(self, line: str) -> None:
        waited = bool(self._unwritten)
        self._unwritten += line.encode()
        try:
            self._unwritten = self._unwritten[self._lines.write(self._unwritten) :]
        except OSError as error:
            if not waited:
                self.say(f"{self._path}: {error.strerror}; lines wait until there is room, and training goes on")

    def _on_board(self, method: str, *args: Any) -> None:
        """Call TensorBoard, if it is still there: its thread ends at the first error of the disk."""
        if self._board is not None:
            try:
                getattr(self._board, method)(*args)
            except OSError as error:
                self._board = None
                self.say(f"TensorBoard: {error.strerror}; it ends here, {self._path.name} goes on")

    def advance(self, step: int, status: str) -> None:
        """Move the progress bar; without a terminal, print a line now and then instead."""
        if not self._active:
            return
        self._progress.update(self._task, completed=step, status=status)
        if not self._console.is_terminal and (step == self._total or step % max(1, self._total // 10) == 0):
            remaining = self._progress.tasks[0].time_remaining
            eta = "" if remaining is None or step == self._total else f", eta {remaining:.0f} s"
            self.say(f"{self._title} {step}/{self._total}{eta}  {status}")

    def say(self, text: str) -> None:
        """Print one line above the progress bar."""
        if self._active:
            with suppress(OSError):  # what it prints to may lie on a full disk as well
                self._console.print(text, highlight=False, soft_wrap=True)


def _start_wandb(project: str, folder: Path) -> Any:
    import wandb

    return wandb.init(project=project, dir=str(folder), name=folder.name, resume="allow")
