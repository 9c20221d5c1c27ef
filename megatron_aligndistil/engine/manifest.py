"""Sizes and checksums of a checkpoint's files, so that a damaged one is noticed and named."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch.distributed as dist

from megatron_aligndistil.errors import CheckpointError

FILE = "manifest.json"
_CHUNK = 1 << 24


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, cut short, or is not what was written."""


@dataclass(frozen=True)
class FileRecord:
    """What a file was when it was written: its size in bytes, and its CRC-32 as in zlib."""

    size: int
    crc32: int


class CheckedFile:
    """A file for writing that keeps its checksum; on the disk when `close` returns.

    What cannot be written (a full disk) is raised by `close`, not by `write`: torch's C++ writer, which calls `write`,
    does not survive an exception there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] = path.open("wb")
        self._size = self._crc32 = 0
        self._error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Append; returns the number of bytes."""
        view = memoryview(data).cast("B")
        if self._error is None:
            try:
                self._file.write(view)
            except OSError as error:
                self._error = error
        self._crc32 = zlib.crc32(view, self._crc32)
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing: `close` does it."""

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def close(self) -> FileRecord:
        """Flush to the disk. Raises OSError where any of it could not be written."""
        try:
            if self._error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            self._error = error
        with suppress(OSError):  # what is left in Python's buffer is tried again
            self._file.close()
        if self._error is not None:
            self._error.filename = str(self._path)
            raise self._error
        return FileRecord(self._size, self._crc32)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Write ``manifest.json`` of `folder`, by file name."""
    records = {name: asdict(record) for name, record in sorted(files.items())}
    file = CheckedFile(folder / FILE)
    file.write(json.dumps({"files": records}, indent=1).encode())
    file.close()


def check(folders: Iterable[Path]) -> None:
    """Compare the files of checkpoint folders with their manifests, the work split over all ranks.

    A folder without manifest, as other programs write them, passes. Reads every file once: 0.3 s a GB and process
    beside the reading itself. Collectives: one object gather over the world.

    Raises DamagedCheckpoint on every rank alike, naming the file.
    """
    problem: str | None = None
    try:
        paths = [(path, record) for folder in folders for path, record in _read_manifest(folder)]
        for path, record in paths[dist.get_rank() :: dist.get_world_size()]:
            problem = problem or _problem(path, record)
    except (OSError, DamagedCheckpoint) as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise DamagedCheckpoint(found)


def _read_manifest(folder: Path) -> list[tuple[Path, FileRecord]]:
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return [(folder / name, FileRecord(record["size"], record["crc32"])) for name, record in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint(f"{path} is damaged: it is not the list of files that was written") from None


def _problem(path: Path, record: FileRecord) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != record.size:
        return f"{path} is damaged: it has {size:,} bytes and was written with {record.size:,}"
    crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc32 = zlib.crc32(chunk, crc32)
    return None if crc32 == record.crc32 else f"{path} is damaged: its checksum is not the one it was written with"
