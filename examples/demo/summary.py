"""The figures of a report: what the samples, evaluations and training records of every stage say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from records import Record, read_json, read_jsonl
from reward import reward, words

Figure = dict[str, Any]  # {"mean", "stderr", "count"}; stderr is None where one value alone says nothing about it
DIVERGENCES = ("kl_dpo", "kl_reference", "kl_reverse")


@dataclass(frozen=True)
class Stage:
    """One model of the pipeline.

    Attributes:
        label: its name in the report.
        about: what was done, in a sentence; may be empty.
        samples: its continuations of the evaluation prompts.
        evaluation: figures that the evaluation computed (KL divergences).
        metrics: the records of its training, one a step; empty where it was not trained.
        rewards: true reward of every sample, or None where there is no known reward.
    """

    label: str
    about: str
    samples: list[Record]
    evaluation: dict[str, Figure]
    metrics: list[Record]
    rewards: list[float] | None

    def by_prompt(self, values: Sequence[float]) -> dict[Any, float]:
        """Mean over the samples of each prompt of one value a sample."""
        groups: dict[Any, list[float]] = {}
        for sample, value in zip(self.samples, values, strict=True):
            groups.setdefault(sample["index"], []).append(value)
        return {index: sum(group) / len(group) for index, group in groups.items()}


@dataclass(frozen=True)
class Plan:
    """What `--stages` says: the stages in order, and figures of the whole run."""

    title: str
    about: str
    kl_unit: str
    stages: list[Stage]
    accuracy: dict[str, Figure]
    pairs: dict[str, Any] | None
    inspect: Path | None
    compare: list[tuple[str, str]]


def read_plan(path: Path, run: Path, with_reward: bool) -> Plan:
    """Read the stages file and all that it names; relative paths start at `run`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SystemExit(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content.get("stages"):
        raise SystemExit(f"{path} needs a list `stages`, each with a label, samples and evaluation")
    stages = [_read_stage(entry, path, run, with_reward) for entry in content["stages"]]
    labels = [stage.label for stage in stages]
    default = [(label, "DPO") for label in labels if label.startswith("AlignDistil") and "DPO" in labels]
    compare = [(str(a), str(b)) for a, b in content.get("compare", default)]
    unknown = sorted({label for pair in compare for label in pair} - set(labels))
    if unknown:
        raise SystemExit(f"{path}: compare names {', '.join(unknown)}, which is no stage; stages: {', '.join(labels)}")
    return Plan(
        title=content.get("title", "AlignDistil, from the initial model to the aligned policy"),
        about=content.get("about", ""),
        kl_unit=content.get("kl_unit", "nats per response"),
        stages=stages,
        accuracy=read_json(run / content["accuracy"]) if content.get("accuracy") else {},
        # A file that is not there belongs to a step that this pipeline did not have, such as SFT of a pretrained model.
        pairs=read_json(run / content["pairs"]) if _is_there(run, content.get("pairs")) else None,
        inspect=run / content["inspect"] if _is_there(run, content.get("inspect")) else None,
        compare=compare,
    )


def _read_stage(entry: Any, path: Path, run: Path, with_reward: bool) -> Stage:
    missing = [key for key in ("label", "samples") if not isinstance(entry, Mapping) or key not in entry]
    if missing:
        raise SystemExit(f"{path}: a stage needs {' and '.join(missing)}")
    samples = read_jsonl(run / entry["samples"], ("index", "prompt", "response", "response_tokens", "finish"))
    if not samples:
        raise SystemExit(f"{run / entry['samples']} holds no samples")
    return Stage(
        label=entry["label"],
        about=entry.get("about", ""),
        samples=samples,
        evaluation=read_json(run / entry["evaluation"]) if entry.get("evaluation") else {},
        metrics=_metrics_of(entry.get("model"), read_jsonl(run / entry["metrics"]))
        if _is_there(run, entry.get("metrics"))
        else [],
        rewards=[reward(sample["response"]) for sample in samples] if with_reward else None,
    )


def _is_there(run: Path, name: str | None) -> bool:
    return name is not None and (run / name).is_file()


def _metrics_of(model: str | None, records: list[Record]) -> list[Record]:
    """Training records with the metrics of one model ("train/dpo/loss", "eval/dpo/loss") and those of no model."""
    if model is None:
        return records
    return [
        {name: value for name, value in record.items() if "/" not in name or name.split("/")[1] == model}
        for record in records
    ]


def mean_stderr(values: Sequence[float]) -> Figure:
    """Mean, its standard error (sample standard deviation / √n), and n."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return {"mean": mean, "stderr": None, "count": 1}
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return {"mean": mean, "stderr": math.sqrt(variance / count), "count": count}


def distinct_words(text: str) -> float:
    """Distinct words / words, 1 for a text without words: falls towards 0 as a text repeats itself."""
    found = words(text)
    return len(set(found)) / len(found) if found else 1.0


def stage_figures(stage: Stage) -> dict[str, Any]:
    """The row of a stage. Standard errors are over prompts, so several samples of a prompt count as one value."""

    def over_prompts(value: Callable[[Record], float]) -> Figure:
        return mean_stderr(list(stage.by_prompt([value(sample) for sample in stage.samples]).values()))

    figures: dict[str, Any] = {"label": stage.label, "samples": len(stage.samples)}
    if stage.rewards is not None:
        figures["true_reward"] = mean_stderr(list(stage.by_prompt(stage.rewards).values()))
    figures |= {name: stage.evaluation[name] for name in DIVERGENCES if name in stage.evaluation}
    figures["length"] = over_prompts(lambda sample: float(len(sample["response_tokens"])))
    figures["finished"] = over_prompts(lambda sample: float(sample["finish"] == "stop"))
    figures["distinct_words"] = over_prompts(lambda sample: distinct_words(sample["response"]))
    return figures


def paired_difference(stage: Stage, baseline: Stage) -> Figure:
    """Mean difference of true reward over the prompts that both continued, with its paired standard error."""
    if stage.rewards is None or baseline.rewards is None:
        raise ValueError("a difference in true reward needs a known reward")
    ours, theirs = stage.by_prompt(stage.rewards), baseline.by_prompt(baseline.rewards)
    shared = [index for index in ours if index in theirs]
    if not shared:
        raise SystemExit(f"{stage.label} and {baseline.label} have no prompt in common, so they cannot be compared")
    return mean_stderr([ours[index] - theirs[index] for index in shared])


def verdict(stage: str, baseline: str, difference: Figure) -> str:
    """A plain sentence on a difference; two standard errors are asked for before it is called one."""
    mean, stderr, count = difference["mean"], difference["stderr"], difference["count"]
    measured = f"{mean:+.3f} ± {stderr or 0:.3f}, paired over {count} prompts"
    if stderr is None or abs(mean) < 2 * stderr or mean == 0:
        return f"{stage} and {baseline} do not differ in true reward by more than chance explains ({measured})."
    size = f", {abs(mean) / stderr:.1f} standard errors" if stderr else ""
    return f"The true reward of {stage} is {'above' if mean > 0 else 'below'} that of {baseline} ({measured}{size})."
