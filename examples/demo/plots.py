"""The plots of a report. A stage has the same colour in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend must be chosen first)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure as Canvas  # noqa: E402
from summary import Plan, Stage  # noqa: E402

# Grey for where all begins, then the colours of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = ("#7a7a7a", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288")
# Metrics worth a panel, best first, by a part of their name; bookkeeping is never drawn.
PREFERRED = ("loss", "accuracy", "margin", "reward", "kl_dpo_sequence", "alpha", "tvd")
BOOKKEEPING = {"step", "time", "seconds", "rollout", "tokens_per_second", "lr", "grad_norm", "epoch", "length"}
STYLE: Any = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def draw_all(plan: Plan, report: dict[str, Any], accuracy_labels: dict[str, str], folder: Path) -> dict[str, str]:
    """Draw every plot that there are figures for. Returns file name -> caption, in the order of the report."""
    colours = {stage.label: COLOURS[n % len(COLOURS)] for n, stage in enumerate(plan.stages)}
    rows = report["stages"]
    plotted: dict[str, tuple[str, Canvas]] = {}
    with plt.rc_context(STYLE):
        if plan.stages[0].rewards is not None:
            plotted["reward.png"] = ("True reward of every stage", reward_by_stage(rows, colours))
            if sum("kl_reference" in row for row in rows) > 1:
                canvas = reward_against_kl(rows, colours, plan.kl_unit)
                plotted["reward_against_kl.png"] = ("True reward against KL from the initial model", canvas)
            plotted["reward_histogram.png"] = ("Distribution of true reward", reward_histogram(plan.stages, colours))
        elif any("kl_reference" in row for row in rows):
            plotted["kl.png"] = ("KL from the initial model", divergence_by_stage(rows, colours, plan.kl_unit))
        if plan.accuracy:
            canvas = accuracies(plan.accuracy, accuracy_labels)
            plotted["accuracy.png"] = ("Accuracy of the implicit rewards on held-out pairs", canvas)
        if any(panels(stage) for stage in plan.stages):
            plotted["training.png"] = ("Training curves", training_curves(plan.stages, colours))
        for name, (_, canvas) in plotted.items():
            canvas.savefig(folder / name, bbox_inches="tight")
            plt.close(canvas)
    return {name: caption for name, (caption, _) in plotted.items()}


def _dots(axes: Axes, figures: list[tuple[str, dict[str, Any], str]], digits: int, scale: float = 1.0) -> None:
    """One line for each (label, figure, colour): a dot with its standard error and its value, the first on top."""
    for y, (_, figure, colour) in enumerate(figures):
        mean, error = figure["mean"] * scale, (figure.get("stderr") or 0) * scale
        axes.errorbar(mean, y, xerr=error, fmt="o", color=colour, markersize=8, capsize=4, linewidth=2)
        axes.annotate(f"{mean:.{digits}f}", (mean, y), (0, 9), textcoords="offset points", ha="center", color=colour)
    axes.set_yticks(range(len(figures)), [label for label, _, _ in figures])
    axes.set_ylim(len(figures) - 0.5, -0.7)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)


def reward_by_stage(rows: list[dict[str, Any]], colours: dict[str, str]) -> Canvas:
    """True reward of every stage with its standard error."""
    canvas, axes = plt.subplots(figsize=(7.5, 0.9 + 0.65 * len(rows)))
    _dots(axes, [(row["label"], row["true_reward"], colours[row["label"]]) for row in rows], digits=3)
    axes.set_xlabel("mean true reward (± standard error)")
    return canvas


def divergence_by_stage(rows: list[dict[str, Any]], colours: dict[str, str], unit: str) -> Canvas:
    """KL from the initial model of every stage that has it."""
    with_kl = [row for row in rows if "kl_reference" in row]
    canvas, axes = plt.subplots(figsize=(7.5, 0.9 + 0.65 * len(with_kl)))
    _dots(axes, [(row["label"], row["kl_reference"], colours[row["label"]]) for row in with_kl], digits=2)
    axes.set_xlabel(f"KL from the initial model ({unit}, ± standard error)")
    return canvas


def accuracies(accuracy: dict[str, dict[str, Any]], labels: dict[str, str]) -> Canvas:
    """Accuracy of each implicit reward on held-out pairs."""
    canvas, axes = plt.subplots(figsize=(7.5, 0.9 + 0.65 * len(accuracy)))
    named = [(labels[name].replace(" (", "\n("), figure, "#333333") for name, figure in accuracy.items()]
    _dots(axes, named, digits=1, scale=100)
    axes.set_xlabel("accuracy on held-out pairs (%, ± standard error)")
    return canvas


def reward_against_kl(rows: list[dict[str, Any]], colours: dict[str, str], unit: str) -> Canvas:
    """What reward was bought with how much divergence from the initial model."""
    canvas, axes = plt.subplots(figsize=(7.5, 4.5))
    for row in rows:
        if "kl_reference" in row:
            kl, value = row["kl_reference"], row["true_reward"]
            axes.errorbar(
                kl["mean"],
                value["mean"],
                xerr=kl.get("stderr") or 0,
                yerr=value["stderr"] or 0,
                fmt="o",
                markersize=8,
                capsize=3,
                color=colours[row["label"]],
                label=row["label"],
            )
    axes.set_xlabel(f"KL from the initial model ({unit})")
    axes.set_ylabel("mean true reward")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return canvas


def reward_histogram(stages: list[Stage], colours: dict[str, str]) -> Canvas:
    """Share of samples by true reward, one panel a stage on common axes; the line marks the mean.

    Sums of valences are whole numbers, so R takes few values: nine bins leave none of them empty by construction.
    """
    canvas, grid = plt.subplots(
        len(stages), 1, figsize=(7.5, 0.8 + 1.25 * len(stages)), sharex=True, sharey=True, squeeze=False
    )
    for stage, axes in zip(stages, grid[:, 0], strict=True):
        values = stage.rewards or []
        weights = [100 / len(values)] * len(values)
        colour = colours[stage.label]
        axes.hist(values, bins=9, range=(-1, 1), weights=weights, color=colour, alpha=0.75, edgecolor="white")
        axes.axvline(sum(values) / len(values), color="#222222", linewidth=1.5)
        axes.set_title(stage.label, color=colour)
        axes.set_xlim(-1, 1)
    canvas.supylabel("share of samples (%)", fontsize=11)
    grid[-1, 0].set_xlabel("true reward (line: mean)")
    canvas.tight_layout()
    return canvas


def panels(stage: Stage, limit: int = 3) -> list[str]:
    """The training metrics of a stage to draw, at most `limit`: those that vary over steps, the most telling first."""
    counts: dict[str, int] = {}
    for record in stage.metrics:
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and "step" in record:
                counts[name] = counts.get(name, 0) + 1
    drawable = [
        name
        for name, count in counts.items()
        if count > 1
        and not _is_evaluation(name)
        and name.split("/", 1)[0] not in BOOKKEEPING
        and name.rsplit("/", 1)[-1] not in BOOKKEEPING
    ]
    rank = {
        name: next((n for n, part in enumerate(PREFERRED) if part in name.lower()), len(PREFERRED)) for name in drawable
    }
    return sorted(drawable, key=lambda name: rank[name])[:limit]


def _is_evaluation(name: str) -> bool:
    return name.startswith(("eval/", "valid/", "validation/", "held_out/"))


def _series(stage: Stage, name: str) -> tuple[list[float], list[float]]:
    points = [(record["step"], record[name]) for record in stage.metrics if name in record and "step" in record]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: list[float]) -> list[float]:
    """Mean over a window of about a twentieth of the run around each step, narrower at both ends."""
    half = len(values) // 40
    windows = [values[max(0, n - half) : n + half + 1] for n in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def training_curves(stages: list[Stage], colours: dict[str, str]) -> Canvas:
    """A row of panels for every trained stage: faint what was logged, strong its running mean, dots evaluations."""
    trained = [stage for stage in stages if panels(stage)]
    width = max(len(panels(stage)) for stage in trained)
    canvas, grid = plt.subplots(len(trained), width, figsize=(4.2 * width, 0.6 + 2.6 * len(trained)), squeeze=False)
    for stage, row in zip(trained, grid, strict=True):
        names = panels(stage)
        for axes in row[len(names) :]:
            axes.set_visible(False)
        for name, axes in zip(names, row, strict=False):
            colour, (steps, values) = colours[stage.label], _series(stage, name)
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
            axes.plot(steps, _smooth(values), color=colour, linewidth=2)
            inner = name.removeprefix("train/")
            for other in {key for record in stage.metrics for key in record if _is_evaluation(key)}:
                if other.split("/", 1)[1] == inner:
                    axes.plot(*_series(stage, other), "o", color="#222222", markersize=5, label="evaluation")
                    axes.legend(fontsize=9)
            axes.set_title(f"{stage.label}: {name.rsplit('/', 1)[-1].replace('_', ' ')}", fontsize=10)
            axes.set_xlabel("step")
    canvas.tight_layout()
    return canvas
