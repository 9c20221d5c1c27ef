"""Files of records, read a record at a time and not yet looked into."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from megatron_aligndistil.errors import DataError

# Endings of names, and what they hold.
KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".json.gz": "json",
    ".jsonl.gz": "json",
    ".parquet": "parquet",
}
_ROWS = 256  # of a Parquet file, turned into Python values at a time


@dataclass(frozen=True)
class Raw:
    """What a file holds in the place of a record.

    Attributes:
        content: a line, as bytes, or what a library has read: a mapping if it is a record.
        where: file and line, or file and record number, for messages.
    """

    content: Any
    where: str


def kind_of(path: Path) -> str | None:
    """What a file holds by its name; None where its ending says nothing."""
    name = path.name.lower()
    return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), None)


def raw_json(path: Path) -> Iterator[tuple[Raw, float]]:
    """A JSON list of records, or one record a line, whatever the file's ending says.

    Each comes with the share of the file that has been read. Raises DataError where the file cannot be read, is no
    UTF-8 text from its beginning on, or is a list that is not whole. A line is not looked into.
    """
    size = max(path.stat().st_size, 1)
    try:
        with path.open("rb") as packed, _unpacked(packed, path) as file:
            if _is_list(file, path):
                yield from ((raw, 1.0) for raw in _list(file.read(), path))
                return
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield Raw(line.rstrip(b"\r\n"), f"{path} line {number}"), packed.tell() / size
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


@contextmanager
def _unpacked(file: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    if path.name.lower().endswith(".gz"):
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield cast("IO[bytes]", unpacked)
    else:
        yield file


def _is_list(file: IO[bytes], path: Path) -> bool:
    """Whether the first character is a bracket; goes back to the beginning of the text, behind a byte order mark."""
    start = file.read(4)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} is UTF-16 text; save it as UTF-8, as in: iconv -f UTF-16 -t UTF-8")
    begin = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
    first = start[begin:].lstrip()
    while not first and (more := file.read(4096)):
        first = more.lstrip()
    file.seek(begin)
    return first[:1] == b"["


def _list(content: bytes, path: Path) -> Iterator[Raw]:
    try:
        items = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}: not UTF-8 text: {error.reason}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of nested lists
        raise DataError(f"{path}: not JSON that can be read: {error}") from None
    for number, values in enumerate(items, 1):
        yield Raw(values, f"{path} record {number}")


def raw_parquet(path: Path) -> Iterator[tuple[Raw, float]]:
    """The rows of a Parquet file, each with the share of the file that has been read. Raises DataError."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            total, number = file.metadata.num_rows, 0
            for batch in file.iter_batches(_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Raw(values, f"{path} record {number}"), number / total
    except (ArrowException, OSError) as error:
        text = str(error).strip() or type(error).__name__
        raise DataError(f"{path} cannot be read as Parquet: {text.splitlines()[0]}") from error
