"""Where the processes of a job stand, for people: what each was doing, on which machine, and in which lines."""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_INNERMOST = 5


@dataclass(frozen=True)
class Standing:
    """What one process last said of itself.

    Attributes:
        beat: how often it has said anything.
        marks: how often it has got from one place to another.
        step: the optimiser step that it was in, counted from 1; 0 before the first.
        place: what it was doing.
        host, pid, machine: where it runs; `machine` is equal for processes that see one another's process numbers, and
            empty where that cannot be told.
        left: whether it has done its work.
    """

    beat: int
    marks: int
    step: int
    place: str
    host: str
    pid: int
    machine: str
    left: bool = False

    @classmethod
    def here(cls, beat: int, marks: int, step: int, place: str, left: bool) -> Standing:
        return cls(beat, marks, step, place, socket.gethostname(), os.getpid(), _machine(), left)

    def state(self) -> dict[str, int | str | bool]:
        return asdict(self)

    @property
    def where(self) -> str:
        return f"step {self.step}, {self.place}" if self.step else self.place

    @property
    def has_ended(self) -> bool:
        """Whether the process is known to be no more; never where that would be a guess."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            # One that has ended keeps its number until its parent has asked for it.
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True


@lru_cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot[:8]} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def stack_here() -> str:
    """The innermost lines of this project, of a user's files and of torch.distributed in the main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    names = (
        _line(found.f_code.co_filename, number, found.f_code.co_name) for found, number in traceback.walk_stack(frame)
    )
    return " < ".join([name for name in names if name][:_INNERMOST]) or "no line of this project"


def _line(file: str, number: int, function: str) -> str | None:
    path = Path(file)
    if path.is_relative_to(_PACKAGE):
        return f"{path.relative_to(_PACKAGE)}:{number} {function}"
    if "torch/distributed/" in file and path.name != "c10d_logger.py":  # which wraps every collective
        return f"torch.distributed {function}"
    is_library = any(part in file for part in ("site-packages", "dist-packages", "/lib/python", "<"))
    return None if is_library else f"{path.name}:{number} {function}"


def table(standings: Mapping[int, Standing], stacks: Mapping[int, str]) -> str:
    """A line for all processes that stand at the same place, with the lines of Python below it; the rarest first.

    The one that the others wait for is mostly alone.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for rank, standing in sorted(standings.items()):
        stack = "it has done its work" if standing.left else stacks.get(rank, "no answer")
        groups.setdefault((standing.where, stack), []).append(rank)
    lines = []
    for (where, stack), ranks in sorted(groups.items(), key=lambda item: len(item[1])):
        hosts = sorted({standings[rank].host for rank in ranks})
        shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
        lines += [f"  {_ranks(ranks)} on {shown}: {where}", f"      {stack}"]
    return "\n".join(lines)


def _ranks(ranks: Sequence[int]) -> str:
    """0, 1, 2, 5 as 'ranks 0-2, 5'."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    named = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"
