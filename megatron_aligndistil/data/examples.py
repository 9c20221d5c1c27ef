"""Examples: one or two rows of tokens each, made from records, kept or left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Literal

from megatron_aligndistil.config import DataConfig
from megatron_aligndistil.data.files import Raw
from megatron_aligndistil.data.forms import DataForm, Turns, read_turns
from megatron_aligndistil.data.records import Record, parse
from megatron_aligndistil.data.token_files import Example, TokenArrays, lay_out
from megatron_aligndistil.data.tokenizer import Tokenizer
from megatron_aligndistil.data.tokens import Encoder, Row, truncate
from megatron_aligndistil.errors import RecordError

Reason = Literal["empty", "no_room"]
_NAMED = 5  # malformed records that a report names


@dataclass
class DatasetReport:
    """What became of the records of a source; counts are of examples unless said.

    Attributes:
        records: records read.
        examples: examples kept.
        malformed: records left out because they cannot be read (`data.on_error: skip`).
        empty: left out because a response (of prompts alone: the prompt) holds nothing that a state could predict.
        no_room: left out because the prompt alone fills `max_length`.
        cut_prompts: kept with a prompt that lost its beginning.
        cut_responses: kept with a response that lost its end, and so its end-of-sequence token.
        tokens: tokens kept, prompts included.
        problems: what is wrong with the first malformed records, a sentence each.
    """

    records: int = 0
    examples: int = 0
    malformed: int = 0
    empty: int = 0
    no_room: int = 0
    cut_prompts: int = 0
    cut_responses: int = 0
    tokens: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, other: DatasetReport) -> None:
        """Count what became of more records."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        del self.problems[_NAMED:]

    def __str__(self) -> str:
        parts = [f"{self.examples:,} examples with {self.tokens:,} tokens in all, from {self.records:,} records"]
        reasons = {
            "left out as empty": self.empty,
            "left out because the prompt fills max_length": self.no_room,
            "with the prompt's beginning cut to max_prompt_length": self.cut_prompts,
            "with a response's end cut to max_length": self.cut_responses,
            "malformed records left out": self.malformed,
        }
        text = "; ".join(parts + [f"{count:,} {reason}" for reason, count in reasons.items() if count])
        if not self.problems:
            return text
        first = ", the first of which are" if self.malformed > len(self.problems) else ""
        return "\n  ".join([text + first + ":", *self.problems])


@dataclass(frozen=True)
class Fitted:
    """An example and what is left of it within the limits of length.

    Attributes:
        whole: the rows before anything is cut.
        kept: the rows that are learned on; None where the example is left out.
        reason: why it is left out.
    """

    whole: Example
    kept: Example | None
    reason: Reason | None = None


@dataclass(frozen=True)
class ExampleMaker:
    """Records -> examples, for one tokenizer and one form.

    Attributes:
        config: lengths, which response of a pair is learned where `form` is "responses" ("both" makes two examples of a
            pair, the chosen response's first), names of columns, and what a malformed record does.
        form: "responses": (row,); "pairs": (chosen, rejected); "prompts": (row,) that is a prompt only, for generation;
            "unpaired": (row,) rated 1 or 0, a pair making two examples, the chosen response's first.
    """

    tokenizer: Tokenizer
    config: DataConfig
    form: DataForm

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    def make(self, chunk: Sequence[Raw]) -> tuple[TokenArrays, DatasetReport]:
        """The examples that are kept of some records, and what became of the others.

        Raises RecordError at the first malformed record, unless these are to be skipped.
        """
        report = DatasetReport()
        kept: list[Fitted] = []
        for outcome in self.examples(chunk):
            report.records += 1
            if isinstance(outcome, RecordError):
                if self.config.on_error == "fail":
                    raise outcome
                report.add(DatasetReport(malformed=1, problems=[str(outcome)]))
                continue
            for fitted in outcome:
                self._count(fitted, report)
                if fitted.kept is not None:
                    kept.append(fitted)
        uncut = [[len(row.tokens) for row in fitted.whole] for fitted in kept]
        return lay_out([fitted.kept for fitted in kept if fitted.kept is not None], uncut), report

    def examples(self, chunk: Sequence[Raw]) -> Iterator[list[Fitted] | RecordError]:
        """The examples of each record, or what is wrong with it; tokenised together."""
        selected = [self._read(raw) for raw in chunk]
        flat = [
            (turn, raw.where)
            for raw, examples in zip(chunk, selected, strict=True)
            if not isinstance(examples, RecordError)
            for turns in examples
            for turn in turns
        ]
        rows = iter(self._encoder.try_encode([turn for turn, _ in flat], [where for _, where in flat]))
        for examples in selected:
            yield examples if isinstance(examples, RecordError) else self._take(examples, rows)

    def _read(self, raw: Raw) -> Sequence[Turns] | RecordError:
        """The examples that a record makes, as turns."""
        try:
            turns = read_turns(named(parse(raw), self.config.columns), self.form)
        except RecordError as error:
            return error
        if self.form == "pairs" or len(turns) == 1:
            return [turns]
        if self.form == "unpaired":
            return [(turn,) for turn in turns]
        chosen, rejected = turns
        return {"chosen": [(chosen,)], "rejected": [(rejected,)], "both": [(chosen,), (rejected,)]}[
            self.config.responses
        ]

    def _take(self, examples: Sequence[Turns], rows: Iterator[Row | RecordError]) -> list[Fitted] | RecordError:
        """The next rows, for the turns of one record."""
        found: list[Fitted] = []
        problem: RecordError | None = None
        for turns in examples:
            example: list[Row] = []
            for row in itertools.islice(rows, len(turns)):
                if isinstance(row, RecordError):
                    problem = problem or row
                else:
                    example.append(row)
            if problem is None:
                found.append(self.fit(tuple(example)))
        return problem or found

    def fit(self, example: Example) -> Fitted:
        """The example within the limits of length."""
        alone = self.form == "prompts"
        if any(not (len(row.tokens) if alone else row.num_targets) for row in example):
            return Fitted(example, None, "empty")
        # How long a response to a lone prompt may become is for the generation to say.
        max_prompt_length = self.config.max_prompt_length
        max_length = max_prompt_length if alone else self.config.max_length
        kept = tuple(truncate(row, max_prompt_length=max_prompt_length, max_length=max_length) for row in example)
        if not alone and any(not row.num_targets for row in kept):
            return Fitted(example, None, "no_room")
        return Fitted(example, kept)

    def _count(self, fitted: Fitted, report: DatasetReport) -> None:
        if fitted.kept is None:
            report.empty += fitted.reason == "empty"
            report.no_room += fitted.reason == "no_room"
            return
        pairs = list(zip(fitted.kept, fitted.whole, strict=True))
        report.examples += 1
        report.tokens += sum(len(row.tokens) for row in fitted.kept)
        report.cut_prompts += any(new.prompt_length < old.prompt_length for new, old in pairs)
        report.cut_responses += any(new.num_targets < old.num_targets for new, old in pairs)


def named(record: Record, columns: Mapping[str, str]) -> Record:
    """The record with its columns under our names. Raises RecordError where one is not there."""
    missing = [theirs for theirs in columns.values() if theirs not in record.values]
    if missing:
        raise RecordError(
            f"{record.where} has no {missing[0]}, which data.columns names; its keys are {', '.join(record.values)}"
        )
    rest = {key: value for key, value in record.values.items() if key not in columns.values()}
    return replace(record, values=rest | {ours: record.values[theirs] for ours, theirs in columns.items()})
