"""Tokens of many rows as flat arrays: in memory, or in files that are mapped into memory."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron_aligndistil.data.tokens import Row

Example = tuple[Row, ...]

_DTYPES: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype("<i4"),
    "starts": np.dtype("<i8"),
    "lengths": np.dtype("<i4"),
    "prompt_lengths": np.dtype("<i4"),
    "uncut_lengths": np.dtype("<i4"),
    "ratings": np.dtype("<f4"),
}
_META = "meta.json"
_BLOCK = 1 << 20  # bytes read at a time where a file is checked


@dataclass(frozen=True)
class TokenArrays:
    """Rows of E examples, R rows each, one behind another: the first example's rows, then the second's.

    Attributes:
        tokens: int32 [N], of all rows.
        starts: int64 [E, R], where in `tokens` a row begins.
        lengths: int32 [E, R], tokens of a row.
        prompt_lengths: int32 [E, R], how many of them are the prompt.
        uncut_lengths: int32 [E, R], tokens that the row had before it was truncated.
        ratings: float32 [E, R], NaN where a row has none.
    """

    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    prompt_lengths: NDArray[np.int32]
    uncut_lengths: NDArray[np.int32]
    ratings: NDArray[np.float32]

    def row(self, example: int, place: int) -> Row:
        """One row; its tokens are a view that cannot be written to."""
        start, length = int(self.starts[example, place]), int(self.lengths[example, place])
        rating = float(self.ratings[example, place])
        return Row(
            self.tokens[start : start + length],
            int(self.prompt_lengths[example, place]),
            None if np.isnan(rating) else rating,
        )


def lay_out(examples: Sequence[Example], uncut_lengths: Sequence[Sequence[int]] | None = None) -> TokenArrays:
    """The arrays of some examples, all of equally many rows, in memory.

    `uncut_lengths` says for each row how many tokens it had; as many as it has, where not given.
    """
    shape = len(examples), len(examples[0]) if examples else 1
    rows = [row for example in examples for row in example]
    assert all(row.logprobs is None for row in rows), "sampled responses are not kept here"
    lengths = np.array([len(row.tokens) for row in rows], np.int32).reshape(shape)
    ends = np.cumsum(lengths, dtype=np.int64).reshape(shape)
    ratings = [np.nan if row.rating is None else row.rating for row in rows]
    tokens = np.concatenate([np.zeros(0, np.int32), *(row.tokens for row in rows)]).astype(np.int32)
    tokens.flags.writeable = False
    return TokenArrays(
        tokens=tokens,
        starts=ends - lengths,
        lengths=lengths,
        prompt_lengths=np.array([row.prompt_length for row in rows], np.int32).reshape(shape),
        uncut_lengths=lengths if uncut_lengths is None else np.array(uncut_lengths, np.int32).reshape(shape),
        ratings=np.array(ratings, np.float32).reshape(shape),
    )


class TokenWriter:
    """Writes arrays to a folder piece by piece; the folder can be opened once :meth:`finish` has returned."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        self._checksums = dict.fromkeys(_DTYPES, 0)
        self._examples, self._rows_per_example, self._tokens = 0, 1, 0
        self.largest_token, self.longest_row, self.longest_prompt = -1, 0, 0

    def __enter__(self) -> TokenWriter:
        for name in _DTYPES:
            self._files[name] = self._stack.enter_context((self._folder / f"{name}.bin").open("wb"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, arrays: TokenArrays) -> None:
        """Put more examples behind those that are there."""
        if not len(arrays.lengths):
            return
        for name, dtype in _DTYPES.items():
            values = getattr(arrays, name) + (self._tokens if name == "starts" else 0)
            content = np.ascontiguousarray(values, dtype).tobytes()
            self._files[name].write(content)
            self._checksums[name] = zlib.crc32(content, self._checksums[name])
        self._examples += len(arrays.lengths)
        self._rows_per_example = arrays.lengths.shape[1]
        self._tokens += len(arrays.tokens)
        self.largest_token = max(self.largest_token, int(arrays.tokens.max(initial=-1)))
        self.longest_row = max(self.longest_row, int(arrays.lengths.max()))
        self.longest_prompt = max(self.longest_prompt, int(arrays.prompt_lengths.max()))

    def finish(self, about: dict[str, Any]) -> None:
        """Put everything on the disk, with `about` (JSON values) beside the arrays."""
        sizes = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name] = file.tell()
        meta = {
            "shape": [self._examples, self._rows_per_example],
            "bytes": sizes,
            "crc32": self._checksums,
            "largest_token": self.largest_token,
            "longest_row": self.longest_row,
            "longest_prompt": self.longest_prompt,
        }
        with (self._folder / _META).open("w", encoding="utf-8") as out:
            json.dump(meta | {"about": about}, out, indent=1)
            out.flush()
            os.fsync(out.fileno())


def open_arrays(folder: Path) -> tuple[TokenArrays, dict[str, Any]] | None:
    """Map the arrays that a :class:`TokenWriter` has written, with what it says about them; None where any is damaged.

    Every file is read once, to compare its checksum.
    """
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        whole = all(
            (folder / f"{name}.bin").stat().st_size == meta["bytes"][name]
            and _checksum(folder / f"{name}.bin") == meta["crc32"][name]
            for name in _DTYPES
        )
        if not whole:
            return None
        shape = tuple(meta["shape"])
        arrays = {name: _mapped(folder / f"{name}.bin", dtype) for name, dtype in _DTYPES.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    rows = {name: array.reshape(shape) for name, array in arrays.items() if name != "tokens"}
    return TokenArrays(tokens=arrays["tokens"], **rows), meta


def fingerprint(checksums: Iterable[int]) -> str:
    """A short text that is another where the checksums are."""
    return "".join(f"{checksum:08x}" for checksum in checksums)


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    # As a plain array: slices of numpy's memmap type are slow to make.
    return np.asarray(np.memmap(path, dtype, "r"))


def _checksum(path: Path) -> int:
    found, block = 0, bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            found = zlib.crc32(memoryview(block)[:size], found)
    return found
