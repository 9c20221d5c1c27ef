"""How far the asking is: a bar with ETA and token counts on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console

from megatron_aligndistil.data.progress import counting_bar
from megatron_aligndistil.suites.asks import Reply

_SECONDS_BETWEEN_LINES = 5.0  # without a terminal


class AskingProgress:
    """Counts replies and their tokens.

    Args:
        title: what is being asked.
        total: replies wanted.
        done: replies that are there already, from a run before.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._console = Console(stderr=True)
        self._title, self._total, self._done, self._before = title, total, done, done
        self._prompt_tokens = self._completion_tokens = 0
        self._began = time.monotonic()
        self._next_line, self._last_line = 0.1, self._began
        self._bar = counting_bar(title, self._console, "tokens")
        self._task = self._bar.add_task(title, total=total, completed=done, tokens="")

    def __enter__(self) -> AskingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def add(self, reply: Reply) -> None:
        """One more reply."""
        self._done += 1
        self._prompt_tokens += reply.prompt_tokens
        self._completion_tokens += reply.completion_tokens
        tokens = f"{self._prompt_tokens:,} prompt + {self._completion_tokens:,} completion tokens"
        self._bar.update(self._task, completed=self._done, tokens=tokens)
        share = self._done / max(self._total, 1)
        now = time.monotonic()
        due = share >= self._next_line and now >= self._last_line + _SECONDS_BETWEEN_LINES
        if not self._console.is_terminal and (due or self._done == self._total):
            self._next_line, self._last_line = share + 0.1, now
            each = (now - self._began) / (self._done - self._before)
            left = self._total - self._done
            eta = f", eta {each * left:.0f} s" if left else ""
            self._console.print(
                f"{self._title} {self._done}/{self._total}{eta}, {tokens}", highlight=False, soft_wrap=True
            )
