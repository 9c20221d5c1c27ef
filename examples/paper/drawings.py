"""The plots of the report. A method has the same colour and the same mark in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from methods import CONSTANTS, TABLE_1
from plots import STYLE, Axes, Canvas, plt

# Of Okabe and Ito, which colour-blind readers can tell apart; marks tell apart what shares a colour.
MARKS: dict[str, tuple[str, str]] = {
    "initial": ("#7a7a7a", "X"),
    "teacher": ("#7a7a7a", "P"),
    "dpo": ("#222222", "o"),
    "kto": ("#e69f00", "o"),
    "tdpo1": ("#cc79a7", "s"),
    "tdpo2": ("#cc79a7", "D"),
    "simpo": ("#e69f00", "^"),
    "ppo": ("#d55e00", "s"),
    "ppo_known": ("#d55e00", "*"),
    "rto": ("#009e73", "o"),
    "rto_terminal": ("#009e73", "D"),
    "off_policy": ("#0072b2", "o"),
    "on_policy": ("#0072b2", "s"),
}
MODELS = {"initial": "initial model", "teacher": "DPO, the teacher"}


def draw_all(found: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draw every plot that there are figures for. Returns file name -> caption."""
    plotted: dict[str, tuple[str, Canvas]] = {}
    if any(name in found["methods"] for name in TABLE_1):
        plotted["rewards.png"] = (
            "Reward on the test prompts, and KL from the initial model, of every method at its chosen setting "
            "(mean and standard error of the seeds)",
            rewards(found),
        )
        plotted["reward_against_kl.png"] = (
            "Reward against KL from the initial model: large, the chosen settings on the test prompts; small, every "
            "setting tried, on the validation prompts",
            reward_against_kl(found),
        )
        plotted["learning_rates.png"] = (
            "Reward on the validation prompts against the learning rate, at the published value of each method's own "
            "hyper-parameter",
            learning_rates(found),
        )
    if all(f"constant_{constant:g}" in found["methods"] for constant in CONSTANTS):
        plotted["constants.png"] = (
            "A constant coefficient (line) against the adaptive one (dashed), mean and standard error of the seeds",
            constants(found),
        )
    for name, (_, canvas) in plotted.items():
        canvas.savefig(folder / name, bbox_inches="tight")
        plt.close(canvas)
    return {name: caption for name, (caption, _) in plotted.items()}


def _rows(found: Mapping[str, Any]) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Name -> label and means of the models and methods of table 1."""
    rows = {name: (label, found["models"][name]) for name, label in MODELS.items()}
    methods = found["methods"]
    return rows | {name: (methods[name]["label"], methods[name]["mean"]) for name in TABLE_1 if name in methods}


def rewards(found: Mapping[str, Any]) -> Canvas:
    """A line for every method, in the order of their reward: on the left the reward, on the right the KL."""
    rows = sorted(_rows(found).items(), key=lambda row: row[1][1]["reward"]["mean"])
    with plt.rc_context(STYLE):
        canvas, grid = plt.subplots(1, 2, figsize=(11, 0.8 + 0.42 * len(rows)), sharey=True)
        for axes, measure in zip(grid, ("reward", "kl_reference"), strict=True):
            for y, (name, (_, mean)) in enumerate(rows):
                colour, mark = MARKS[name]
                error = mean[measure]["stderr"] or 0
                axes.errorbar(mean[measure]["mean"], y, xerr=error, fmt=mark, color=colour, markersize=8, capsize=4)
            axes.grid(axis="y", visible=False)
            axes.set_ylim(-0.6, len(rows) - 0.4)
        grid[1].set_xscale("symlog", linthresh=1)
        grid[1].set_xlim(left=-0.1)
        grid[0].set_yticks(range(len(rows)), [label for _, (label, _) in rows])
        grid[0].set_xlabel("mean reward")
        grid[1].set_xlabel("KL from the initial model (nats a response)")
        canvas.tight_layout()
    return canvas


def reward_against_kl(found: Mapping[str, Any]) -> Canvas:
    """Every run: what reward was bought with how much distance."""
    with plt.rc_context(STYLE):
        canvas, axes = plt.subplots(figsize=(9, 6))
        for name, (label, mean) in _rows(found).items():
            colour, mark = MARKS[name]
            for run in found["methods"].get(name, {"tried": ()})["tried"]:
                if not run.get("failed"):
                    point = (run["kl_reference"]["mean"], run["reward"]["mean"])
                    axes.plot(*point, mark, color=colour, markersize=5, alpha=0.45, markeredgewidth=0)
            point = (mean["kl_reference"]["mean"], mean["reward"]["mean"])
            axes.plot(*point, mark, color=colour, markersize=11, markeredgecolor="white", label=label, linestyle="")
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=-0.1)
        axes.set_xlabel("KL from the initial model (nats a response, logarithmic above 1)")
        axes.set_ylabel("mean reward")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10)
    return canvas


def learning_rates(found: Mapping[str, Any]) -> Canvas:
    """A line for every method that was tuned."""
    with plt.rc_context(STYLE):
        canvas, axes = plt.subplots(figsize=(9, 5))
        for name in TABLE_1:
            method = found["methods"].get(name)
            if not method:
                continue
            published = method["own"]["published"] if method["own"] else None
            runs = sorted(
                (run for run in method["tried"] if run["own"] == published and not run.get("failed")),
                key=lambda run: run["lr"],
            )
            if runs:
                colour, mark = MARKS[name]
                values = [run["reward"]["mean"] for run in runs]
                axes.plot([run["lr"] for run in runs], values, f"{mark}-", color=colour, label=method["label"])
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("mean reward, validation prompts")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10)
    return canvas


def constants(found: Mapping[str, Any]) -> Canvas:
    """Reward, KL and length against the constant coefficient."""
    titles = {"reward": "mean reward", "kl_dpo": "KL from DPO (nats)", "length": "length (tokens)"}
    with plt.rc_context(STYLE):
        canvas, grid = plt.subplots(1, 3, figsize=(13, 3.8))
        for axes, (measure, title) in zip(grid, titles.items(), strict=True):
            means = [found["methods"][f"constant_{constant:g}"]["mean"][measure] for constant in CONSTANTS]
            _with_errors(axes, means)
            adaptive = found["methods"].get("off_policy")
            if adaptive:
                axes.axhline(adaptive["mean"][measure]["mean"], color=MARKS["off_policy"][0], linestyle="--")
            axes.set_title(title)
            axes.set_xlabel("coefficient")
        canvas.tight_layout()
    return canvas


def _with_errors(axes: Axes, means: list[Mapping[str, Any]]) -> None:
    errors = [mean["stderr"] or 0 for mean in means]
    axes.errorbar(CONSTANTS, [mean["mean"] for mean in means], yerr=errors, fmt="o-", color="#222222", capsize=4)
