"""The report in Markdown: our tables beside the paper's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from claims import ERRORS, Claim
from figures import BUDGETS
from methods import CONSTANTS, TABLE_1, TABLE_4
from published import ACCURACY, TABLE_3, WIN_RATE
from published import TABLE_4 as PAPER_4
from report import markdown_table, with_error

ACCURACIES = {
    "reward_model": "reward model",
    "dpo_reward": "DPO reward",
    "contrastive_reward": "contrastive DPO reward",
    "true_reward": "(the known reward itself)",
}
Table = tuple[list[str], list[list[str]]]


def _figures(mean: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    digits = {"reward": 3, "kl_reference": 1, "kl_dpo": 1, "length": 1}
    return [with_error(mean[name], digits[name]) for name in names]


def _own(method: Mapping[str, Any]) -> str:
    own = method["own"]
    return f"{own['key']} {own['value']:g}" if own else ""


def table_1(found: Mapping[str, Any]) -> Table:
    """Every method at its chosen setting."""
    measures = ("reward", "kl_reference", "kl_dpo", "length")
    header = ["", "lr", "its own", "reward", "KL from initial", "KL from DPO", "length", "ended", "distinct words"]
    labels = {"initial": "initial model", "teacher": "DPO as trained for AlignDistil's teacher"}
    rows = [(labels[name], "", "", found["models"][name]) for name in labels]
    for name in TABLE_1:
        if name in found["methods"]:
            method = found["methods"][name]
            rows.append((method["label"], f"{method['lr']:g}", _own(method), method["mean"]))
    shares = ("finished", "distinct_words")
    cells = [
        [label, lr, own, *_figures(mean, measures), *(f"{mean[share]['mean']:.0%}" for share in shares)]
        for label, lr, own, mean in rows
    ]
    return header, cells


def within_table(found: Mapping[str, Any]) -> Table:
    """The best run of the search of each method within each budget of KL."""
    cells = []
    for name in TABLE_1:
        within = found["methods"].get(name, {}).get("within", {})
        if any(within.values()):
            best = [within[f"{budget:g}"] for budget in BUDGETS]
            told = [
                f"{run['reward']['mean']:.3f} (KL {run['kl_reference']['mean']:.1f})" if run else "–" for run in best
            ]
            cells.append([found["methods"][name]["label"], *told])
    return ["KL from initial at most", *(f"{budget:g}" for budget in BUDGETS)], cells


def table_2(found: Mapping[str, Any]) -> Table:
    """Accuracy of rewards, with the reward of what they were distilled into."""
    header = ["", "train %", "test %", "paper: train", "paper: test", "reward of the policy", "paper: AlpacaEval 2"]
    cells = []
    for name, label in ACCURACIES.items():
        if name in found["accuracy"]:
            ours = [with_error(found["accuracy"][name][part], 1, 100) for part in ("train", "test")]
            theirs = [f"{value:.2f}" for value in ACCURACY.get(name, ())] or ["", ""]
            distilled = {"dpo_reward": "vanilla", "contrastive_reward": "off_policy"}.get(name)
            method = found["methods"].get(distilled)
            policy = with_error(method["mean"]["reward"], 3) if method else ""
            paper = f"{WIN_RATE[distilled]:.2f}" if distilled else ""
            cells.append([label, *ours, *theirs, policy, paper])
    return header, cells


def table_3(found: Mapping[str, Any]) -> Table:
    """A constant coefficient of extrapolation against the adaptive one."""
    header = ["", "reward", "KL from DPO", "length", "paper: AlpacaEval 2", "paper: KL from DPO", "paper: length"]
    cells = []
    for name in (*(f"constant_{constant:g}" for constant in CONSTANTS), "off_policy"):
        if name in found["methods"]:
            method, (kl, length, rate) = found["methods"][name], TABLE_3[name]
            label = f"adaptive ({_own(method)})" if name == "off_policy" else method["label"]
            ours = _figures(method["mean"], ("reward", "kl_dpo", "length"))
            cells.append([label, *ours, f"{rate:.2f}", f"{kl:.2f}", str(length)])
    return header, cells


def table_4(found: Mapping[str, Any]) -> Table:
    """Wins over the initial model, and the reward."""
    header = ["", "wins over initial %", "reward", "paper: win rate %", "paper: reward"]
    means = {"initial": ("initial model", found["models"]["initial"])}
    methods = found["methods"]
    means |= {name: (methods[name]["label"], methods[name]["mean"]) for name in TABLE_4 if name in methods}
    cells = []
    for name, (label, mean) in means.items():
        rate, reward = PAPER_4[name]
        ours = [with_error(mean["win_rate"], 1, 100), with_error(mean["reward"], 3)]
        cells.append([label, *ours, f"{rate:.1f}", f"{reward:.2f}"])
    return header, cells


def claims_table(claims: Sequence[Claim]) -> Table:
    """Each comparison of the paper and whether ours agrees."""
    cells = []
    for claim in claims:
        digits = 3 if abs(claim.difference["mean"]) < 1 else 1
        cells.append([f"{claim.sentence} (table {claim.table})", with_error(claim.difference, digits), claim.verdict])
    return ["the paper", "ours, positive if it agrees", ""], cells


def tried_table(found: Mapping[str, Any]) -> Table:
    """Every run that settings were chosen from; the chosen one is bold."""
    cells = []
    for method in found["methods"].values():
        own = method["own"]
        for run in method["tried"]:
            mark = "**" if (run["lr"], run["own"]) == (method["lr"], own and own["value"]) else ""
            value = "" if run["own"] is None else f"{own['key']} {run['own']:g}"
            told = ["diverged", "–", "–"]
            if not run.get("failed"):
                told = _figures(run, ("reward", "kl_reference", "length"))
            cells.append([method["label"], f"{run['lr']:g}", value, f"{mark}{told[0]}{mark}", *told[1:]])
    cells += [
        ["reward model", f"{run['lr']:g}", "", f"loss {run['loss']:.4f}", "", ""] for run in found["reward_models"]
    ]
    return ["", "lr", "its own", "reward on validation prompts", "KL from initial", "length"], cells


def markdown(
    found: Mapping[str, Any], claims: Sequence[Claim], images: Mapping[str, str], plan: Sequence[str], reading: str
) -> str:
    """The whole report.md; `reading` is what a person says of the figures."""
    sections = [
        ("## Table 1: every method at its best setting", table_1(found), ()),
        (
            "### The same within a budget of KL",
            within_table(found),
            (
                "The highest reward among the runs that settings were chosen from (one seed, validation prompts) that "
                "keep to a KL from the initial model, in nats a response: what a method gets for the distance it goes.",
            ),
        ),
        ("## Table 2: accuracy of rewards", table_2(found), ()),
        ("## Table 3: a constant coefficient against the adaptive one", table_3(found), ()),
        ("## Table 4: wins over the initial model", table_4(found), ()),
        (
            "## What agrees with the paper, and what does not",
            claims_table(claims),
            (
                f"A difference within {ERRORS:g} standard errors tells nothing, and is said to. Errors are added as of "
                "independent figures; accuracies are of the same pairs, so theirs are rather smaller.",
            ),
        ),
    ]
    lines = ["# The paper's tables at this size", ""]
    for title, table, notes in sections:
        if table[1]:
            lines += [title, "", *(part for note in notes for part in (note, "")), *markdown_table(*table), ""]
    lines += [reading.strip(), ""] if reading else []
    for name, caption in images.items():
        lines += [f"![{caption}]({name})", "", f"{caption}.", ""]
    lines += ["## How it was measured", "", *(f"- {sentence}" for sentence in plan), ""]
    lines += ["## Settings tried", "", *markdown_table(*tried_table(found)), ""]
    lines += ["## Commands", "", "The first seed of each method:", "", "```"]
    lines += [method["command"] for method in found["methods"].values()]
    return "\n".join([*lines, "```"]) + "\n"
