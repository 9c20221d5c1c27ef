"""What the runs say: the figures of the tables, as paper.json has them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from methods import METHODS, Run, Setting
from pool import has_failed
from records import read_json, read_jsonl
from scoring import Scorer
from search import Outcome
from summary import Figure, distinct_words, mean_stderr

BUDGETS = (2.5, 5.0, 10.0, 20.0)  # nats a response from the initial model
MEASURES = ("reward", "kl_reference", "kl_dpo", "length", "finished", "distinct_words", "win_rate")


class Figures:
    """Reads figures of runs and of the models that they start from."""

    def __init__(self, setting: Setting, scorer: Scorer) -> None:
        self._setting, self._scorer = setting, scorer

    def of_model(self, folder: Path, final: bool) -> dict[str, Figure]:
        """Figures of the samples and the KL in a folder; ± is over prompts.

        Wins are over the initial model's response to the same prompt, by the reward, a tie counting half.
        """
        samples = read_jsonl(folder / "samples.jsonl", ("index", "response", "response_tokens", "finish"))
        rewards = self._scorer.rewards(folder, self._setting.test if final else self._setting.validation)
        divergences = read_json(folder / "kl.json")
        found = {
            "reward": mean_stderr(rewards),
            **{name: divergences[name] for name in ("kl_reference", "kl_dpo")},
            "length": mean_stderr([float(len(sample["response_tokens"])) for sample in samples]),
            "finished": mean_stderr([float(sample["finish"] == "stop") for sample in samples]),
            "distinct_words": mean_stderr([distinct_words(sample["response"]) for sample in samples]),
        }
        if final:
            first = self._scorer.rewards(self._setting.folder / "initial", self._setting.test)
            wins = [(a > b) + 0.5 * (a == b) for a, b in zip(rewards, first, strict=True)]
            found["win_rate"] = mean_stderr(wins)
        return found

    def score(self, run: Run) -> float:
        """What settings are chosen by: the mean reward on the validation prompts; of a reward model, -loss on pairs."""
        if run.method in METHODS:
            return mean_stderr(self._scorer.rewards(run.folder, self._setting.validation))["mean"]
        loss = [line["eval/reward/loss"] for line in _lines(run) if "eval/reward/loss" in line][-1]
        return -loss if math.isfinite(loss) else -math.inf

    def describe(self, run: Run) -> str:
        """One line on a run that is done."""
        name = METHODS[run.method].label if run.method in METHODS else "reward model"
        kind = f"seed {run.seed}" if run.final else "tuning"
        own = "" if run.own is None else f", {METHODS[run.method].own.key} {run.own:g}"
        told = f"{name}, lr {run.lr:g}{own}, {kind}"
        if run.method not in METHODS:
            return f"{told}: loss on validation pairs {-self.score(run):.4f}"
        found = self.of_model(run.folder, run.final)
        return f"{told}: reward {found['reward']['mean']:.3f}, KL {found['kl_reference']['mean']:.1f}"

    def of_run(self, run: Run) -> dict[str, Any]:
        """The settings of a run and its figures, or that it failed."""
        settings = {"lr": run.lr, "own": run.own, "seed": run.seed}
        if has_failed(run):
            return {**settings, "failed": True}
        seconds = [line["seconds/total"] for line in _lines(run) if "seconds/total" in line]
        return {**settings, "seconds_per_step": sum(seconds) / len(seconds), **self.of_model(run.folder, run.final)}

    def of_method(self, name: str, outcome: Outcome) -> dict[str, Any]:
        """A method's row: settings, the mean over seeds of every measure with its standard error, all its runs."""
        seeds = [self.of_run(run) for run in outcome.finals]
        tried = [self.of_run(run) for run in outcome.tried]
        own = METHODS[name].own
        return {
            "label": METHODS[name].label,
            "algorithm": dict(METHODS[name].algorithm),
            "lr": outcome.finals[0].lr,
            "own": {"key": own.key, "value": outcome.finals[0].own, "published": own.published} if own else None,
            "follows": METHODS[name].follows,
            "within": within_budgets(tried),
            "mean": {key: mean_stderr([seed[key]["mean"] for seed in seeds]) for key in MEASURES},
            "seeds": seeds,
            "tried": tried,
            "command": " ".join(["aligndistil pipeline", *outcome.finals[0].arguments]),
        }


def _lines(run: Run) -> list[dict[str, Any]]:
    return read_jsonl(run.folder / "train" / "metrics.jsonl")


def gather(
    figures: Figures, setting: Setting, outcomes: Mapping[str, Outcome], reward: Sequence[Run]
) -> dict[str, Any]:
    """The content of paper.json, but for what is said of it. `reward`: runs of the reward model, best first."""
    found: dict[str, Any] = {
        "known_reward": setting.judge is None,
        "models": {name: figures.of_model(setting.folder / name, True) for name in ("initial", "teacher")},
        "methods": {name: figures.of_method(name, outcome) for name, outcome in outcomes.items()},
        "accuracy": accuracies(setting, reward[0] if reward else None),
        "reward_models": [{"lr": run.lr, "loss": -figures.score(run)} for run in reward if not has_failed(run)],
    }
    return found


def accuracies(setting: Setting, reward: Run | None) -> dict[str, dict[str, Figure]]:
    """Name of a reward -> "train" and "test" -> share of pairs that it puts right, ± over pairs."""
    found: dict[str, dict[str, Figure]] = {}
    for part, pairs in (("train", setting.variables["train"]), ("test", setting.variables["test_pairs"])):
        measured = read_json(setting.folder / f"accuracy_{part}.json")
        if reward is not None:
            measured |= read_json(reward.folder / f"accuracy_{part}.json")
        if setting.judge is None:
            measured["true_reward"] = agreement(Path(pairs))
        for name in ("reward_model", "dpo_reward", "contrastive_reward", "true_reward"):
            if name in measured:
                found.setdefault(name, {})[part] = measured[name]
    return found


def agreement(pairs: Path) -> Figure:
    """How often the known reward agrees with the labels, a tie counting half; no reward can be expected to pass it."""
    records = read_jsonl(pairs, ("reward_chosen", "reward_rejected"))
    differences = [record["reward_chosen"] - record["reward_rejected"] for record in records]
    return mean_stderr([(d > 0) + 0.5 * (d == 0) for d in differences])


def within_budgets(tried: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """For each budget, the run tried with the highest reward whose KL from the initial model keeps to it."""
    found: dict[str, dict[str, Any] | None] = {}
    for budget in BUDGETS:
        kept = [run for run in tried if not run.get("failed") and run["kl_reference"]["mean"] <= budget]
        best = max(kept, key=lambda run: run["reward"]["mean"], default=None)
        found[f"{budget:g}"] = best and {key: best[key] for key in ("lr", "own", "reward", "kl_reference")}
    return found
