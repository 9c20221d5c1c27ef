"""The configuration of a run: YAML files and dotted overrides, checked against typed sections.

This module stays free of torch so that ``--help`` answers at once. The ``algorithm`` section belongs to the
algorithm's own file; it is kept here as a mapping and checked by :mod:`megatron_aligndistil.algorithms`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_aligndistil.errors import ConfigError


class Section(BaseModel):
    """A group of keys. Unknown keys are errors; the docstring under each key is its help text."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


SectionT = TypeVar("SectionT", bound=Section)


class ModelsConfig(Section):
    policy: str
    """Checkpoint that training starts from: a Hugging Face folder or a Megatron distributed checkpoint."""
    reference: str | None = None
    """Frozen reference model; the policy's own starting checkpoint when not given."""
    dpo: str | None = None
    """Frozen DPO model (AlignDistil)."""
    reverse: str | None = None
    """Frozen reverse DPO model (AlignDistil)."""
    reward: str | None = None
    """Frozen reward model, a sequence classification checkpoint; where one is trained, what it starts from."""
    critic: str | None = None
    """What the critic starts from; the reward model, or the policy's own checkpoint, when not given."""
    init: Literal["pretrained", "scratch"] = "pretrained"
    """`scratch` draws random weights for the policy and needs only config.json and a tokenizer."""


class DataConfig(Section):
    train: str
    """Training records: a JSON, JSONL or Parquet file, a folder of them, or a name that `datasets` knows."""
    eval: str | None = None
    """Records for evaluation during and after training, in the same format."""
    max_length: int = Field(2048, ge=2)
    """Longest sequence in tokens; a longer response is cut at its end."""
    max_prompt_length: int = Field(1024, ge=1)
    """Longest prompt in tokens; a longer prompt loses its beginning."""
    max_records: int | None = Field(None, ge=1)
    """Use only the first so many records."""
    responses: Literal["chosen", "rejected", "both"] = "chosen"
    """Which response of a preference pair an algorithm of single responses (SFT, AlignDistil) learns on."""
    columns: dict[str, str] = {}
    """Keys of these records that are called otherwise, ours first: `{prompt: question, chosen: best_answer}`."""
    shuffle: bool = True
    """Draw a new order each epoch."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a malformed record does: end the run, or be left out, counted, and the first few named."""
    cache: str | None = None
    """Folder where tokens are kept for the next start; $ALIGNDISTIL_CACHE, or aligndistil in the user's cache folder
    ($XDG_CACHE_HOME or ~/.cache), when not given."""
    workers: int | None = Field(None, ge=1)
    """Processes that tokenise; for much data one a CPU core, up to 16, when not given."""


class ParallelConfig(Section):
    tp: int = Field(1, ge=1)
    """Tensor parallel size: each layer and the vocabulary are split over so many processes."""
    pp: int = Field(1, ge=1)
    """Pipeline parallel size: the layers are split into so many stages."""
    vpp: int = Field(1, ge=1)
    """Model chunks per pipeline stage; above 1 the interleaved schedule is used."""
    sequence_parallel: bool = False
    """Split activations between tensor parallel regions along the sequence as well (needs tp > 1)."""


class PrecisionConfig(Section):
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Weights and activations; bf16 keeps fp32 master weights. `auto`: bf16 with CUDA, fp32 without.
    fp16 is for conversion and generation: training has no loss scaling."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """FP8 format of matrix products through Transformer Engine (Megatron's `fp8`); needs a GPU."""
    fp8_recipe: Literal["delayed", "tensorwise", "mxfp8", "blockwise"] = "delayed"
    """FP8 scaling recipe (Megatron's `fp8_recipe`)."""


class BatchConfig(Section):
    global_size: int = Field(128, ge=1)
    """Examples (a preference pair is one) in one optimiser step, over all processes."""
    micro_size: int = Field(1, ge=1)
    """Examples in one forward pass of one data parallel rank, their rows padded to one length; has no effect where
    `max_tokens` is given."""
    max_tokens: int | None = Field(None, ge=1)
    """Pack rows one behind another, without padding between them, into forward passes of at most so many tokens, which
    are shared out evenly over data parallel ranks; a pair stays together. Losses and gradients stay the same."""


class OptimConfig(Section):
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of all steps over which the learning rate rises linearly from 0."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    clip: float = Field(1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    distributed: bool = True
    """Megatron's distributed optimiser: states are split over data parallel ranks."""


class RolloutConfig(Section):
    max_new_tokens: int = Field(1024, ge=1)
    """Longest sampled response in tokens."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    top_k: int = Field(0, ge=0)
    """Draw from so many of the likeliest tokens only; 0, as the method asks, allows all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability; 1, as the method asks, allows all."""
    stop: list[str] = []
    """Texts that end a response, beside the tokenizer's end of sequence."""
    batch_size: int = Field(64, ge=1)
    """Responses in progress at a time on one data parallel rank; a finished one makes room for the next prompt."""
    samples: int = Field(1, ge=1)
    """Responses a prompt; `batch.global_size` counts responses."""
    updates: int = Field(1, ge=1)
    """Optimiser steps on one rollout: so many global batches are sampled at once, and the last is so many steps old."""
    ahead: bool = False
    """Sample the next rollout while this one is learned on, with weights older by one rollout; takes one more copy of
    the weights."""
    on_policy_fraction: float = Field(1.0, ge=0, le=1)
    """Share of each global batch that the policy samples; the rest are the records' own responses (GKD's λ)."""
    mask_truncated: bool = False
    """Leave responses that reached `max_new_tokens` out of the loss."""
    reward: str | None = None
    """Python function that rates responses, as package.module:function or path/to/file.py:function. It is called once a
    rollout with the keywords `prompts` and `completions`, lists of texts, and returns a number for each."""


class RunConfig(Section):
    dir: str
    """Folder for everything this run writes: config.yaml, metrics, checkpoints, the exported model."""
    seed: int = Field(0, ge=0)
    """Seed of data order and of weights drawn from scratch."""
    epochs: int = Field(1, ge=1)
    """Passes over the training records."""
    steps: int | None = Field(None, ge=1)
    """Optimiser steps; replaces `epochs` when given."""
    log_every: int = Field(1, ge=1)
    """Steps between lines of metrics."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations; only at the end when not given."""
    save_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; only at the end when not given."""
    keep: int = Field(2, ge=1)
    """How many checkpoints to keep, beside the best."""
    best: str | None = Field(None, pattern=r"^(lowest|highest) eval/\S+$")
    """Which checkpoint is the best, of those whose step was evaluated: `lowest eval/dpo/loss`, `highest
    eval/policy/reward` and so on; it stays, and `checkpoints/best` leads to it. The lowest loss of the first trained
    model when not given (with REINFORCE, PPO and RTO the highest reward)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: attention only (`selective`) or whole layers (`full`)."""
    max_skipped: int = Field(5, ge=0)
    """How many steps in a row may be skipped because the loss or the gradient was not finite (NaN or infinite); at one
    more the run stops, with a checkpoint and the rows in `bad_batches/`. 0 stops at the first."""
    hang_timeout: float = Field(1800.0, ge=0)
    """Seconds without progress in any process (longer than any step) after which the run says where each process stands
    and ends; 0 waits for ever."""
    wandb: str | None = None
    """Weights & Biases project to log to as well."""


class TrainConfig(Section):
    """One training stage."""

    algorithm: dict[str, Any]
    """The algorithm, by `algorithm.name`, and its own settings."""
    models: ModelsConfig
    data: DataConfig
    run: RunConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    rollout: RolloutConfig = RolloutConfig()
    """How on-policy algorithms sample."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises ConfigError when the file is missing, not YAML, or not a mapping."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no mapping of keys to values; see examples/ for configurations")
    return content


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """Turn ``--optim.lr 5e-7 --run.dir=x`` into nested keys; values are read as YAML."""
    overrides: dict[str, Any] = {}
    pending = iter(arguments)
    for argument in pending:
        if not argument.startswith("--"):
            raise ConfigError(f"unexpected argument '{argument}'; overrides look like --optim.lr 5e-7")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            try:
                text = next(pending)
            except StopIteration:
                raise ConfigError(f"--{key} needs a value, as in --{key} VALUE") from None
        section = overrides
        *parents, leaf = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"--{key}: {parent} already has a plain value")
        try:
            section[leaf] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--{key} {text}: the value is not YAML; put quotes around a text") from None
    return overrides


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def build(schema: type[SectionT], values: Mapping[str, Any], where: str = "") -> SectionT:
    """Check `values` against `schema`. Raises ConfigError naming every wrong key, with the nearest known one."""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        problems = error.errors()
        missing = [problem for problem in problems if problem["type"] == "missing"]
        explained = [_explain(schema, problem, where) for problem in problems if problem not in missing]
        if missing:
            keys = [key for problem in missing for key in _required(schema, [str(part) for part in problem["loc"]])]
            names = ", ".join(f"{where}.{key}" if where else key for key in keys)
            explained.append(f"the configuration needs {names}; set each in the YAML file or as --KEY VALUE")
        raise ConfigError("; ".join(explained)) from None


def _required(schema: type[Section], location: list[str]) -> Iterator[str]:
    """The keys that have to be given where `location` is missing: itself, or those of the section that it is."""
    key = ".".join(location)
    for name, default, kind, _ in walk(schema):
        if default is ... and (name == key or name.startswith(key + ".")):
            # The one mapping that a schema does not know belongs to what its name says: an algorithm.
            yield f"{name}.name" if kind.startswith("dict") else name


def _explain(schema: type[Section], problem: Any, where: str) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join([where, *location] if where else location)
    if problem["type"] == "extra_forbidden":
        known = {name: doc for name, _, _, doc in walk(schema)}
        sections = {name.rpartition(".")[0] for name in known} - {""}
        candidates = [*known, *sections]
        local = ".".join(location)
        # Words that a key abbreviates (learning_rate: lr) are no near spelling of it.
        initials = "".join(word[:1] for word in location[-1].split("_"))
        nearest = [name for name in candidates if name.rpartition(".")[2] == initials]
        nearest = nearest or difflib.get_close_matches(local, candidates, 1, 0.5)
        if not nearest:
            by_leaf = {name.rpartition(".")[2]: name for name in candidates}
            nearest = [by_leaf[leaf] for leaf in difflib.get_close_matches(location[-1], by_leaf, 1, 0.6)]
        hint = (
            f"did you mean {where + '.' if where else ''}{nearest[0]}?"
            if nearest
            else f"known keys: {', '.join(known)}"
        )
        return f"unknown configuration key {key}; {hint}"
    message = str(problem["msg"])
    return f"{key} = {problem['input']!r} cannot be used: {message[0].lower()}{message[1:]}"


def walk(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, Any, str, str]]:
    """Every key of a schema as (dotted name, default, type, help text); required keys have ``...`` as default."""
    for name, field in schema.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from walk(annotation, f"{prefix}{name}.")
        else:
            kind = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
            default = ... if field.is_required() else field.default
            yield f"{prefix}{name}", default, kind, field.description or ""


def write_yaml(values: Mapping[str, Any], path: Path) -> None:
    """Write a resolved configuration so that ``--config`` can read it again."""
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
