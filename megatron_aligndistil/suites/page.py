"""The report as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from megatron_aligndistil.suites.base import excerpt
from megatron_aligndistil.suites.report import Move, SuiteReport
from megatron_aligndistil.suites.statistics import Figure

_POSITION = {
    "first_place": "mean score of the first place (%)",
    "agree": "both orders agree (%)",
    "for_first": "outcome follows the first place (%)",
    "for_second": "outcome follows the second place (%)",
}
# What the table at the top leaves to the sections.
_DETAILS = ("WR at baseline's style", "length (words)", "distinct-1", "distinct-3", "distinct-4")
_UNREAD_SHOWN = 5


def render(names: Sequence[str], suites: Sequence[SuiteReport], plots: Sequence[str]) -> str:
    """The whole page."""
    parts = ["# Evaluation", _overview(names, suites)]
    parts += [f"![{name}]({name})" for name in plots if name == "report.png"]
    for suite in suites:
        parts += _section(suite, [name for name in plots if name == plot_name(suite)])
    return "\n\n".join(part for part in parts if part) + "\n"


def plot_name(suite: SuiteReport) -> str:
    """The file of a suite's plot by category."""
    return suite.name.replace(" ", "_") + ".png"


def _overview(names: Sequence[str], suites: Sequence[SuiteReport]) -> str:
    columns = list(dict.fromkeys(column for suite in suites for each in suite.figures.values() for column in each))
    columns = [column for column in columns if not column.endswith(_DETAILS)]
    rows = []
    for name in names:
        figures = {column: figure for suite in suites for column, figure in suite.figures.get(name, {}).items()}
        rows.append([name, *(_with_error(figures.get(column)) for column in columns)])
    return table(["model", *columns], rows) + "\n\nWR, LC, SC and accuracies in percent; ± is the standard error."


def _section(suite: SuiteReport, plots: Sequence[str]) -> list[str]:
    models = list(suite.results)
    columns = list(dict.fromkeys(column for each in suite.figures.values() for column in each))
    rows = [[column, *(with_interval(suite.figures[model].get(column)) for model in models)] for column in columns]
    parts = [f"## {suite.name}", table(["with 95 % interval", *models], rows)]
    parts += _differences(suite)
    categories = list(dict.fromkeys(name for result in suite.results.values() for name in result.categories))
    if categories:
        rows = [
            [name, *(with_interval(suite.results[model].categories.get(name)) for model in models)]
            for name in categories
        ]
        parts += [f"### {suite.any.main} by category", table(["category", *models], rows)]
        parts += [f"![{name}]({name})" for name in plots]
    parts += _position(suite)
    parts += _style(suite)
    parts += _counts(suite)
    parts += _moved(suite)
    settings = [f"{key}: {value}" for key, value in suite.any.settings.items() if value is not None]
    return [*parts, "### Settings and notes", "\n".join(f"- {line}" for line in [*settings, *suite.notes])]


def _differences(suite: SuiteReport) -> list[str]:
    rows = [
        [
            f"{second} − {first}",
            f"{each.value:+.2f}",
            f"{each.low:+.2f} to {each.high:+.2f}",
            _p(each.p),
            str(each.count),
        ]
        for (first, second), each in suite.differences.items()
    ]
    header = [f"difference in {suite.any.main}", "value", "95 % interval", "p", "questions"]
    return [table(header, rows) + "\n\nPaired bootstrap over the questions that both have."] if rows else []


def _position(suite: SuiteReport) -> list[str]:
    models = [model for model, result in suite.results.items() if result.position]
    rows = [
        [text, *(_number(suite.results[model].position.get(key), 1) for model in models)]
        for key, text in _POSITION.items()
        if any(key in suite.results[model].position for model in models)
    ]
    if not rows:
        return []
    return ["### Position bias", table(["", *models], rows), "Without bias the first place scores 50 %."]


def _style(suite: SuiteReport) -> list[str]:
    if not suite.style:
        return []
    listed = ", ".join(f"{name} {value:+.3f}" for name, value in suite.style.items())
    return [f"Coefficients of style (logits a standard deviation; above 0 the judge likes more of it): {listed}."]


def _counts(suite: SuiteReport) -> list[str]:
    keys = list(dict.fromkeys(key for result in suite.results.values() for key in result.counts))
    rows = [[key, *(str(result.counts.get(key, "")) for result in suite.results.values())] for key in keys]
    parts = ["### Counts", table(["", *suite.results], rows)]
    for model, result in suite.results.items():
        if result.unread:
            more = len(result.unread) - _UNREAD_SHOWN
            listed = ", ".join(result.unread[:_UNREAD_SHOWN]) + (f" and {more} more" if more > 0 else "")
            parts.append(f"Unreadable verdicts on {model}, left out of every figure: {listed} (see verdicts.jsonl).")
    return parts


def _moved(suite: SuiteReport) -> list[str]:
    first_model = next(iter(suite.results))
    parts = []
    for (first, second), moves in suite.moved.items():
        if moves and first == first_model:
            parts.append(f"### What moved most from {first} to {second}")
            parts += [_move(move, first, second) for move in moves]
    return parts


def _move(move: Move, first: str, second: str) -> str:
    title = f"{move.change:+.1f}: {excerpt(' '.join(move.before.question.split()), 160)}"
    texts = "\n\n".join(
        f"*{name}*\n\n{_quoted(each.answer)}" for name, each in ((first, move.before), (second, move.after))
    )
    return f"<details><summary>{_escaped(title)}</summary>\n\n{texts}\n\n</details>"


def _quoted(text: str) -> str:
    return "\n".join(f"> {_escaped(line)}" for line in (text.strip() or "(empty)").splitlines())


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def _with_error(figure: Figure | None) -> str:
    if figure is None or math.isnan(figure.value):
        return "–"
    return _number(figure.value, 2) + (f" ± {figure.stderr:.2f}" if figure.stderr is not None else "")


def with_interval(figure: Figure | None) -> str:
    if figure is None or math.isnan(figure.value):
        return "–"
    interval = f" [{figure.low:.2f}, {figure.high:.2f}]" if figure.low is not None and figure.high is not None else ""
    return _number(figure.value, 2) + interval


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _p(value: float) -> str:
    return "< 0.002" if value < 0.002 else f"{value:.3f}"
