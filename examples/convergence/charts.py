"""The plots of the comparison. A method has the same colour and the same line in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plan import CRITERIA, LEVEL
from plots import STYLE, Axes, Canvas, plt

# Of Okabe and Ito, which colour-blind readers can tell apart; the lines differ too.
LINES: dict[str, dict[str, Any]] = {
    "distribution": {"color": "#0072b2", "linestyle": "-", "marker": "o"},
    "token": {"color": "#d55e00", "linestyle": "--", "marker": "s"},
    "sentence": {"color": "#009e73", "linestyle": "-.", "marker": "^"},
}
TITLES = {
    "reward": "token-averaged reward (nats)",
    "objective": "reward - β KL (nats a response)",
    "kl": "KL from DPO (nats a response)",
}


def draw_all(results: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draw every plot. Returns file name -> caption."""
    plotted: dict[str, tuple[str, Canvas]] = {}
    for batch in dict.fromkeys(found["batch"] for found in results["comparisons"]):
        caption = (
            f"Batch {batch}: reward, objective and KL against steps; the mean of the seeds, shaded from the lowest to "
            f"the highest (running means); dotted: {LEVEL} of the common gain"
        )
        found = [each for each in results["comparisons"] if each["batch"] == batch]
        plotted["convergence.png" if not plotted else f"convergence_batch{batch}.png"] = (caption, convergence(found))
    caption = (
        "The runs that learning rates were chosen from, one seed each: what they were chosen by (filled: chosen); far "
        "below zero is cut off"
    )
    plotted["learning_rates.png"] = (caption, learning_rates(results["searches"]))
    for name, (_, canvas) in plotted.items():
        canvas.savefig(folder / name, bbox_inches="tight")
        plt.close(canvas)
    return {name: caption for name, (caption, _) in plotted.items()}


def convergence(comparisons: Sequence[Mapping[str, Any]]) -> Canvas:
    """A column for every comparison, a row for every measure, a line with its band for every method."""
    with plt.rc_context(STYLE):
        canvas, grid = plt.subplots(
            len(TITLES),
            len(comparisons),
            figsize=(5.2 * len(comparisons), 9.5),
            squeeze=False,
            sharex=True,
            sharey="row",
        )
        for column, found in enumerate(comparisons):
            for row, measure in enumerate(TITLES):
                _curves(grid[row, column], found, measure)
            grid[0, column].set_title(f"batch {found['batch']}, learning rates tuned for {found['tuned_for']}")
            grid[0, column].legend(loc="lower right", fontsize=10)
            grid[-1, column].set_xlabel("optimiser steps")
        for row, title in enumerate(TITLES.values()):
            grid[row, 0].set_ylabel(title)
        canvas.align_ylabels()
        canvas.tight_layout()
    return canvas


def _curves(axes: Axes, found: Mapping[str, Any], measure: str) -> None:
    for name, method in found["methods"].items():
        curve, line = method["curves"][measure], LINES[name]
        steps = range(len(curve["mean"]))
        axes.fill_between(steps, curve["low"], curve["high"], color=line["color"], alpha=0.18, linewidth=0)
        label = f"{method['label']} (lr {method['lr']:g})"
        axes.plot(steps, curve["mean"], color=line["color"], linestyle=line["linestyle"], linewidth=2, label=label)
    level = found["levels"].get(measure, {}).get(LEVEL)
    if level is not None:
        axes.axhline(level, color="#222222", linestyle=":", linewidth=1.2)


def learning_rates(searches: Sequence[Mapping[str, Any]]) -> Canvas:
    """A column for every batch size, a row for every criterion: its value against the learning rate."""
    with plt.rc_context(STYLE):
        canvas, grid = plt.subplots(
            len(CRITERIA), len(searches), figsize=(5.2 * len(searches), 6.5), squeeze=False, sharex=True, sharey="row"
        )
        for row, criterion in enumerate(CRITERIA):
            for column, search in enumerate(searches):
                _rates(grid[row, column], search, criterion)
            grid[row, 0].set_ylabel(f"{TITLES[criterion]},\nmean of all steps")
            values = [run["all_steps"][criterion] for s in searches for m in s["methods"].values() for run in m["runs"]]
            top = 1.1 * max(values)
            grid[row, 0].set_ylim(max(min(values) - 0.1 * top, -0.3 * top), top)
        for column, search in enumerate(searches):
            grid[0, column].set_title(f"batch {search['batch']}")
            grid[-1, column].set_xlabel("learning rate")
        grid[0, 0].legend(loc="lower left", fontsize=10)
        canvas.align_ylabels()
        canvas.tight_layout()
    return canvas


def _rates(axes: Axes, search: Mapping[str, Any], criterion: str) -> None:
    for name, method in reversed(search["methods"].items()):  # the first method on top where points meet
        line = LINES[name]
        rates = [run["lr"] for run in method["runs"]]
        values = [run["all_steps"][criterion] for run in method["runs"]]
        axes.plot(rates, values, **line, markerfacecolor="white", markersize=7, label=method["label"])
        chosen = rates.index(method["chosen"][criterion])
        axes.plot(rates[chosen], values[chosen], color=line["color"], marker=line["marker"], markersize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({run["lr"] for method in search["methods"].values() for run in method["runs"]}))
    axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    axes.tick_params(axis="x", rotation=45)
