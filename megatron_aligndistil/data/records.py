"""Reading records: files, folders and named datasets become plain mappings that know where they came from."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from megatron_aligndistil.errors import DataError

_SUFFIXES = {
    ".json": "json",
    ".jsonl": "json",
    ".json.gz": "json",
    ".jsonl.gz": "json",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Record:
    """One record as it was read.

    Attributes:
        values: its keys and values; a key without a value (null) is left out.
        where: file and line, or file and record number, for messages.
    """

    values: dict[str, Any]
    where: str


def load_records(source: str, max_records: int | None = None) -> Iterator[Record]:
    """The records of `source`, in order, read as they are asked for.

    Args:
        source: a JSON, JSONL (also gzipped) or Parquet file; a folder of such files, all of one kind, read in the
            order of their names; a folder written by ``datasets`` (``save_to_disk``); or the name of a dataset that
            ``datasets`` can load, with ``:split`` behind it where the split is not ``train``.
        max_records: stop after so many.

    JSON is read here and not through ``datasets``, which turns text that looks like a date into a date, adds every key
    to every record, and names no line when a line is malformed.

    Raises DataError, at the record that is wrong, naming file and line; and where nothing can be read at all.
    """
    return islice(_read(source), max_records)


def _read(source: str) -> Iterator[Record]:
    path = Path(source).expanduser()
    if path.is_file():
        kind = _kind(path)
        if kind is None:
            raise DataError(f"{source} is no data file by its name; known endings: {', '.join(_SUFFIXES)}")
        yield from _read_file(path, kind)
    elif path.is_dir():
        yield from _read_folder(path)
    elif _kind(path) or source.startswith(("/", "./", "../", "~")):
        raise DataError(f"there is no data file or folder {source}")
    else:
        name, _, split = source.partition(":")
        yield from _read_named(name, split or "train", source)


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), None)


def _read_folder(folder: Path) -> Iterator[Record]:
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        yield from _read_saved(folder)
        return
    files = {path: kind for path in sorted(folder.iterdir()) if path.is_file() and (kind := _kind(path))}
    kinds = sorted(set(files.values()))
    if len(kinds) > 1:
        raise DataError(
            f"{folder} holds files of several kinds ({', '.join(kinds)}); name one file, or keep one kind in it"
        )
    if not files:
        yield from _read_named(str(folder), "train", str(folder))
    for path, kind in files.items():
        yield from _read_file(path, kind)


def _read_file(path: Path, kind: str) -> Iterator[Record]:
    yield from _read_json(path) if kind == "json" else _read_parquet(path)


def _read_json(path: Path) -> Iterator[Record]:
    """A JSON list of records, or one record a line, whatever the file's ending says."""
    try:
        with _open_text(path) as file:
            first = next((line.lstrip()[:1] for line in file if not line.isspace()), "")
            file.seek(0)
            yield from _json_list(file, path) if first == "[" else _json_lines(file, path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _open_text(path: Path) -> IO[str]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _json_lines(file: IO[str], path: Path) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        where = f"{path} line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
        yield _record(values, where)


def _json_list(file: IO[str], path: Path) -> Iterator[Record]:
    try:
        items = json.load(file)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    for number, values in enumerate(items, 1):
        yield _record(values, f"{path} record {number}")


def _read_parquet(path: Path) -> Iterator[Record]:
    datasets = _datasets()
    try:
        # Streamed: otherwise `datasets` first writes a copy of the file to its cache, once for every process.
        rows = datasets.load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)
        for number, values in enumerate(rows, 1):
            yield _record(values, f"{path} record {number}")
    except DataError:
        raise
    except Exception as error:  # whatever pyarrow or `datasets` finds wrong with the file
        raise DataError(f"{path} cannot be read as Parquet: {_first_line(error)}") from error


def _read_saved(folder: Path) -> Iterator[Record]:
    datasets = _datasets()
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # `datasets` has no common base for what may be wrong with a folder
        raise DataError(f"{folder} cannot be read by the `datasets` library: {_first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if "train" not in saved:
            raise DataError(f"{folder} has the splits {', '.join(saved)} and no train; name the folder of one split")
        saved = saved["train"]
    for number, values in enumerate(saved, 1):
        yield _record(values, f"{folder} record {number}")


def _read_named(name: str, split: str, source: str) -> Iterator[Record]:
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, authorisation, unknown name, unknown split: no common base
        raise DataError(
            f"{source} is neither a file or folder of records nor a dataset that the `datasets` library can load "
            f"(split {split}): {_first_line(error)}"
        ) from error
    for number, values in enumerate(rows, 1):
        yield _record(values, f"{source} record {number}")


def _record(values: Any, where: str) -> Record:
    if not isinstance(values, dict):
        raise DataError(f"{where}: a record is a mapping of keys to values, not {type(values).__name__}")
    return Record({key: value for key, value in values.items() if value is not None}, where)


def _datasets() -> Any:
    """The `datasets` library, quiet. Imported here because that takes seconds."""
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # it announces every attempt to reach the network
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    return datasets


def _first_line(error: Exception) -> str:
    text = str(error.__cause__ or error).strip() or type(error).__name__
    return text.splitlines()[0]
