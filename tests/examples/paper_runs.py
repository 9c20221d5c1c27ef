"""Runs of the paper's tables whose samples and figures are made up, to work by hand."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples" / name) for name in ("paper", "common", "demo")]

import figures  # noqa: E402
import methods  # noqa: E402
import scoring  # noqa: E402
import search  # noqa: E402
from methods import METHODS, Run, Runs, Setting  # noqa: E402
from records import write_json, write_jsonl  # noqa: E402


def write_model(folder: Path, texts: list[str], kl: float, length: int = 10) -> None:
    """Samples and KL of a model, to work by hand."""
    samples = [
        {"index": n, "response": text, "response_tokens": [1] * length, "finish": "stop"}
        for n, text in enumerate(texts)
    ]
    write_jsonl(folder / "samples.jsonl", samples)
    write_json(folder / "kl.json", {f"kl_{n}": {"mean": kl, "stderr": 0.1, "count": 2} for n in ("reference", "dpo")})


def write_run(run: Run, texts: list[str], kl: float, length: int = 10) -> Run:
    write_model(run.folder, texts, kl, length)
    write_jsonl(run.folder / "train" / "metrics.jsonl", [{"seconds/total": 0.5}, {"seconds/total": 1.5}])
    return run


TEXTS = {"good": ["love", "love"], "fair": ["good", "good"], "mixed": ["good", "bad"], "bad": ["bad", "bad"]}


def outcome(runs: Runs, method: str, texts: str, kl: float, length: int = 10) -> search.Outcome:
    """Three finals that say the same, and two runs of the search, one of which diverged."""
    own = METHODS[method].own.published if METHODS[method].own else None
    finals = [write_run(runs.of(method, 3e-4, own, n, True), TEXTS[texts], kl + n - 2, length) for n in (1, 2, 3)]
    if METHODS[method].follows:
        return search.Outcome((), None, tuple(finals))
    tried = [write_run(runs.of(method, 3e-4, own, 0, False), TEXTS[texts], kl), runs.of(method, 1e-3, own, 0, False)]
    write_json(tried[1].folder / "failed.json", {"arguments": tried[1].arguments, "said": ""})
    return search.Outcome(tuple(tried), tried[0], tuple(finals))


def gathered(setting: Setting) -> dict:
    """Figures of a whole set of runs, to work by hand."""
    runs = Runs(setting)
    for name, texts in (("initial", "bad"), ("teacher", "mixed")):
        write_model(setting.folder / name, TEXTS[texts], 0.0 if name == "initial" else 2.0)
    pair = {"reward_chosen": 1.0, "reward_rejected": 0.0}
    tie = {"reward_chosen": 0.0, "reward_rejected": 0.0}
    for name in ("train", "test_pairs"):
        write_jsonl(Path(setting.variables[name]), [pair, pair, pair, tie])
    accuracy = {"mean": 0.7, "stderr": 0.01, "count": 100}
    for part in ("train", "test"):
        measured = {
            "dpo_reward": accuracy,
            "contrastive_reward": {**accuracy, "mean": 0.75},
            "reverse_reward": accuracy,
        }
        write_json(setting.folder / f"accuracy_{part}.json", measured)
    found = {
        "dpo": outcome(runs, "dpo", "mixed", 4.0),
        "ppo": outcome(runs, "ppo", "good", 30.0),
        "off_policy": outcome(runs, "off_policy", "fair", 8.0),
        "vanilla": outcome(runs, "vanilla", "mixed", 8.0),
    }
    for number, constant in enumerate(methods.CONSTANTS):
        kl, length = 5.0 + 2 * number, 10 + 2 * number
        found[f"constant_{constant:g}"] = outcome(runs, f"constant_{constant:g}", "mixed", kl, length)
    return figures.gather(figures.Figures(setting, scoring.Scorer()), setting, found, [])
