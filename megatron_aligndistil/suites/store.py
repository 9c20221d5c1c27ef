"""Replies on disk, one JSON object a line, written as they come: what was asked once is not asked again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from megatron_aligndistil.errors import DataError
from megatron_aligndistil.suites.asks import Ask, Reply


class Store:
    """Replies of one model or judge to the requests of one suite.

    Each line holds the request whole, the reply whole, and a fingerprint of model and request. A line that a killed
    process left unfinished is cut off before anything is added.

    Args:
        path: the file; its folder is made.
        model: what answers; part of each fingerprint.
        part: a name that keeps the lines of one of several writing processes in a file of their own, beside `path`.
    """

    def __init__(self, path: Path, model: str, part: str = "") -> None:
        self.path, self._model = path, model
        self._target = path.with_name(f"{path.stem}.{part}{path.suffix}") if part else path
        self._file: IO[str] | None = None
        self._replies: dict[str, Reply] = {}
        for file in [path, *sorted(path.parent.glob(f"{path.stem}.*{path.suffix}"))]:
            for record in _records(file):
                self._replies[record["fingerprint"]] = Reply.from_json(record["reply"])

    def get(self, ask: Ask) -> Reply | None:
        """The stored reply to this very request, if there is one."""
        return self._replies.get(ask.fingerprint(self._model))

    def known(self, asks: Iterable[Ask]) -> dict[str, Reply]:
        """Stored replies by the requests' ids."""
        return {ask.id: reply for ask in asks if (reply := self.get(ask)) is not None}

    def add(self, ask: Ask, reply: Reply) -> None:
        """Write a reply; it is on its way to the disk when this returns."""
        fingerprint = ask.fingerprint(self._model)
        record = {"id": ask.id, "model": self._model, "fingerprint": fingerprint}
        line = json.dumps({**record, "ask": asdict(ask), "reply": asdict(reply)}, ensure_ascii=False)
        if self._file is None:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            _heal(self._target)
            self._file = self._target.open("a", encoding="utf-8")
        self._file.write(line + "\n")
        self._file.flush()
        self._replies[fingerprint] = reply

    def close(self) -> None:
        """Let go of the file; a later `add` takes it up again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _heal(path: Path) -> None:
    """Cut off what stands behind the last end of a line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            os.fsync(file.fileno())


def _records(path: Path) -> Iterable[dict[str, Any]]:
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            return  # torn; healed when the next reply is written
        try:
            record = json.loads(line)
            Reply.from_json(record["reply"])
            record["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} line {number} is no stored reply; mend the line, or delete it") from error
        yield record
