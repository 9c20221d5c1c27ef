"""Examples: one or two rows of tokens each, made from a source of records."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_aligndistil.config import DataConfig
from megatron_aligndistil.data.forms import DataForm, Turns, read_turns
from megatron_aligndistil.data.records import Record, load_records
from megatron_aligndistil.data.tokenizer import Tokenizer
from megatron_aligndistil.data.tokens import Encoder, Row, truncate
from megatron_aligndistil.errors import DataError

Example = tuple[Row, ...]

# Records tokenised together: enough for the tokenizer's threads, and little text in memory at once.
_CHUNK = 1024


class TokenDataset:
    """Examples in the order of their records: (row,), or (chosen, rejected) for a preference pair."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self._examples = list(examples)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    @property
    def rows_per_example(self) -> int:
        """1, or 2 for preference pairs."""
        return len(self._examples[0]) if self._examples else 1


@dataclass
class DatasetReport:
    """What became of the records of a source; counts are of examples unless said.

    Attributes:
        records: records read.
        examples: examples kept.
        empty: left out because a response (of prompts alone: the prompt) holds nothing that a state could predict.
        no_room: left out because the prompt alone fills `max_length`.
        cut_prompts: kept with a prompt that lost its beginning.
        cut_responses: kept with a response that lost its end, and so its end-of-sequence token.
        tokens: tokens kept, prompts included.
    """

    records: int = 0
    examples: int = 0
    empty: int = 0
    no_room: int = 0
    cut_prompts: int = 0
    cut_responses: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        parts = [f"{self.examples:,} examples with {self.tokens:,} tokens in all, from {self.records:,} records"]
        reasons = {
            "left out as empty": self.empty,
            "left out because the prompt fills max_length": self.no_room,
            "with the prompt's beginning cut to max_prompt_length": self.cut_prompts,
            "with a response's end cut to max_length": self.cut_responses,
        }
        return "; ".join(parts + [f"{count:,} {reason}" for reason, count in reasons.items() if count])


def load_dataset(
    config: DataConfig, source: str, tokenizer: Tokenizer, form: DataForm
) -> tuple[TokenDataset, DatasetReport]:
    """Read, tokenise and truncate a source of records.

    Args:
        config: lengths, `max_records`, and which response of a pair is learned where `form` is "responses" ("both"
            makes two examples of a pair, the chosen response's first).
        source: what :func:`~megatron_aligndistil.data.records.load_records` reads.
        form: "responses": (row,); "pairs": (chosen, rejected); "prompts": (row,) that is a prompt only, for generation;
            "unpaired": (row,) rated 1 or 0, a pair making two examples, the chosen response's first.

    Raises DataError where a record cannot be used, naming its place, and where no example is left.
    """
    encoder = Encoder(tokenizer)
    report = DatasetReport()
    examples: list[Example] = []
    for chunk in _chunks(_named(record, config.columns) for record in load_records(source, config.max_records)):
        report.records += len(chunk)
        for example in _encode(chunk, encoder, config, form):
            kept = _fit(example, config, form, report)
            if kept is not None:
                examples.append(kept)
    if not examples:
        raise DataError(f"{source} gives no example to work on: {report}")
    return TokenDataset(examples), report


def _named(record: Record, columns: Mapping[str, str]) -> Record:
    """The record with its columns under our names. Raises DataError where one is not there."""
    missing = [theirs for theirs in columns.values() if theirs not in record.values]
    if missing:
        raise DataError(
            f"{record.where} has no {missing[0]}, which data.columns names; its keys are {', '.join(record.values)}"
        )
    rest = {key: value for key, value in record.values.items() if key not in columns.values()}
    return replace(record, values=rest | {ours: record.values[theirs] for ours, theirs in columns.items()})


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    while chunk := list(itertools.islice(records, _CHUNK)):
        yield chunk


def _encode(chunk: Sequence[Record], encoder: Encoder, config: DataConfig, form: DataForm) -> Iterator[Example]:
    """The examples of some records, tokenised together."""
    selected = [(turns, record.where) for record in chunk for turns in _select(record, config, form)]
    flat = [(turn, where) for turns, where in selected for turn in turns]
    rows = iter(encoder.encode([turn for turn, _ in flat], [where for _, where in flat]))
    for turns, _ in selected:
        yield tuple(itertools.islice(rows, len(turns)))


def _select(record: Record, config: DataConfig, form: DataForm) -> Sequence[Turns]:
    """The examples that a record makes, as turns."""
    turns = read_turns(record, form)
    if form == "pairs" or len(turns) == 1:
        return [turns]
    if form == "unpaired":
        return [(turn,) for turn in turns]
    chosen, rejected = turns
    return {"chosen": [(chosen,)], "rejected": [(rejected,)], "both": [(chosen,), (rejected,)]}[config.responses]


def _fit(example: Example, config: DataConfig, form: DataForm, report: DatasetReport) -> Example | None:
    """The example within the limits of length, or None where nothing to work on is left; counted either way."""
    alone = form == "prompts"
    if any(not (len(row.tokens) if alone else row.num_targets) for row in example):
        report.empty += 1
        return None
    # How long a response to a lone prompt may become is for the generation to say.
    max_length = config.max_prompt_length if alone else config.max_length
    kept = tuple(truncate(row, max_prompt_length=config.max_prompt_length, max_length=max_length) for row in example)
    if not alone and any(not row.num_targets for row in kept):
        report.no_room += 1
        return None
    report.examples += 1
    report.tokens += sum(len(row.tokens) for row in kept)
    report.cut_prompts += any(new.prompt_length < old.prompt_length for new, old in zip(kept, example, strict=True))
    report.cut_responses += any(new.num_targets < old.num_targets for new, old in zip(kept, example, strict=True))
    return kept
