"""The checkpoints of a run: which are complete, which is the best, and which go.

A checkpoint is the folder ``step_N``. One that is being written, or deleted, is called ``step_N.partial``: renaming is
one operation of the file system, so that a folder without that ending is always whole, whenever a process dies.
``best`` is a link to the one that an evaluation metric names best.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_aligndistil.engine.manifest import CheckedFile, DamagedCheckpoint, sync

PROGRESS_FILE = "progress.json"
BEST = "best"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Order:
    """Which of two checkpoints is better: the one with the lower or the higher value of a metric of evaluation."""

    metric: str
    highest: bool

    @staticmethod
    def parse(text: str) -> Order:
        """Read ``lowest METRIC`` or ``highest METRIC``."""
        word, _, metric = text.partition(" ")
        return Order(metric, word == "highest")

    def rank(self, checkpoint: Path) -> float | None:
        """A number that is higher for a better checkpoint; None where the metric was not measured at its step."""
        try:
            value = (read_progress(checkpoint).get("evaluation") or {}).get(self.metric)
        except DamagedCheckpoint:
            return None
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return value if self.highest else -value


def step_of(checkpoint: Path) -> int:
    """The number of optimiser steps that a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix("step_"))


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path.parent for path in folder.glob(f"step_*/{PROGRESS_FILE}") if path.parent.suffix != _PARTIAL]
    return sorted(found, key=step_of)


def latest(folder: Path, before: Path | None = None) -> Path | None:
    """The newest complete checkpoint of a run, or the newest older than `before`, if there is one."""
    found = [path for path in complete(folder) if before is None or step_of(path) < step_of(before)]
    return found[-1] if found else None


def best(folder: Path, order: Order) -> Path | None:
    """The best checkpoint, the later one of equals; None where the metric was measured at the step of none."""
    ranked = [(rank, path) for path in complete(folder) if (rank := order.rank(path)) is not None]
    return max(ranked, key=lambda pair: pair[0])[1] if ranked else None


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises DamagedCheckpoint where the file is not what was written."""
    path = checkpoint / PROGRESS_FILE
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
        # Checkpoints of version 0.1 before the checksum have none.
        if progress.pop("crc32", None) in (None, _checksum(progress)) and progress["step"] == step_of(checkpoint):
            return progress
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DamagedCheckpoint(f"{path} is damaged: it is not what was written")


def write_progress(checkpoint: Path, progress: Mapping[str, Any]) -> None:
    """Write what a checkpoint says of itself, in the place of what it said."""
    fresh = checkpoint / f"{PROGRESS_FILE}{_PARTIAL}"
    file = CheckedFile(fresh)
    file.write(json.dumps({**progress, "crc32": _checksum(progress)}).encode())
    file.close()
    fresh.replace(checkpoint / PROGRESS_FILE)


def _checksum(progress: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(progress, sort_keys=True).encode())


def unfinished(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is to be written."""
    return folder / f"step_{step:06d}{_PARTIAL}"


def publish(folder: Path, step: int, progress: Mapping[str, Any]) -> Path:
    """Make a checkpoint whose models have all been written a complete one."""
    partial = unfinished(folder, step)
    write_progress(partial, {"step": step, **progress})
    final = partial.with_suffix("")
    sync(partial)
    partial.rename(final)
    sync(folder)
    return final


def drop_old(folder: Path, keep: int, order: Order) -> None:
    """Delete all but the newest `keep` checkpoints and the best, which gets the name ``best`` beside its own."""
    chosen = best(folder, order)
    if chosen is not None:
        _link(folder / BEST, chosen.name)
    for checkpoint in complete(folder)[:-keep]:
        if checkpoint != chosen:
            partial = checkpoint.with_name(checkpoint.name + _PARTIAL)
            shutil.rmtree(partial, ignore_errors=True)
            checkpoint.rename(partial)
            shutil.rmtree(partial, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Delete what a killed run has left half written."""
    for partial in folder.glob(f"step_*{_PARTIAL}"):
        shutil.rmtree(partial, ignore_errors=True)


def _link(link: Path, target: str) -> None:
    """Point `link` to its neighbour `target`, in one operation. File systems without links go without."""
    fresh = link.with_name(link.name + _PARTIAL)
    try:
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.replace(link)
    except OSError:
        pass
