"""Make the tables of the AlignDistil paper (arXiv 2503.02832) at a size that runs here (`make paper`).

    python examples/paper/paper.py

makes the demo's models where `make demo` has not, a reward model, then runs every method: learning rates, then its own
hyper-parameter, chosen by the reward on validation prompts; then three seeds at the best setting, measured on test
prompts. Writes report.md, paper.json and plots. Given again, it goes on with what is not done. On a GPU node,

    python examples/paper/paper.py --model models/Qwen2.5-1.5B-Instruct --data pairs.jsonl --judge models/judge

does the same with that model and those pairs. Other options (--vars.micro 1, --defaults.run.recompute full) are given
to every pipeline.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples" / name) for name in ("common", "demo")]

import drawings  # noqa: E402 (the shared modules must be found first)
import page  # noqa: E402
from claims import claims  # noqa: E402
from figures import Figures, gather  # noqa: E402
from methods import METHODS, NEED_KNOWN_REWARD, NEED_REWARD_MODEL, Runs, Setting  # noqa: E402
from pool import Pool  # noqa: E402
from records import as_json  # noqa: E402
from report import markdown_table  # noqa: E402
from scoring import Scorer  # noqa: E402
from search import Search  # noqa: E402
from settings import demo, in_sentences, node  # noqa: E402

from megatron_aligndistil.config import parse_overrides  # noqa: E402
from megatron_aligndistil.errors import ConfigError  # noqa: E402


def pipeline(*arguments: str) -> None:
    """Run a pipeline to its end. Ends the script where it fails."""
    command = [sys.executable, "-m", "megatron_aligndistil", "pipeline", *arguments]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)


def make_models(setting: Setting, own_model: bool) -> None:
    """Do the stages before the runs that are not done yet."""
    if not own_model:
        pipeline("--config", "examples/convergence/models.yaml")
    config = "preferences.yaml" if own_model else "models.yaml"
    given = [part for name, value in setting.variables.items() for part in (f"--vars.{name}", value)]
    pipeline("--config", f"examples/paper/{config}", "--dir", str(setting.folder), *given, *setting.options)


def run_all(setting: Setting, pool: Pool, device: str, names: Sequence[str], out: Path) -> None:
    """All runs, then the report."""
    figures = Figures(setting, Scorer(setting.judge, device))
    runs = Runs(setting)
    search = Search(runs, pool, figures.score, figures.describe)
    rewards = search.tune_reward() if any(name in NEED_REWARD_MODEL for name in names) else []
    if rewards:
        runs.reward = str(rewards[0].folder / "train" / "reward")
    outcomes = search.outcomes(names)
    write(setting, gather(figures, setting, outcomes, rewards), out)


def write(setting: Setting, found: dict[str, Any], out: Path) -> None:
    """Write plots, paper.json and report.md."""
    out.mkdir(parents=True, exist_ok=True)
    said = claims(found)
    images = drawings.draw_all(found, out)
    found["claims"] = [
        {"table": claim.table, "sentence": claim.sentence, "difference": claim.difference, "verdict": claim.verdict}
        for claim in said
    ]
    (out / "paper.json").write_text(as_json(found), encoding="utf-8")
    reading = out / "reading.md"  # what a person says of the figures, kept when the report is written again
    kept = reading.read_text(encoding="utf-8") if reading.is_file() else ""
    text = page.markdown(found, said, images, in_sentences(setting), kept)
    (out / "report.md").write_text(text, encoding="utf-8")
    print("\n".join(["", *markdown_table(*page.table_1(found)), "", f"report: {out / 'report.md'}"]))


def devices(judged: bool, per_run: int, jobs: int | None) -> tuple[int, list[int], str]:
    """Runs side by side, the GPUs for them, and where the judge runs: on a GPU of its own where there are several."""
    import torch

    gpus = list(range(torch.cuda.device_count()))
    if not gpus:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        return jobs or max(1, cores // per_run), [], "cpu"
    judge = f"cuda:{gpus.pop() if judged and len(gpus) > per_run else 0}"
    return min(jobs or len(gpus), len(gpus)) // per_run or 1, gpus, judge


def split_options(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Options for pipelines: `vars` by name, and the others. Ends the script where they are not --KEY VALUE."""
    try:
        given = parse_overrides(arguments)
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    variables = {name: str(value) for name, value in given.pop("vars", {}).items()}
    return variables, list(_flat(given))


def _flat(section: Mapping[str, Any], prefix: str = "--") -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield from (f"{prefix}{key}", json.dumps(value))


def _from_root(name: str | None) -> str | None:
    """A path as it is from the project's folder; a name that is no path stays as it is."""
    return os.path.relpath(name, ROOT) if name and os.path.exists(name) else name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="Hugging Face folder to start from, instead of the demo's model")
    parser.add_argument("--data", nargs="+", help="preference pairs (.jsonl or .json) for --model; several are joined")
    parser.add_argument(
        "--judge", help="sequence classification folder that gives the reward, trained on other data than --data"
    )
    parser.add_argument("--held-out", type=int, default=2048, help="pairs of --data kept from training (%(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates to try")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--folder", type=Path, help="folder of the runs (runs/paper, or runs/paper_NAME)")
    parser.add_argument("--out", type=Path, help="folder of the report (that of the runs)")
    parser.add_argument("--jobs", type=int, help="runs side by side (default: one a core or GPU)")
    parser.add_argument("--processes", type=int, default=1, help="processes of one run (default: %(default)s)")
    args, options = parser.parse_known_args()
    own_model = args.model is not None
    if own_model != (args.data is not None) or own_model != (args.judge is not None):
        raise SystemExit("--model needs --data, pairs to align it with, and --judge, a reward model trained on others")
    model, judge, *data = (_from_root(name) for name in (args.model, args.judge, *(args.data or ())))
    folder, out = (path and Path(os.path.relpath(path, ROOT)) for path in (args.folder, args.out))
    os.chdir(ROOT)  # where the paths in configurations begin
    setting = node(model, data, judge, args.held_out, folder) if own_model else demo(folder)
    variables, options = split_options(options)
    setting = replace(
        setting,
        variables={**setting.variables, **variables},
        rates=tuple(args.rates or setting.rates),
        options=tuple(options),
    )
    names = args.methods or [name for name in METHODS if not (own_model and name in NEED_KNOWN_REWARD)]
    size, gpus, device = devices(own_model, args.processes, args.jobs)
    make_models(setting, own_model)
    with Pool(size, gpus, args.processes) as pool:
        run_all(setting, pool, device, names, out or setting.folder)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None
