"""The report of the comparison in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plan import CRITERIA, LEVEL
from report import markdown_table, with_error

PAPER = (
    "The paper (figure 2): the distribution needs less than half the steps of the token-level scalar to the same "
    "token-averaged reward, and the sentence level is slowest."
)


def summary_table(results: Mapping[str, Any], measure: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells: steps of every method to the same value of one measure, beside those of the first method."""
    labels = [method["label"] for method in results["comparisons"][0]["methods"].values()]
    cells = []
    for found in results["comparisons"]:
        steps = [method["steps_to"][measure].get(LEVEL, {}).get("mean") for method in found["methods"].values()]
        times = [_times(value, steps[0]) for value in steps]
        cells.append([f"{found['batch']}, {found['tuned_for']}", *times])
    return ["batch, tuned for", *labels], cells


def _times(steps: float | None, first: float | None) -> str:
    """`17.3 (3.8 times)`: steps, and how many times those of the first method; a dash where not all seeds arrived."""
    if steps is None:
        return "–"
    return f"{steps:.1f}" + (f" ({steps / first:.1f} times)" if first and steps is not first else "")


def level_table(found: Mapping[str, Any], measure: str) -> list[str]:
    """Steps of every method to the levels of one measure: the mean, and each seed."""
    levels = found["levels"][measure]
    if not levels:
        return [f"One method did not gain any {measure}: there is no level that all reach."]
    header = [measure, *(f"{share} ({level:.3g})" for share, level in levels.items())]
    cells = []
    for method in found["methods"].values():
        steps = [method["steps_to"][measure][share] for share in levels]
        each = [", ".join("never" if s is None else f"{s:.1f}" for s in cell["each"]) for cell in steps]
        means = ["–" if cell["mean"] is None else f"{cell['mean']:.1f}" for cell in steps]
        cells.append([method["label"], *(f"{mean} ({seeds})" for mean, seeds in zip(means, each, strict=True))])
    return markdown_table(header, cells)


def final_table(found: Mapping[str, Any], baselines: Mapping[str, Any]) -> list[str]:
    """Where every method ended, beside the models that it began from and was held to."""
    digits = {"reward": 4, "objective": 2, "kl": 1, "length": 1, "true_reward": 3}
    header = ["", "lr", "reward", "objective", "KL from DPO", "length", "true reward"]
    cells = [
        [label, "", "", "", "", with_error(model["length"], 1), with_error(model["true_reward"], 3)]
        for label, model in (("initial model", baselines["initial"]), ("DPO", baselines["dpo"]))
    ]
    for method in found["methods"].values():
        figures = [with_error(method["final"][key], places) for key, places in digits.items()]
        cells.append([method["label"], f"{method['lr']:g}", *figures])
    return markdown_table(header, cells)


def search_table(search: Mapping[str, Any]) -> list[str]:
    """Every run of the search for learning rates at one batch size; what a criterion chose is bold."""
    digits = {"objective": 2, "reward": 4}
    header = ["", "lr", *(f"{criterion}, all steps" for criterion in CRITERIA)]
    header += [*(f"{criterion}, end" for criterion in CRITERIA), "KL from DPO", "true reward"]
    cells = []
    for method in search["methods"].values():
        for run in method["runs"]:
            marks = ["**" if method["chosen"][criterion] == run["lr"] else "" for criterion in CRITERIA]
            means = [f"{run['all_steps'][criterion]:.{digits[criterion]}f}" for criterion in CRITERIA]
            marked = [f"{mark}{mean}{mark}" for mark, mean in zip(marks, means, strict=True)]
            ends = [f"{run[criterion]:.{digits[criterion]}f}" for criterion in CRITERIA]
            others = [f"{run['kl']['mean']:.1f}", with_error(run["true_reward"], 3)]
            cells.append([method["label"], f"{run['lr']:g}", *marked, *ends, *others])
    return markdown_table(header, cells)


def markdown(results: Mapping[str, Any], images: Mapping[str, str], reading: str) -> str:
    """The whole report.md; `reading` is what a person says of the figures."""
    lines = ["# Which use of the reward learns faster", "", PAPER, ""]
    for measure in ("reward", "objective"):
        lines += [f"Steps to {LEVEL} of the gain in {measure} that all three reach, mean of the seeds:", ""]
        lines += [*markdown_table(*summary_table(results, measure)), ""]
    lines += [reading.strip(), ""] if reading else []
    for name, caption in images.items():
        lines += [f"![{caption}]({name})", "", f"{caption}.", ""]
    for found in results["comparisons"]:
        lines += [f"## Batch {found['batch']}, {found['steps']} steps, tuned for {found['tuned_for']}", ""]
        lines += [*final_table(found, results["baselines"]), "", "Steps to a level, mean (each seed):", ""]
        lines += [*level_table(found, "reward"), "", *level_table(found, "objective"), ""]
    for search in results["searches"]:
        lines += [f"## Learning rates tried, batch {search['batch']}", "", *search_table(search), ""]
    lines += ["## How it was measured", "", *(f"- {sentence}" for sentence in results["plan"]), ""]
    return "\n".join(lines).rstrip() + "\n"
