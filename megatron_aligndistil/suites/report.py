"""What the results of one model or several say together: one table, differences with intervals, what moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from megatron_aligndistil.suites import arena_hard, results, statistics
from megatron_aligndistil.suites.base import Example, Result
from megatron_aligndistil.suites.results import Evaluated
from megatron_aligndistil.suites.statistics import Difference, Figure

_MOVED = 3  # examples shown each way
# The table's order of suites; others follow.
_ORDER = ("alpaca_eval", "mt_bench", "arena_hard", "tldr", "reward_accuracy", "policy_shift")


@dataclass(frozen=True)
class Move:
    """A question on which two models differ: how far the second is above the first there."""

    change: float
    before: Example
    after: Example


@dataclass
class SuiteReport:
    """One suite over all models that have it.

    Attributes:
        results, figures: by model; `figures` has what takes all models together (style control) beside each result's.
        differences: (first, second) -> how far the second's main figure is above the first's.
        moved: the questions that moved most, for the same pairs, falls first.
        style: coefficients of style, by feature, where it is controlled.
        notes: sentences for the reader.
    """

    name: str
    results: dict[str, Result]
    figures: dict[str, dict[str, Figure]]
    differences: dict[tuple[str, str], Difference] = field(default_factory=dict)
    moved: dict[tuple[str, str], list[Move]] = field(default_factory=dict)
    style: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def any(self) -> Result:
        """Some model's result, for what they share."""
        return next(iter(self.results.values()))

    @property
    def unit(self) -> float:
        """What a score of 1 is in the main figure."""
        return 100.0 if self.any.scale == "percent" else 1.0


def write(out: Path) -> list[Path]:
    """Write report.md, report.json and the plots of every model in `out`; returns the files."""
    from megatron_aligndistil.suites import page, plots

    models = results.read_all(out)
    suites = gather(models)
    names = [model.name for model in models]
    results.write_json(out / "report.json", as_json(names, suites))
    drawn = plots.draw(out, names, suites)
    (out / "report.md").write_text(page.render(names, suites, [path.name for path in drawn]), encoding="utf-8")
    return [out / "report.md", out / "report.json", *drawn]


def gather(models: Sequence[Evaluated]) -> list[SuiteReport]:
    """The suites that any model has, each over all models that have it."""
    names = {suite for model in models for suite in model.results}

    def place(suite: str) -> tuple[int, str]:
        base = suite.split()[0]
        return (_ORDER.index(base) if base in _ORDER else len(_ORDER), suite)

    return [
        _suite(suite, {model.name: model.results[suite] for model in models if suite in model.results})
        for suite in sorted(names, key=place)
    ]


def _suite(name: str, found: dict[str, Result]) -> SuiteReport:
    report = SuiteReport(name, found, {model: dict(result.figures) for model, result in found.items()})
    report.notes = list(dict.fromkeys(note for result in found.values() for note in result.notes))
    if name.startswith("arena_hard"):
        _control_style(report)
    for first, second in combinations(found, 2):
        shared = _shared(found[first].examples, found[second].examples)
        if len(shared) > 1:
            report.differences[first, second] = statistics.paired(
                ([old.score for old, _ in shared], [old.weight for old, _ in shared]),
                ([new.score for _, new in shared], [new.weight for _, new in shared]),
                report.unit,
            )
            report.moved[first, second] = _moved(shared, report.unit)
    _warn(report)
    return report


def _control_style(report: SuiteReport) -> None:
    with_examples = {model: result.examples for model, result in report.results.items() if result.examples}
    if not with_examples:
        return
    figures, report.style = arena_hard.style_controlled(with_examples)
    column = report.any.main.removesuffix(" WR")
    for model, found in figures.items():
        report.figures[model] |= {f"{column} {name}": figure for name, figure in found.items()}
    if any(math.isnan(figure.value) for found in figures.values() for figure in found.values()):
        report.notes.append(
            "Style is not controlled here: style, or the model, tells wins from losses without fail on these "
            "questions, so nothing bounds the fit."
        )
    if len(with_examples) == 1:
        report.notes.append(
            "With one model, z-scored features centre on that model's own style, so SC is close to WR; the win rate at "
            "the baseline's style is free of this."
        )


def _shared(first: Sequence[Example], second: Sequence[Example]) -> list[tuple[Example, Example]]:
    other = {example.id: example for example in second}
    return [(example, other[example.id]) for example in first if example.id in other]


def _moved(shared: Sequence[tuple[Example, Example]], unit: float) -> list[Move]:
    moves = [Move((new.score / new.weight - old.score / old.weight) * unit, old, new) for old, new in shared]
    moves.sort(key=lambda move: move.change)
    falls = [move for move in moves[:_MOVED] if move.change < 0]
    return falls + [move for move in moves[-_MOVED:] if move.change > 0]


def _warn(report: SuiteReport) -> None:
    """Say where models were not asked or judged alike, so that their figures do not compare."""
    settings = [result.settings for result in report.results.values()]
    keys = dict.fromkeys(key for each in settings for key in each)
    differing = [key for key in keys if len({str(each.get(key)) for each in settings}) > 1]
    if differing:
        report.notes.append(
            f"The models differ in {', '.join(differing)}: their figures are not comparable as they stand."
        )


def as_json(names: Sequence[str], suites: Sequence[SuiteReport]) -> dict[str, Any]:
    """The report as JSON values, examples left out (each result.json has them)."""
    return {
        "models": list(names),
        "suites": {
            suite.name: {
                "main": suite.any.main,
                "figures": {
                    model: {name: asdict(figure) for name, figure in figures.items()}
                    for model, figures in suite.figures.items()
                },
                "categories": {
                    model: {name: asdict(figure) for name, figure in result.categories.items()}
                    for model, result in suite.results.items()
                },
                "position": {model: result.position for model, result in suite.results.items()},
                "counts": {model: result.counts for model, result in suite.results.items()},
                "unread": {model: result.unread for model, result in suite.results.items()},
                "settings": {model: result.settings for model, result in suite.results.items()},
                "style_coefficients": suite.style,
                "differences": [
                    {"first": first, "second": second, **asdict(difference)}
                    for (first, second), difference in suite.differences.items()
                ],
                "notes": suite.notes,
            }
            for suite in suites
        },
    }
