"""Compare how fast three uses of the contrastive DPO reward learn (figure 2 of AlignDistil, arXiv 2503.02832).

    python examples/convergence/compare.py

makes the demo's models where `make demo` has not, then trains on-policy with the reward as a distribution over the
vocabulary, as a number a token and as a number a response: a search for the learning rate of each, then several seeds
at the best. Writes report.md, convergence.json and plots. Given again, it goes on with what is not done. About twenty
minutes on two cores; `--batch 64 8` repeats it all with small batches, ten minutes more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples" / name) for name in ("common", "demo")]

import charts  # noqa: E402 (the demo's modules must be found first)
import plan  # noqa: E402
import tables  # noqa: E402
from jobs import CONFIGS, FOLDER, METHODS, MODELS, Run  # noqa: E402
from pool import Pool  # noqa: E402
from rates import best_rate, rate_to_try  # noqa: E402
from records import as_json, read_json, write_json  # noqa: E402
from report import markdown_table  # noqa: E402
from results import baselines, comparison, run_figures, scores, search_results  # noqa: E402

MODELS_STAGE = "dpo and reverse dpo"

Searches = dict[int, dict[str, list[Run]]]  # batch size -> method -> its runs at different learning rates


def make_models() -> None:
    """Run the demo's stages that are not done yet. Ends the script where runs/convergence is from other models."""
    command = [sys.executable, "-m", "megatron_aligndistil", "pipeline", "--config", f"{CONFIGS}/models.yaml"]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)
    made, record = read_json(MODELS / "pipeline.json")[MODELS_STAGE], FOLDER / "models.json"
    if record.is_file() and read_json(record) != made:
        raise SystemExit(f"{FOLDER} holds runs that began from other models; delete it to begin again")
    write_json(record, made)


def describe(run: Run) -> str:
    """One line on a run that is done."""
    figures = run_figures(run)
    return (
        f"batch {run.batch}, {METHODS[run.method].label}, lr {run.lr:g}, seed {run.seed}: "
        f"reward {figures['reward']:.4f}, objective {figures['objective']:.2f}, KL {figures['kl']['mean']:.1f}"
    )


def search(pool: Pool, batches: Sequence[int]) -> Searches:
    """Try the grid of learning rates, and more while the best of a method lies at the edge of its own."""
    searched: Searches = {
        batch: {
            name: [Run(name, batch, plan.BATCHES[batch], rate, plan.TUNING_SEED) for rate in plan.RATES]
            for name in METHODS
        }
        for batch in batches
    }
    grids = [runs for methods in searched.values() for runs in methods.values()]
    later = [run for runs in grids for criterion in plan.CRITERIA for run in _at(runs, runs[0].lr)]
    pool.do([run for runs in grids for run in runs], later, describe)
    for _ in range(plan.EXTENSIONS):
        more = []
        for runs in grids:
            rates = {rate_to_try(scores(runs, criterion), plan.FACTOR) for criterion in plan.CRITERIA} - {None}
            new = [replace(runs[0], lr=rate) for rate in rates if rate is not None]
            runs += new
            more += new
        pool.do(more, later, describe)
    return searched


def _at(runs: Sequence[Run], rate: float) -> list[Run]:
    """The runs of all seeds at one learning rate."""
    return [replace(runs[0], lr=rate, seed=seed) for seed in plan.SEEDS]


def compare(pool: Pool, batches: Sequence[int]) -> dict[str, Any]:
    """All runs; returns the content of convergence.json."""
    searched = search(pool, batches)
    final = {
        (batch, criterion): {name: _at(runs, best_rate(scores(runs, criterion))) for name, runs in methods.items()}
        for batch, methods in searched.items()
        for criterion in plan.CRITERIA
    }
    # Where both criteria chose the same rate, the runs are the same ones.
    pool.do(
        list(dict.fromkeys(r for methods in final.values() for runs in methods.values() for r in runs)), [], describe
    )
    return {
        "plan": plan.in_sentences(CONFIGS),
        "baselines": baselines(),
        "comparisons": [comparison(criterion, methods) for (_, criterion), methods in final.items()],
        "searches": [search_results(methods) for methods in searched.values()],
    }


def write(results: dict[str, Any], out: Path) -> None:
    """Write plots, convergence.json and report.md."""
    out.mkdir(parents=True, exist_ok=True)
    images = charts.draw_all(results, out)
    (out / "convergence.json").write_text(as_json(results), encoding="utf-8")
    reading = out / "reading.md"  # what a person says of the figures, kept when the report is written again
    text = tables.markdown(results, images, reading.read_text(encoding="utf-8") if reading.is_file() else "")
    (out / "report.md").write_text(text, encoding="utf-8")
    print(f"\nSteps to {plan.LEVEL} of the gain in reward that all three reach:\n")
    print("\n".join(markdown_table(*tables.summary_table(results, "reward"))))
    print(f"\nreport: {out / 'report.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    known = tuple(plan.BATCHES)
    parser.add_argument("--batch", type=int, nargs="+", choices=known, default=known[:1], help="responses a step")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the report (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=cores, help="runs side by side, 1 GB each (default: %(default)s)")
    args = parser.parse_args()
    os.chdir(ROOT)  # where the paths in configurations begin
    make_models()
    with Pool(args.jobs) as pool:
        found = compare(pool, args.batch)
    write(found, args.out)


if __name__ == "__main__":
    main()
