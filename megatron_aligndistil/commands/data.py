"""``aligndistil data inspect``: records as the model will see them, and what becomes of a whole file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from megatron_aligndistil import algorithms
from megatron_aligndistil.commands.options import describe, take, wants_help
from megatron_aligndistil.config import DataConfig, Section, build, merge, parse_overrides, read_yaml
from megatron_aligndistil.errors import ConfigError, DataError, RecordError

_USAGE = """usage: aligndistil data inspect --data FILE --model FOLDER [--index I] [--rows N] [--KEY VALUE ...]
       aligndistil data inspect --config RUN.yaml [--data FILE] [--index I] [--rows N] [--KEY VALUE ...]

Shows records as rows of tokens, the prompt, the response, what is cut off and the padding apart; then how many records
of the whole file are used, what is left out and why, and how long rows are. With --config, the data, the tokenizer and
the form are those of a training run.
"""


class InspectConfig(Section):
    model: str
    """Folder with the tokenizer: a Hugging Face folder or a checkpoint."""
    form: Literal["pairs", "responses", "prompts", "unpaired"] | None = None
    """What records are read as; by the first record, when not given."""
    index: int = Field(0, ge=0)
    """The first record to show, counted from 0."""
    rows: int = Field(3, ge=0)
    """How many records to show."""
    html: str | None = None
    """HTML file to write what is shown to as well."""
    data: DataConfig


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if wants_help(arguments):
        print(_USAGE + "\nkeys:\n" + describe(InspectConfig))
        return 0
    if arguments[:1] != ["inspect"]:
        raise ConfigError("data has one command: aligndistil data inspect --data FILE --model FOLDER")
    inspect(_parse(arguments[1:]))
    return 0


def _parse(arguments: list[str]) -> InspectConfig:
    path, rest = take(arguments, "--config")
    source, rest = take(rest, "--data")
    values = _of_run(read_yaml(path)) if path else {}
    # What is wrong with records is to be seen, unless it is asked for otherwise.
    values = merge({"data": {"on_error": "skip"}}, values)
    values = merge(values, {"data": {"train": source}} if source else {})
    return build(InspectConfig, merge(values, parse_overrides(rest)))


def _of_run(config: dict[str, Any]) -> dict[str, Any]:
    """What the configuration of a training run says of its data."""
    values: dict[str, Any] = {
        "data": {key: value for key, value in config.get("data", {}).items() if key != "on_error"}
    }
    if "policy" in config.get("models", {}):
        values["model"] = config["models"]["policy"]
    if "name" in config.get("algorithm", {}):
        values["form"] = algorithms.build(config["algorithm"]).data
    return values


def inspect(config: InspectConfig) -> None:
    """Print some records, and what becomes of all."""
    from rich.console import Console

    from megatron_aligndistil.data.dataset import load_dataset
    from megatron_aligndistil.data.examples import ExampleMaker
    from megatron_aligndistil.data.row_view import RowView, print_lengths
    from megatron_aligndistil.data.tokenizer import has_tokenizer, load_tokenizer

    folder: Any = config.model
    if not has_tokenizer(folder):
        from megatron_aligndistil.engine.checkpoint import description_folder

        folder = description_folder(config.model)
    tokenizer = load_tokenizer(folder)
    source = config.data.train
    form = config.form or _form_of(source, config.data)
    # A pipe has no width of its own.
    console = Console(record=True, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(record=True, highlight=False, width=120)
    console.print(f"{source}, read as {form}", style="bold", markup=False)
    _show(RowView(console, tokenizer, form), ExampleMaker(tokenizer, config.data, form), config)
    dataset, report = load_dataset(config.data, source, tokenizer, form)
    console.print(f"\n{report}", markup=False)
    print_lengths(console, dataset, config.data.max_length)
    if config.html:
        console.save_html(config.html)
        console.print(f"wrote {config.html}", markup=False)


def _form_of(source: str, config: DataConfig) -> Literal["pairs", "responses", "prompts", "unpaired"]:
    """The first form that the first record that can be read has."""
    from itertools import islice

    from megatron_aligndistil.data.examples import named
    from megatron_aligndistil.data.forms import DataForm, read_turns
    from megatron_aligndistil.data.records import open_source, parse

    forms: tuple[DataForm, ...] = ("pairs", "unpaired", "responses", "prompts")
    problem: RecordError | None = None
    for raw in islice(open_source(source), 100):
        for form in forms:
            try:
                read_turns(named(parse(raw), config.columns), form)
            except RecordError as error:
                problem = problem or error
            else:
                return form
    raise problem or DataError(f"{source} holds no records")


def _show(view: Any, maker: Any, config: InspectConfig) -> None:
    """Show by a RowView what an ExampleMaker makes of `config.rows` records from `config.index` on."""
    from itertools import islice

    from megatron_aligndistil.data.records import open_source

    if not config.rows:
        return
    raws = list(islice(open_source(config.data.train), config.index, config.index + config.rows))
    if not raws:
        raise DataError(f"{config.data.train} has no record {config.index}; --index counts from 0")
    for raw, outcome in zip(raws, maker.examples(raws), strict=True):
        view.record(raw.where, outcome)
