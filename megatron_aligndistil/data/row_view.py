"""Rows of tokens as a reader sees them: which are the prompt, the response, cut off, and padding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_aligndistil.data.dataset import TokenDataset
from megatron_aligndistil.data.examples import Fitted
from megatron_aligndistil.data.tokenizer import pad_id, special_ids
from megatron_aligndistil.data.tokens import Row
from megatron_aligndistil.errors import RecordError

# Two shades each, taken in turns, so that it is seen where a token ends.
_SHADES = {
    "prompt": ("blue", "cyan"),
    "response": ("green", "yellow"),
    "cut off": ("red", "magenta"),
    "padding": ("bright_black", "bright_black"),
}
_VISIBLE = {" ": "·", "\t": "→\t", "\n": "↵\n", "\r": "␍"}
_REASONS = {
    "empty": "left out: a response is empty",
    "no_room": "left out: the prompt alone fills data.max_length",
}


class RowView:
    """Prints records; without colour, bars stand between tokens."""

    def __init__(self, console: Console, tokenizer: Any, form: str) -> None:
        self._console, self._tokenizer, self._form = console, tokenizer, form
        self._special = special_ids(tokenizer)
        self._pad = pad_id(tokenizer)
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._before = len(tokenizer.decode(self._anchor))
        self._piece = cache(self._read)

    def record(self, where: str, outcome: Sequence[Fitted] | RecordError) -> None:
        """Print the rows of a record, padded to the longest of them, or what is wrong with it."""
        self._console.print()
        self._console.rule(Text(where, style="bold"), align="left", characters="─")
        if isinstance(outcome, RecordError):
            self._console.print(Text(f"left out as malformed: {outcome}", style="red"))
            return
        longest = max((len(row.tokens) for each in outcome for row in each.kept or ()), default=0)
        for fitted in outcome:
            if fitted.reason:
                self._console.print(Text(_REASONS[fitted.reason], style="red"))
            names = ("chosen", "rejected") if self._form == "pairs" else ("",) * len(fitted.whole)
            for place, (name, row) in enumerate(zip(names, fitted.whole, strict=True)):
                self._row(name, row, fitted.kept[place] if fitted.kept else None, longest)

    def _row(self, name: str, whole: Row, kept: Row | None, longest: int) -> None:
        """One row: its counts, then its parts."""
        kept_prompt = kept.prompt_length if kept is not None else 0
        kept_response = len(kept.tokens) - kept_prompt if kept is not None else 0
        begin = whole.prompt_length - kept_prompt
        end = whole.prompt_length + kept_response
        tokens = whole.tokens.tolist()
        parts = [
            ("cut off", tokens[:begin]),
            ("prompt", tokens[begin : whole.prompt_length]),
            ("response", tokens[whole.prompt_length : end]),
            ("cut off", tokens[end:]),
        ]
        rated = {1.0: "desirable", 0.0: "undesirable"}.get(-1.0 if whole.rating is None else whole.rating, "")
        counts = (
            f"prompt {kept_prompt}" + ("" if self._form == "prompts" else f" + response {kept_response}") + " tokens"
        )
        lost = [f"{len(part)} {place}" for place, part in (("before", parts[0][1]), ("behind", parts[3][1])) if part]
        if kept is not None and self._form != "prompts":
            counts += f", {kept.num_targets} of them learned on"
        self._console.print(Text(" ".join(filter(None, (name, rated))) or "row", style="bold"), end="")
        self._console.print(Text(f": {counts}" + (f"; cut off: {', '.join(lost)}" if lost else "")))
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for kind, part in parts:
            if part:
                grid.add_row(Text(f"  {kind}", style=_SHADES[kind][0]), self._text(part, kind))
        if kept is not None and len(kept.tokens) < longest:
            padding = f"{self._piece(self._pad)} x {longest - len(kept.tokens)}"
            grid.add_row(*(Text(text, style=_SHADES["padding"][0]) for text in ("  padding", padding)))
        self._console.print(grid)

    def _text(self, tokens: Sequence[int], kind: str) -> Text:
        text = Text()
        plain = self._console.color_system is None
        for index, token in enumerate(tokens):
            style = _SHADES[kind][index % 2] + (" bold reverse" if token in self._special else "")
            if plain and index:
                text.append("|")
            text.append(self._piece(token), style=style)
        text.rstrip()  # the new line behind the sign for it
        return text

    def _read(self, token: int) -> str:
        """A token's text with white space made visible; the tokenizer's own name for a part of a character."""
        # Behind another token, since some tokenizers leave out a space at the very beginning.
        text = self._tokenizer.decode([*self._anchor, token], clean_up_tokenization_spaces=False)[self._before :]
        if not text or "\ufffd" in text:
            text = str(self._tokenizer.convert_ids_to_tokens(token))
        return "".join(_VISIBLE.get(letter, letter) for letter in text)


def print_lengths(console: Console, dataset: TokenDataset, max_length: int) -> None:
    """A table of how long rows are, before and after they were cut."""
    shares = {"shortest": 0, "median": 50, "90 %": 90, "99 %": 99, "longest": 100}
    table = Table("tokens", *shares, "mean", "over max_length")
    kinds = {"uncut": dataset.uncut_lengths, "kept": dataset.row_lengths}
    for name, lengths in kinds.items():
        values = [f"{value:,.0f}" for value in np.percentile(lengths, list(shares.values()))]
        table.add_row(name, *values, f"{lengths.mean():,.1f}", f"{np.mean(lengths > max_length):.1%}")
    console.print(table)
