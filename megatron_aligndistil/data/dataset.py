"""Datasets of tokens, made from a source of records and kept on disk."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_aligndistil.config import DataConfig
from megatron_aligndistil.data.cache import cache_folder, cache_key, cached
from megatron_aligndistil.data.examples import DatasetReport, ExampleMaker
from megatron_aligndistil.data.files import Raw
from megatron_aligndistil.data.forms import DataForm
from megatron_aligndistil.data.progress import ShareProgress
from megatron_aligndistil.data.records import Source, open_source
from megatron_aligndistil.data.token_files import Example, TokenArrays, TokenWriter, fingerprint, lay_out
from megatron_aligndistil.data.tokenizer import Tokenizer
from megatron_aligndistil.data.workers import make_in_processes
from megatron_aligndistil.errors import DataError, RecordError

# Records tokenised together: enough for the tokenizer's threads, and little text in memory at once.
_CHUNK = 512
_CHUNK_BYTES = 4 << 20
_MUCH = 64 << 20  # bytes of records that are worth the start of worker processes
_MOST_WORKERS = 16
# What decides which examples there are, beside the records and the tokenizer.
_SETTINGS = {"max_length", "max_prompt_length", "max_records", "responses", "columns"}
_SKIP = " (data.on_error: skip leaves such records out)"


class TokenDataset:
    """Examples in the order of their records: (row,), or (chosen, rejected) for a preference pair.

    Args:
        examples: all with equally many rows, to be kept in memory; :meth:`of` for what is kept elsewhere.
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        self._arrays = lay_out(list(examples))
        self.fingerprint: str | None = None
        """What tells, where it is known, whether another process has the same examples."""

    @classmethod
    def of(cls, arrays: TokenArrays, meta: dict[str, Any]) -> TokenDataset:
        """The examples in some arrays, with what a writer has found out about them."""
        dataset = cls(())
        dataset._arrays = arrays
        dataset.fingerprint = fingerprint(meta["crc32"].values())
        for name in ("largest_token", "longest_row", "longest_prompt"):
            dataset.__dict__[name] = meta[name]  # where their properties look first
        return dataset

    def __len__(self) -> int:
        return len(self._arrays.lengths)

    def __getitem__(self, index: int) -> Example:
        example = range(len(self))[index]
        return tuple(self._arrays.row(example, place) for place in range(self.rows_per_example))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def rows_per_example(self) -> int:
        """1, or 2 for preference pairs."""
        return int(self._arrays.lengths.shape[1])

    @property
    def row_lengths(self) -> NDArray[np.int32]:
        """int32 [examples, rows_per_example]: tokens of each row, prompt included; reads no tokens."""
        return self._arrays.lengths

    @property
    def uncut_lengths(self) -> NDArray[np.int32]:
        """int32 [examples, rows_per_example]: tokens that each row had before it was truncated."""
        return self._arrays.uncut_lengths

    @cached_property
    def largest_token(self) -> int:
        """The largest token id; -1 where there is none."""
        return int(self._arrays.tokens.max(initial=-1))

    @cached_property
    def longest_row(self) -> int:
        """Tokens of the longest row, prompt included."""
        return int(self._arrays.lengths.max(initial=0))

    @cached_property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return int(self._arrays.prompt_lengths.max(initial=0))


def load_dataset(
    config: DataConfig, source: str, tokenizer: Tokenizer, form: DataForm
) -> tuple[TokenDataset, DatasetReport]:
    """The examples of a source of records, tokenised and truncated now, or at an earlier call and kept on disk.

    Any number of processes may call this at once for the same data: one tokenises (see
    :func:`~megatron_aligndistil.data.cache.cached`) and all map the same files. Records and tokens pass through memory
    a chunk at a time.

    Args:
        config: see :class:`~megatron_aligndistil.data.examples.ExampleMaker`; also where to keep tokens, and in how
            many processes to make them.
        source: what :func:`~megatron_aligndistil.data.records.open_source` reads.
        form: see :class:`~megatron_aligndistil.data.examples.ExampleMaker`.

    Raises DataError where a record cannot be used, naming its place, and where no example is left.
    """
    records = open_source(source)
    settings = config.model_dump(include=_SETTINGS) | {"form": form}
    key = cache_key(records.identity, tokenizer, settings)
    write = partial(_write, records=records, maker=ExampleMaker(tokenizer, config, form), source=source)
    arrays, meta = cached(cache_folder(config.cache), key, write)
    report = DatasetReport(**meta["about"])
    if report.problems and config.on_error == "fail":  # skipped when the tokens were made
        raise RecordError(report.problems[0] + _SKIP)
    return TokenDataset.of(arrays, meta), report


def _write(folder: Path, records: Source, maker: ExampleMaker, source: str) -> None:
    """Tokenise into a folder."""
    chunks = _chunks(itertools.islice(records, maker.config.max_records))
    count = _num_workers(maker.config, records)
    report = DatasetReport()
    with TokenWriter(folder) as writer, ShareProgress(f"tokenise {source}") as progress:
        made = map(maker.make, chunks) if count == 1 else make_in_processes(maker, chunks, count)
        try:
            for arrays, found in made:
                writer.add(arrays)
                report.add(found)
                progress.update(records.share)
        except RecordError as error:
            raise RecordError(f"{error}{_SKIP}") from None
        if not report.examples:
            raise DataError(f"{source} gives no example to work on: {report}")
        writer.finish(asdict(report))


def _num_workers(config: DataConfig, records: Source) -> int:
    if config.workers is not None:
        return config.workers
    if records.num_bytes < _MUCH or config.max_records is not None:
        return 1
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


def _chunks(records: Iterable[Raw]) -> Iterator[Sequence[Raw]]:
    chunk: list[Raw] = []
    size = 0
    for raw in records:
        chunk.append(raw)
        size += len(raw.content) if isinstance(raw.content, bytes) else 0
        if len(chunk) == _CHUNK or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
