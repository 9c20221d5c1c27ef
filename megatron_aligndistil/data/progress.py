"""What a user sees of work that may be long: how much is done, and an ETA."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_SILENT = 3.0  # seconds of work about which nothing is said
_BETWEEN = 30.0  # seconds between lines where there is no terminal


def counting_bar(title: str, console: Console, field: str) -> Progress:
    """A bar with ETA for work that is counted, on terminals only; its tasks have a text `field`, shown at the end."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn(title, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn(f"{{task.fields[{field}]}}"),
        console=console,
        disable=not console.is_terminal,
    )


class ShareProgress:
    """For work of which only a share is known: a bar with ETA on a terminal, else a line now and then, on stderr.

    Nothing for what takes a few seconds.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._began = time.monotonic()
        self._next = self._began + _SILENT

    def __enter__(self) -> ShareProgress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Eta

        columns = (TextColumn(self._title, markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("eta"), Eta(), console=Console(stderr=True))
        self._terminal = self._bar.console.is_terminal
        self._task = self._bar.add_task("", total=1.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal:  # elsewhere it was never begun, and would end in an empty line
            self._bar.stop()

    def update(self, share: float) -> None:
        """Say that a share of the work, 0 to 1, is done."""
        self._bar.update(self._task, completed=share)
        now = time.monotonic()
        if now < self._next:
            return
        if self._terminal:
            self._bar.start()
            return
        eta = (now - self._began) * (1 - share) / max(share, 1e-6)
        print(f"{self._title}: {share:.0%}, eta {eta:,.0f} s", file=sys.stderr, flush=True)
        self._next = now + _BETWEEN
