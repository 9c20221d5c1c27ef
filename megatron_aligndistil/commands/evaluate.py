"""``aligndistil evaluate``: what models measure on a dataset; with ``--suite``, benchmarks (see evaluate_suite.py)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_aligndistil.commands.options import describe, parse, processes_for, run_on_processes, take, wants_help
from megatron_aligndistil.config import DataConfig, ParallelConfig, PrecisionConfig, Section, read_yaml
from megatron_aligndistil.errors import ConfigError

_USAGE = """usage: aligndistil evaluate --measure accuracy|kl|score --data FILE --models.NAME PATH ... [--out FILE.json]
                            [--nproc N] [--KEY VALUE ...]
       aligndistil evaluate --suite NAME[,NAME ...] ...     benchmarks with a judge: see --suite --help

accuracy: how often each reward prefers the chosen response of a pair. With a reference: log(policy/reference),
          log(dpo/reference), log(reference/reverse); with dpo and reverse: the contrastive reward log(dpo/reverse);
          with a reward model: its score.
kl:       KL of the policy from each other model, summed over a response, with entropy and length, on the
          responses of FILE (such as `aligndistil generate` writes).
score:    what the reward model says of the responses of FILE.
"""


class EvaluatedModels(Section):
    policy: str | None = None
    """Checkpoint of the policy."""
    reference: str | None = None
    """Checkpoint of the reference (initial) model."""
    dpo: str | None = None
    """Checkpoint of the DPO model."""
    reverse: str | None = None
    """Checkpoint of the reverse DPO model."""
    reward: str | None = None
    """Checkpoint of a reward model (accuracy and score)."""


class EvaluateConfig(Section):
    measure: Literal["accuracy", "kl", "score"]
    """What to measure."""
    data: str
    """Preference pairs (accuracy) or responses (kl, score)."""
    out: str | None = None
    """JSON file to write as well."""
    models: EvaluatedModels = EvaluatedModels()
    max_length: int = Field(2048, ge=2)
    """Longest sequence in tokens."""
    max_prompt_length: int = Field(1024, ge=1)
    """Longest prompt in tokens."""
    micro_size: int = Field(8, ge=1)
    """Examples in one forward pass of one data parallel rank."""
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if _names_a_suite(arguments):
        from megatron_aligndistil.commands import evaluate_suite

        return evaluate_suite.run(arguments)
    if wants_help(arguments):
        print(_USAGE + "\nkeys:\n" + describe(EvaluateConfig))
        return 0
    nproc, rest = take(arguments, "--nproc")
    config = parse(EvaluateConfig, rest)
    check(config)
    tp, pp = config.parallel.tp, config.parallel.pp
    return run_on_processes("evaluate", rest, nproc, lambda: processes_for(tp, pp), lambda: evaluate(config))


def _names_a_suite(arguments: list[str]) -> bool:
    """Whether the arguments, or the YAML file that they name, ask for a suite."""
    if any(argument == "--suite" or argument.startswith("--suite=") for argument in arguments):
        return True
    path, _ = take(arguments, "--config")
    return path is not None and "suite" in read_yaml(path)


def check(config: EvaluateConfig) -> None:
    """Raise ConfigError when the models given are not those that the measure needs."""
    given = {name for name, path in config.models.model_dump().items() if path}
    if config.measure == "kl" and "reward" in given:
        raise ConfigError("measure kl compares language models; leave models.reward out")
    if config.measure == "kl" and ("policy" not in given or len(given) < 2):
        raise ConfigError("measure kl needs --models.policy and at least one model to compare it with")
    if config.measure == "score" and given != {"reward"}:
        raise ConfigError("measure score takes --models.reward and no other model")
    enough = "reward" in given or {"dpo", "reverse"} <= given or ("reference" in given and len(given) > 1)
    if config.measure == "accuracy" and not enough:
        raise ConfigError(
            "measure accuracy needs --models.reference and another model, --models.dpo and --models.reverse, or "
            "--models.reward"
        )


def evaluate(config: EvaluateConfig) -> None:
    """Load the models, measure, print a table, and write the JSON file."""
    measured = measure(config)
    if measured is None:
        return
    from rich.console import Console
    from rich.table import Table

    report, found = measured
    print(f"{config.measure} on {config.data}: {report}")
    table = Table()
    for column in ("measure", "mean", "standard error", "examples"):
        table.add_column(column)
    for name, estimate in found.items():
        table.add_row(name, f"{estimate.mean:.4f}", f"{estimate.stderr:.4f}", str(estimate.count))
    Console().print(table)
    if config.out:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        Path(config.out).write_text(json.dumps({name: asdict(each) for name, each in found.items()}, indent=2) + "\n")


def measure(config: EvaluateConfig) -> tuple[str, dict[str, Any]] | None:
    """Load the models and measure: what became of the records, and an Estimate by name; on the reporting rank only."""
    from megatron_aligndistil.algorithms.base import Need
    from megatron_aligndistil.data.dataset import load_dataset
    from megatron_aligndistil.data.tokenizer import load_tokenizer
    from megatron_aligndistil.engine import checkpoint, evaluation
    from megatron_aligndistil.engine.batches import batches_in_order
    from megatron_aligndistil.engine.frozen import load_frozen
    from megatron_aligndistil.engine.parallel import parallel_session
    from megatron_aligndistil.engine.reporter import track
    from megatron_aligndistil.models.architecture import require_same

    paths = {name: path for name, path in config.models.model_dump().items() if path}
    architectures = {
        name: checkpoint.read_architecture(path, "scalar" if name == "reward" else "lm") for name, path in paths.items()
    }
    require_same(architectures)
    arch = next(iter(architectures.values()))
    tokenizer = load_tokenizer(checkpoint.description_folder(next(iter(paths.values()))))
    limits = DataConfig(train=config.data, max_length=config.max_length, max_prompt_length=config.max_prompt_length)
    accuracy = config.measure == "accuracy"
    measures = {
        "accuracy": evaluation.reward_accuracy,
        "kl": evaluation.divergence,
        "score": evaluation.reward_score,
    }
    with parallel_session(config.parallel) as parallel:
        dataset, report = load_dataset(limits, config.data, tokenizer, "pairs" if accuracy else "responses")
        models = {}
        needs: dict[str, Need] = {}
        for name, path in paths.items():
            models[name] = load_frozen(path, architectures[name], parallel, config.precision)
            needs[name] = "score" if name == "reward" else "logprobs" if accuracy else "distribution"
        batches = batches_in_order(dataset, config.micro_size, tokenizer, arch, parallel)
        with track(f"evaluate {config.measure}", batches.steps_per_epoch, parallel.is_reporter) as advance:
            found = evaluation.evaluate(
                models,
                needs,
                measures[config.measure],
                batches,
                parallel,
                advance,
            )
        return (str(report), found) if parallel.is_reporter else None
