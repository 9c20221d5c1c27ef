"""``aligndistil inspect``: given responses, token by token as AlignDistil sees them, on one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from megatron_aligndistil import algorithms
from megatron_aligndistil.commands.inspection_page import write_page
from megatron_aligndistil.commands.options import describe, processes_for, run_on_processes, take, wants_help
from megatron_aligndistil.config import (
    DataConfig,
    ParallelConfig,
    PrecisionConfig,
    Section,
    TrainConfig,
    build,
    merge,
    parse_overrides,
    read_yaml,
)
from megatron_aligndistil.errors import ConfigError

if TYPE_CHECKING:
    from megatron_aligndistil.algorithms.aligndistil import AlignDistil

_USAGE = """usage: aligndistil inspect --models.dpo PATH --models.reverse PATH [--models.policy PATH] --out PAGE.html
                           (--data FILE | --prompt TEXT --response TEXT) [--nproc N] [--algorithm.KEY VALUE ...]

Writes one HTML page that needs no network: the tokens of each response coloured by contrastive reward, TVD, alpha or KL
of the policy from its teacher, with what every model finds likeliest there. A preference pair shows both responses.

--config FILE may be the configuration of an AlignDistil run, such as runs/aligndistil/config.yaml: its teacher's
settings, its frozen models, its limits of length, and the policy that it trained are then those of the page.
The keys of --algorithm: aligndistil train --algorithm.name aligndistil --help
"""


class InspectedModels(Section):
    policy: str | None = None
    """Checkpoint of the policy; without it the page has no KL of the policy from its teacher."""
    dpo: str | None = None
    """Checkpoint of the DPO model."""
    reverse: str | None = None
    """Checkpoint of the reverse DPO model."""
    reference: str | None = None
    """Checkpoint of the reference (initial) model, which the `vanilla` teachers have in the place of `reverse`."""


class InspectConfig(Section):
    out: str
    """HTML file to write."""
    data: str | None = None
    """Preference pairs, or responses: a file, a folder, or a name that `datasets` knows."""
    prompt: str | None = None
    """One prompt, in the place of `data`."""
    response: str | None = None
    """The response to `prompt`."""
    models: InspectedModels = InspectedModels()
    algorithm: dict[str, Any] = {}
    """AlignDistil's settings, as in training: `teacher`, `r`, `eps`, `beta0`, `beta`, `temperature`..."""
    top: int = Field(5, ge=1, le=100)
    """How many of each model's likeliest tokens to show."""
    max_records: int | None = Field(32, ge=1)
    """Use only the first so many records; null for all."""
    max_length: int = Field(2048, ge=2)
    """Longest sequence in tokens."""
    max_prompt_length: int = Field(1024, ge=1)
    """Longest prompt in tokens."""
    columns: dict[str, str] = {}
    """Keys of the records that are called otherwise, ours first, as in `data.columns` of training."""
    micro_size: int = Field(8, ge=1)
    """Examples in one forward pass of one data parallel rank."""
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if wants_help(arguments):
        print(_USAGE + "\nkeys:\n" + describe(InspectConfig))
        return 0
    nproc, rest = take(arguments, "--nproc")
    config = read_config(rest)
    check(config)
    tp, pp = config.parallel.tp, config.parallel.pp
    return run_on_processes("inspect", rest, nproc, lambda: processes_for(tp, pp), lambda: inspect(config))


def read_config(arguments: list[str]) -> InspectConfig:
    """``--config FILE``, of this command or of a training run, with the other arguments laid over it.

    Raises ConfigError for anything that is wrong.
    """
    path, rest = take(arguments, "--config")
    texts: dict[str, str] = {}
    for key in ("prompt", "response"):  # as they were typed: `yes`, `12` and `[a` are texts here and not YAML
        text, rest = take(rest, f"--{key}")
        texts |= {} if text is None else {key: text}
    values = read_yaml(path) if path else {}
    if "run" in values:
        values = _of_training(build(TrainConfig, values))
    return build(InspectConfig, merge(values, parse_overrides(rest) | texts))


def _of_training(config: TrainConfig) -> dict[str, Any]:
    """What a training run's configuration says of its teacher, its models and its data."""
    models, data = config.models, config.data
    return {
        "algorithm": config.algorithm,
        "models": {
            "policy": str(Path(config.run.dir) / "policy"),
            "dpo": models.dpo,
            "reverse": models.reverse,
            "reference": models.reference or models.policy,
        },
        "max_length": data.max_length,
        "max_prompt_length": data.max_prompt_length,
        "columns": data.columns,
        "precision": config.precision.model_dump(),
    }


def check(config: InspectConfig) -> None:
    """Raise ConfigError when the settings are not AlignDistil's, or a model or what to inspect is missing."""
    algorithm = _algorithm(config)
    for name in ("dpo", algorithm.negative):
        if getattr(config.models, name) is None:
            raise ConfigError(f"inspect needs --models.{name} for the teacher {algorithm.config.teacher}")
    if config.data is not None and (config.prompt is not None or config.response is not None):
        raise ConfigError("inspect takes --data, or --prompt with --response, and not both")
    if config.data is None and (config.prompt is None or config.response is None):
        raise ConfigError("inspect needs --data FILE, or --prompt TEXT with --response TEXT")


def _algorithm(config: InspectConfig) -> AlignDistil:
    name = config.algorithm.get("name", "aligndistil")
    if name != "aligndistil":
        raise ConfigError(
            f"inspect shows the teacher of aligndistil, and algorithm.name is {name}; give the configuration of an "
            "aligndistil run, or the models with --models.dpo and --models.reverse"
        )
    algorithm: Any = algorithms.build({"name": name, **config.algorithm})
    return algorithm


def inspect(config: InspectConfig) -> None:
    """Load the models, look at every response, and write the page."""
    from megatron_aligndistil.data.given import load_given, one_response
    from megatron_aligndistil.data.tokenizer import load_tokenizer
    from megatron_aligndistil.engine import checkpoint, inspection
    from megatron_aligndistil.engine.batches import batches_in_order
    from megatron_aligndistil.engine.frozen import load_frozen
    from megatron_aligndistil.engine.inspection_data import page_data
    from megatron_aligndistil.engine.parallel import parallel_session
    from megatron_aligndistil.engine.reporter import track
    from megatron_aligndistil.models.architecture import require_same

    algorithm = _algorithm(config)
    wanted = {name: getattr(config.models, name) for name in ("policy", "dpo", algorithm.negative)}
    paths = {name: path for name, path in wanted.items() if path}
    architectures = {name: checkpoint.read_architecture(path) for name, path in paths.items()}
    require_same(architectures)
    arch = architectures["dpo"]
    tokenizer = load_tokenizer(checkpoint.description_folder(next(iter(paths.values()))))
    with parallel_session(config.parallel) as parallel:
        limits = _limits(config)
        if config.prompt is not None and config.response is not None:
            dataset = one_response(config.prompt, config.response, limits, tokenizer)
            source = made_of = "one prompt and response"
        else:
            dataset, report = load_given(limits, tokenizer)
            source, made_of = f"{len(dataset)} records of {config.data}", f"{config.data}, {report}"
        models = {name: load_frozen(path, arch, parallel, config.precision) for name, path in paths.items()}
        batches = batches_in_order(dataset, config.micro_size, tokenizer, arch, parallel)
        with track("inspect", batches.steps_per_epoch, parallel.is_reporter) as advance:
            found = inspection.inspect(
                models, algorithm, config.top, batches, parallel, dataset.rows_per_example, advance
            )
        if parallel.is_reporter:
            write_page(Path(config.out), page_data(source, paths, algorithm, tokenizer, dataset, found))
            print(f"{config.out}, to be opened in a browser, shows {made_of}")


def _limits(config: InspectConfig) -> DataConfig:
    return DataConfig(
        train=config.data or "",
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        max_records=config.max_records,
        columns=config.columns,
    )
