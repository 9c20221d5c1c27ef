"""What the runs say: figures and curves as convergence.json has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from curves import MEASURES, Curve, band, last_quarter, levels, mean, read_curve, smooth, steps_to
from jobs import METHODS, MODELS, Run
from plan import CRITERIA, SHARES
from rates import best_rate
from records import read_json, read_jsonl
from reward import reward
from summary import Figure, mean_stderr

from megatron_aligndistil.config import read_yaml

Levels = dict[str, float]
ASKED = ("reward", "objective")  # measures that a level is asked of


def curve_of(run: Run) -> Curve:
    """The training curve of a run."""
    folder = run.folder / "train"
    return read_curve(folder / "metrics.jsonl", read_yaml(folder / "config.yaml")["algorithm"]["beta"])


def scores(runs: Sequence[Run], criterion: str) -> dict[float, float]:
    """Learning rate -> what it is chosen by: the mean over all steps of one measure."""
    return {run.lr: mean(getattr(curve_of(run), criterion)) for run in runs}


def samples_of(folder: Path) -> dict[str, Figure]:
    """True reward and length of the samples of one model, ± over prompts."""
    samples = read_jsonl(folder / "samples.jsonl", ("response", "response_tokens"))
    return {
        "true_reward": mean_stderr([reward(sample["response"]) for sample in samples]),
        "length": mean_stderr([float(len(sample["response_tokens"])) for sample in samples]),
    }


def baselines() -> dict[str, dict[str, Figure]]:
    """The models that the policies start from and are held to."""
    return {name: samples_of(MODELS / "convergence" / name) for name in ("initial", "dpo")}


def run_figures(run: Run) -> dict[str, Any]:
    """Figures of one run: of all steps, of their last quarter, and of its policy's samples."""
    curve = curve_of(run)
    return {
        "lr": run.lr,
        "seed": run.seed,
        "all_steps": {key: mean(getattr(curve, key)) for key in CRITERIA},
        "reward": last_quarter(curve.reward),
        "objective": last_quarter(curve.objective),
        "kl": read_json(run.folder / "kl.json")["kl_dpo"],
        "seconds_per_step": mean(curve.seconds),
        **samples_of(run.folder),
    }


def search_results(searched: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """The learning rates tried at one batch size, and the one chosen by each criterion."""
    return {
        "batch": next(iter(searched.values()))[0].batch,
        "methods": {
            name: {
                "label": METHODS[name].label,
                "chosen": {criterion: best_rate(scores(runs, criterion)) for criterion in CRITERIA},
                "runs": [run_figures(run) for run in sorted(runs, key=lambda run: run.lr)],
            }
            for name, runs in searched.items()
        },
    }


def comparison(criterion: str, final: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Figures, curves and steps to common levels of every method at the learning rates that `criterion` chose.

    `final` holds the runs of each method, one a seed.
    """
    curves = {name: [curve_of(run) for run in runs] for name, runs in final.items()}
    asked = {key: _levels([[getattr(curve, key) for curve in seeds] for seeds in curves.values()]) for key in ASKED}
    first = next(iter(final.values()))[0]
    return {
        "batch": first.batch,
        "steps": first.steps,
        "tuned_for": criterion,
        "levels": asked,
        "methods": {name: _method(runs, curves[name], asked) for name, runs in final.items()},
    }


def _method(runs: Sequence[Run], curves: Sequence[Curve], asked: Mapping[str, Levels]) -> dict[str, Any]:
    seeds = [run_figures(run) for run in runs]
    values = {key: [getattr(curve, key) for curve in curves] for key in MEASURES}
    return {
        "label": METHODS[runs[0].method].label,
        "lr": runs[0].lr,
        "seeds": seeds,
        "final": {key: mean_stderr([figures[key] for figures in seeds]) for key in ASKED}
        | {key: mean_stderr([figures[key]["mean"] for figures in seeds]) for key in ("kl", "true_reward", "length")},
        "curves": {key: {"seeds": each, **band([smooth(curve) for curve in each])} for key, each in values.items()},
        "steps_to": {key: _steps(values[key], asked[key]) for key in ASKED},
    }


def _levels(methods: Sequence[Sequence[list[float]]]) -> Levels:
    """Levels of one measure that all methods reach, from the curves of their seeds."""
    # Before its first update every policy is the initial model: one level to start from, the mean over all runs.
    starts = [curve[0] for seeds in methods for curve in seeds]
    finals = [mean([last_quarter(curve) for curve in seeds]) for seeds in methods]
    return levels(mean(starts), finals, SHARES)


def _steps(seeds: Sequence[list[float]], asked: Levels) -> dict[str, Any]:
    """Steps to each level for every seed, and their mean where all reached it."""
    found = {}
    for share, level in asked.items():
        each = [steps_to(smooth(curve), level) for curve in seeds]
        reached = [steps for steps in each if steps is not None]
        found[share] = {"each": each, "mean": mean(reached) if len(reached) == len(each) else None}
    return found
