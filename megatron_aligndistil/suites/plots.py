"""Plots of a report: the main figures with their intervals, and each suite by category."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_aligndistil.suites.page import plot_name
from megatron_aligndistil.suites.report import SuiteReport
from megatron_aligndistil.suites.statistics import Figure

_COLOURS = ("#3b6ea5", "#c8553d", "#588157", "#8a6fb0", "#b08900", "#5f6b6d", "#c06c9b", "#2a9d8f")


def draw(out: Path, names: Sequence[str], suites: Sequence[SuiteReport]) -> list[Path]:
    """Write report.png and one plot for each suite with categories; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    shown = [suite for suite in suites if suite.any.main]
    if shown:
        figure, axes = plt.subplots(
            1, len(shown), figsize=(1.2 + 2.6 * len(shown), 1.6 + 0.42 * len(names)), sharey=True, squeeze=False
        )
        for axis, suite in zip(axes[0], shown, strict=True):
            _main(axis, names, suite)
        drawn.append(_save(figure, out / "report.png"))
    for suite in suites:
        if any(result.categories for result in suite.results.values()):
            drawn.append(_save(_categories(plt, names, suite), out / plot_name(suite)))
    return drawn


def _main(axis: Any, names: Sequence[str], suite: SuiteReport) -> None:
    """One point a model with its interval, the first model on top."""
    for place, name in enumerate(names):
        figure = suite.figures.get(name, {}).get(suite.any.main)
        if figure and not math.isnan(figure.value):
            colour = _COLOURS[place % len(_COLOURS)]
            axis.errorbar(figure.value, -place, xerr=_errors(figure), fmt="o", color=colour, capsize=3)
    axis.set_yticks([-place for place in range(len(names))], names)
    axis.set_ylim(-len(names) + 0.4, 0.6)
    axis.set_title(suite.any.main, fontsize=10)
    if suite.any.main.endswith("WR"):
        axis.axvline(50, color="0.8", linewidth=1, zorder=0)
    axis.grid(axis="x", color="0.92")


def _categories(plt: Any, names: Sequence[str], suite: SuiteReport) -> Any:
    """Bars of the main figure by category, models side by side."""
    categories = list(dict.fromkeys(name for result in suite.results.values() for name in result.categories))
    width = 0.8 / len(suite.results)
    figure, axis = plt.subplots(figsize=(max(5.0, 1.2 + 1.1 * len(categories)), 3.4))
    for number, (model, result) in enumerate(suite.results.items()):
        found = [result.categories.get(name, Figure(math.nan)) for name in categories]
        places = [place + (number - (len(suite.results) - 1) / 2) * width for place in range(len(categories))]
        errors = [_errors(each) or [[0.0], [0.0]] for each in found]
        axis.bar(
            places,
            [each.value for each in found],
            width,
            yerr=[[each[side][0] for each in errors] for side in (0, 1)],
            color=_COLOURS[list(names).index(model) % len(_COLOURS)],
            capsize=2,
            label=model,
        )
    axis.set_xticks(range(len(categories)), categories, rotation=20, ha="right")
    axis.set_ylabel(suite.any.main)
    axis.grid(axis="y", color="0.92")
    axis.set_axisbelow(True)
    if len(suite.results) > 1:
        axis.legend(fontsize=8, frameon=False)
    return figure


def _errors(figure: Figure) -> list[list[float]] | None:
    """The interval as matplotlib wants it: distances below and above."""
    if figure.low is None or figure.high is None:
        return None
    return [[max(figure.value - figure.low, 0.0)], [max(figure.high - figure.value, 0.0)]]


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
