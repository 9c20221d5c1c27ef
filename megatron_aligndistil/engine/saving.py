"""Saving a run while it goes on: a copy at a step boundary, files by a thread, a name when every rank has written."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_aligndistil.engine import kept
from megatron_aligndistil.engine.checkpoint import take_snapshot
from megatron_aligndistil.engine.optimiser import Trained
from megatron_aligndistil.engine.parallel import on_first_rank
from megatron_aligndistil.engine.snapshot import Part, Snapshot


@dataclass
class _Pending:
    """A checkpoint that is being written, and what this rank's thread has come to."""

    step: int
    snapshots: list[Snapshot]
    progress: dict[str, Any]
    thread: threading.Thread | None = None
    parts: list[Part] | None = None
    problem: str | None = None

    def write(self) -> None:
        try:
            self.parts = [snapshot.write() for snapshot in self.snapshots]
        except BaseException as error:  # told where the checkpoint is finished
            self.problem = explain(error)


class Saver:
    """Writes the checkpoints of a run, one at a time, each complete or absent.

    Every method but `is_writing` is called by all ranks at the same step boundary.

    Arguments:
        folder: where the checkpoints are.
        sources: for each model, the checkpoint that has its description.
        keep: how many of the newest are kept.
        order: by which the best is kept too.
        say: shows a line to the user; called on every rank.
    """

    def __init__(
        self, folder: Path, sources: Mapping[str, str], keep: int, order: kept.Order, say: Callable[[str], None]
    ) -> None:
        self.folder, self.order = folder, order
        self._sources, self._keep, self._say = sources, keep, say
        self._pending: _Pending | None = None

    def clear(self) -> None:
        """Remove what a run that was killed has left half written. Called before the first save."""
        on_first_rank(kept.clear_unfinished, self.folder)

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint waits to be finished; the same on all ranks."""
        return self._pending is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._pending is not None and self._pending.thread is not None and self._pending.thread.is_alive()

    def start(self, step: int, trained: Sequence[Trained], progress: Mapping[str, Any]) -> None:
        """Copy the state of every model and begin to write it; what is being written is finished first.

        Returns when training may go on: neither weights nor optimiser states that change from here on reach the files.
        Nothing is done where the checkpoint of that step is there. `progress` is what JSON can hold.
        """
        self.finish()
        final = self.folder / f"step_{step:06d}"
        if on_first_rank(final.is_dir):
            return
        unfinished = kept.unfinished(self.folder, step)
        problem = on_first_rank(_make_folders, [unfinished / item.name for item in trained])
        if problem:
            self._tell(step, problem)
            return
        snapshots = [take_snapshot(item, unfinished / item.name, self._sources[item.name]) for item in trained]
        pending = _Pending(step, snapshots, {"models": [item.name for item in trained], **progress})
        # A daemon: where training fails, the process ends without waiting for a checkpoint that nobody would finish.
        pending.thread = threading.Thread(target=pending.write, name="checkpoint", daemon=True)
        pending.thread.start()
        self._pending = pending

    def finish(self) -> Path | None:
        """Wait for what is being written and publish it; returns it, or None where nothing was, or it failed.

        Where any rank could not write, its folder is removed and the user told; training may go on.
        Collectives: an object gather and an object broadcast over the world.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        assert pending.thread is not None
        pending.thread.join()
        is_first = dist.get_rank() == 0
        written: list[Any] | None = [None] * dist.get_world_size() if is_first else None
        dist.gather_object((pending.problem, pending.parts), written)
        final, problem = on_first_rank(self._publish, pending, written or [])
        if problem:
            self._tell(pending.step, problem)
        return final

    def _publish(self, pending: _Pending, written: Sequence[Any]) -> tuple[Path | None, str | None]:
        problem = next((problem for problem, _ in written if problem), None)
        final = None
        try:
            if problem is None:
                for index, snapshot in enumerate(pending.snapshots):
                    snapshot.finish([parts[index] for _, parts in written])
                final = kept.publish(self.folder, pending.step, pending.progress)
                with suppress(OSError):  # one that cannot be deleted is tried again with the next
                    kept.drop_old(self.folder, self._keep, self.order)
        except OSError as error:
            problem = explain(error)
        if final is None:
            shutil.rmtree(kept.unfinished(self.folder, pending.step), ignore_errors=True)
        return final, problem

    def _tell(self, step: int, problem: str) -> None:
        previous = on_first_rank(kept.latest, self.folder)
        rest = f"the last complete one is {previous}" if previous else "there is no earlier one"
        self._say(f"the checkpoint of step {step} could not be saved ({problem}); {rest}")

    def evaluated(self, step: int, evaluation: Mapping[str, float]) -> None:
        """Add to the checkpoint of a step, if there is room, what an evaluation found there later."""

        def write() -> None:
            path = self.folder / f"step_{step:06d}"
            with suppress(OSError):
                kept.write_progress(path, {**kept.read_progress(path), "evaluation": dict(evaluation)})
                kept.drop_old(self.folder, self._keep, self.order)

        on_first_rank(write)


def _make_folders(folders: Sequence[Path]) -> str | None:
    """Make the folders of the models of a checkpoint, empty; returns what stands against it."""
    try:
        shutil.rmtree(folders[0].parent, ignore_errors=True)
        for folder in folders:
            folder.mkdir(parents=True)
    except OSError as error:
        return explain(error)
    return None


def explain(error: BaseException) -> str:
    """A line for the user; what the system says, and of which file, where it is the system that refuses."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
