"""Reading records: files, folders and named datasets become plain mappings that know where they came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_aligndistil.data.files import KINDS, Raw, kind_of, raw_json, raw_parquet
from megatron_aligndistil.errors import DataError, RecordError


@dataclass(frozen=True)
class Record:
    """One record as it was read.

    Attributes:
        values: its keys and values; a key without a value (null) is left out.
        where: file and line, or file and record number, for messages.
    """

    values: dict[str, Any]
    where: str


class Source:
    """Records that can be read, once or more, in order, with little of them in memory at a time.

    Attributes:
        identity: what would be another if the records were: paths, sizes and times of change of files, or the
            fingerprint that ``datasets`` gives. Of lists, texts and numbers only.
        num_bytes: how much there is to read, in bytes on disk.
    """

    def __init__(self, identity: Any, num_bytes: int) -> None:
        self.identity = identity
        self.num_bytes = num_bytes
        self._share = 0.0

    @property
    def share(self) -> float:
        """How much of the source has been read, 0 to 1."""
        return self._share

    def __iter__(self) -> Iterator[Raw]:
        raise NotImplementedError


class _Files(Source):
    """Files of one kind, one after another."""

    def __init__(self, files: Sequence[Path], kind: str) -> None:
        states = [file.stat() for file in files]
        self._sizes = [state.st_size for state in states]
        super().__init__(
            [
                [str(file.resolve()), state.st_size, state.st_mtime_ns]
                for file, state in zip(files, states, strict=True)
            ],
            sum(self._sizes),
        )
        self._files, self._kind = files, kind

    def __iter__(self) -> Iterator[Raw]:
        before = 0
        for file, size in zip(self._files, self._sizes, strict=True):
            for raw, share in raw_json(file) if self._kind == "json" else raw_parquet(file):
                self._share = (before + share * size) / max(self.num_bytes, 1)
                yield raw
            before += size


class _Rows(Source):
    """The rows of a dataset that ``datasets`` has opened."""

    def __init__(self, identity: Any, rows: Any, name: str) -> None:
        super().__init__(identity, int(rows.data.nbytes))
        self._rows, self._name = rows, name

    def __iter__(self) -> Iterator[Raw]:
        for number, values in enumerate(self._rows, 1):
            self._share = number / len(self._rows)
            yield Raw(values, f"{self._name} record {number}")


def open_source(source: str) -> Source:
    """Find the records that a name means, without reading them.

    Args:
        source: a JSON, JSONL (also gzipped) or Parquet file; a folder of such files, all of one kind, read in the
            order of their names; a folder written by ``datasets`` (``save_to_disk``); or the name of a dataset that
            ``datasets`` can load, with ``:split`` behind it where the split is not ``train``.

    Lines of JSON and Parquet files are read as they are asked for; a file that is one JSON list is read whole. JSON is
    read here and not through ``datasets``, which turns text that looks like a date into a date, adds every key to
    every record, and names no line when a line is malformed.

    Raises DataError where there is nothing of that name.
    """
    path = Path(source).expanduser()
    if path.is_file():
        kind = kind_of(path)
        if kind is None:
            raise DataError(f"{source} is no data file by its name; known endings: {', '.join(KINDS)}")
        return _Files([path], kind)
    if path.is_dir():
        return _open_folder(path)
    if kind_of(path) or source.startswith(("/", "./", "../", "~")):
        raise DataError(f"there is no data file or folder {source}")
    name, _, split = source.partition(":")
    return _open_named(name, split or "train", source)


def load_records(source: str, max_records: int | None = None) -> Iterator[Record]:
    """The records of `source`, in order, read as they are asked for; see :func:`open_source`.

    Raises DataError, at the record that is wrong, naming file and line; and where nothing can be read at all.
    """
    return map(parse, islice(open_source(source), max_records))


def parse(raw: Raw) -> Record:
    """The record in a line of JSON, or in values that a library has read. Raises RecordError where it is none."""
    values = raw.content
    if isinstance(values, bytes):
        try:
            values = json.loads(values.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RecordError(
                f"{raw.where}: not UTF-8 text: {error.reason} at byte {error.start + 1}; save the file as UTF-8"
            ) from None
        except json.JSONDecodeError as error:
            raise RecordError(f"{raw.where}: not JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of nested lists
            raise RecordError(f"{raw.where}: not JSON that can be read: {error}") from None
    if not isinstance(values, dict):
        raise RecordError(f"{raw.where}: a record is a mapping of keys to values, not {type(values).__name__}")
    return Record({key: value for key, value in values.items() if value is not None}, raw.where)


def _open_folder(folder: Path) -> Source:
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _open_saved(folder)
    files = {path: kind for path in sorted(folder.iterdir()) if path.is_file() and (kind := kind_of(path))}
    kinds = sorted(set(files.values()))
    if len(kinds) > 1:
        raise DataError(
            f"{folder} holds files of several kinds ({', '.join(kinds)}); name one file, or keep one kind in it"
        )
    return _Files(list(files), kinds[0]) if files else _open_named(str(folder), "train", str(folder))


def _open_saved(folder: Path) -> Source:
    datasets = _datasets()
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # `datasets` has no common base for what may be wrong with a folder
        raise DataError(f"{folder} cannot be read by the `datasets` library: {_first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if "train" not in saved:
            raise DataError(f"{folder} has the splits {', '.join(saved)} and no train; name the folder of one split")
        saved = saved["train"]
    files = _Files(sorted(path for path in folder.rglob("*") if path.is_file()), "saved")
    return _Rows(files.identity, saved, str(folder))


def _open_named(name: str, split: str, source: str) -> Source:
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, authorisation, unknown name, unknown split: no common base
        raise DataError(
            f"{source} is neither a file or folder of records nor a dataset that the `datasets` library can load "
            f"(split {split}): {_first_line(error)}"
        ) from error
    return _Rows([name, split, rows._fingerprint], rows, source)


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
