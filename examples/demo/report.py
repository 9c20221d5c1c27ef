"""Write the report of a run: report.md, report.json and plots.

    python examples/demo/report.py --run runs/demo --stages runs/demo/stages.yaml --out runs/demo

The stages file (YAML or JSON; paths are relative to --run) looks like this; what is marked optional may be left out:

    title: ...                          # optional, as are about, kl_unit ("nats per response") and
    pairs: pairs/pairs.json             # the figures that pairs.py wrote
    accuracy: accuracy.json             # optional: {"dpo_reward": {"mean", "stderr", "count"}, ...} on held-out pairs
    inspect: inspect.html               # optional: the page of `aligndistil inspect`, to link to
    compare: [[AlignDistil, DPO]]       # optional: by default each stage named AlignDistil... against DPO
    stages:
      - label: DPO
        samples: samples/dpo.jsonl      # continuations of the evaluation prompts
        evaluation: evaluation/dpo.json # optional: {"kl_dpo": {"mean", "stderr", "count"}, "kl_reference": ..., ...}
        metrics: dpo/metrics.jsonl      # optional: one object a training step
        model: dpo                      # optional: whose metrics to draw, where one run trained several models
        about: ...                      # optional: one sentence

With --reward none, for preference data without a known reward, what would need one is left out.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import plots
from records import write_json
from rich import box
from rich.console import Console
from rich.table import Table
from summary import DIVERGENCES, Figure, Plan, paired_difference, read_plan, stage_figures, verdict

COLUMNS = {
    "true_reward": ("true reward", 3),
    "kl_dpo": ("KL from DPO", 2),
    "kl_reference": ("KL from initial", 2),
    "kl_reverse": ("KL from reverse", 2),
    "length": ("length", 1),
}
ACCURACIES = {
    "dpo_reward": "DPO reward",
    "contrastive_reward": "contrastive reward (DPO against reverse DPO)",
    "reverse_reward": "reverse DPO reward",
}


def with_error(figure: Figure | None, digits: int, scale: float = 1.0) -> str:
    """`mean ± stderr`, or a dash where there is no figure."""
    if figure is None or figure.get("mean") is None:
        return "–"
    mean = f"{figure['mean'] * scale:.{digits}f}"
    return mean if figure.get("stderr") is None else f"{mean} ± {figure['stderr'] * scale:.{digits}f}"


def accuracy_label(name: str) -> str:
    """The name of an accuracy for people."""
    return ACCURACIES.get(name, name.replace("_", " "))


def stage_table(rows: list[dict[str, Any]], leave_out: str = "") -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of stages, without columns that no stage has and the one to leave out."""
    columns = [name for name in COLUMNS if name != leave_out and any(name in row for row in rows)]
    header = ["stage", *(COLUMNS[name][0] for name in columns), "finished", "distinct words"]
    cells = []
    for row in rows:
        figures = [with_error(row.get(name), COLUMNS[name][1]) for name in columns]
        shares = [f"{row[name]['mean']:.1%}" for name in ("finished", "distinct_words")]
        cells.append([row["label"], *figures, *shares])
    return header, cells


def markdown_table(header: list[str], cells: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *cells)]


def plain(text: Any, limit: int = 600) -> str:
    """A prompt or response on one line of Markdown, cut where it is long; messages are joined."""
    if isinstance(text, list):
        text = " ".join(f"{m.get('role', m.get('from'))}: {m.get('content', m.get('value'))}" for m in text)
    line = " ".join(str(text).split())
    line = line if len(line) <= limit else line[:limit].rsplit(" ", 1)[0] + " …"
    for mark in "\\|<`*_#":
        line = line.replace(mark, "\\" + mark)
    return line


def side_by_side(plan: Plan, num_prompts: int) -> list[str]:
    """What every stage wrote for the first prompts."""
    first = plan.stages[0]
    prompts = {sample["index"]: sample["prompt"] for sample in first.samples}
    lines = ["## Samples", ""]
    for index in list(prompts)[:num_prompts]:
        known = first.rewards is not None
        header, cells = ["stage", *(["R"] if known else []), "continuation"], []
        for stage in plan.stages:
            at = next((n for n, sample in enumerate(stage.samples) if sample["index"] == index), None)
            if at is None:
                continue
            value = [f"{stage.rewards[at]:+.2f}"] if stage.rewards is not None else []
            cells.append([stage.label, *value, plain(stage.samples[at]["response"])])
        rule = ["---", *(["---:"] if known else []), "---"]
        lines += [f"**{plain(prompts[index])}**", ""]
        lines += [f"| {' | '.join(row)} |" for row in (header, rule, *cells)] + [""]
    return lines


def markdown(plan: Plan, report: dict[str, Any], images: dict[str, str], num_prompts: int, folder: Path) -> str:
    """The whole report.md, to be written into `folder`."""
    has_reward = plan.stages[0].rewards is not None
    lines = [f"# {plan.title}", ""]
    lines += [plan.about, ""] if plan.about else []
    for sentence in report["verdicts"]:
        lines += [f"**{sentence}**", ""]
    lines += ["Stages, in the order they ran:", ""]
    for number, stage in enumerate(plan.stages, start=1):
        steps = max((record.get("step", 0) for record in stage.metrics), default=0)
        trained = f" ({steps} training steps)" if steps else ""
        lines.append(f"{number}. {stage.label}{trained}{': ' + stage.about if stage.about else ''}")
    lines += ["", "## Results", "", *markdown_table(*stage_table(report["stages"])), ""]
    prompts = report["stages"][0]["length"]["count"]
    notes = [f"{prompts} evaluation prompts; ± is one standard error of the mean, over prompts."]
    if has_reward:
        notes.append(
            "True reward: R = s / √(s² + 15) in (-1, 1), s the summed valences of the distinct words of a response, so "
            "repeating a word gains nothing."
        )
    else:
        notes.append("There is no known true reward for this data, so reward is left out.")
    if any(name in row for row in report["stages"] for name in DIVERGENCES):
        notes.append(f"KL divergences are in {plan.kl_unit}.")
    notes.append("Length is in tokens. Finished: responses that ended by themselves.")
    notes.append("Distinct words: distinct words / words of a response; it falls where a model repeats itself.")
    lines += [*notes, ""]
    if plan.accuracy:
        lines += ["## Accuracy of the implicit rewards on held-out pairs", ""]
        cells = [[accuracy_label(n), with_error(f, 1, 100), str(f["count"])] for n, f in plan.accuracy.items()]
        lines += [*markdown_table(["reward", "accuracy (%)", "pairs"], cells), ""]
    if plan.pairs and has_reward:
        drawn = plan.pairs["held_out"]
        lines += [
            f"{drawn['agreement']:.1%} of the held-out labels agree with the true reward ({drawn['ties']} ties of "
            f"{drawn['pairs']} left out): they are noisy, as people's are. This is about what the true reward itself "
            "would reach as accuracy on these labels.",
            "",
        ]
    if plan.inspect:
        page = Path(os.path.relpath(plan.inspect, folder)).as_posix()
        lines += [
            "## Token by token",
            "",
            f"[{plan.inspect.name}]({page}) shows held-out pairs, their tokens coloured by contrastive reward, TVD, α, "
            "or KL of the policy from its teacher; open it in a browser.",
            "",
        ]
    lines += ["## Plots", ""]
    for name, caption in images.items():
        lines += [f"![{caption}]({name})", ""]
    lines += side_by_side(plan, num_prompts)
    return "\n".join(lines).rstrip() + "\n"


def build_report(plan: Plan) -> dict[str, Any]:
    """All figures, as report.json has them."""
    stages = {stage.label: stage for stage in plan.stages}
    report: dict[str, Any] = {"title": plan.title, "kl_unit": plan.kl_unit}
    report["stages"] = [stage_figures(stage) for stage in plan.stages]
    report |= {"accuracy": plan.accuracy, "pairs": plan.pairs, "differences": [], "verdicts": []}
    if plan.stages[0].rewards is not None:
        for label, baseline in plan.compare:
            difference = paired_difference(stages[label], stages[baseline])
            report["differences"].append({"stage": label, "baseline": baseline, "true_reward": difference})
            report["verdicts"].append(verdict(label, baseline, difference))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, required=True, help="folder that relative paths of --stages start from")
    parser.add_argument("--stages", type=Path, required=True, help="YAML or JSON that lists the stages")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.md, report.json and the plots")
    parser.add_argument("--reward", choices=("valence", "none"), default="valence", help="the true reward, if any")
    parser.add_argument(
        "--samples", type=int, default=4, help="prompts shown with their samples (default: %(default)s)"
    )
    args = parser.parse_args()
    plan = read_plan(args.stages, args.run, with_reward=args.reward != "none")
    report = build_report(plan)
    args.out.mkdir(parents=True, exist_ok=True)
    images = plots.draw_all(plan, report, {name: accuracy_label(name) for name in plan.accuracy}, args.out)
    write_json(args.out / "report.json", report)
    (args.out / "report.md").write_text(markdown(plan, report, images, args.samples, args.out), encoding="utf-8")
    header, cells = stage_table(report["stages"], leave_out="kl_reverse")  # to fit 80 columns
    table = Table(title=plan.title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for number, name in enumerate(header):
        parts = [part for row in [header, *cells] for part in row[number].replace("± ", "±_").split()]
        table.add_column(name, justify="right" if number else "left", min_width=max(map(len, parts)))
    for row in cells:
        table.add_row(*(cell.replace(" ± ", "\n± ") for cell in row))
    console = Console()
    console.print(table)
    for sentence in report["verdicts"]:
        console.print(sentence, markup=False, highlight=False)
    console.print(f"report: {args.out / 'report.md'}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
