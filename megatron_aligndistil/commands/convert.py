"""``aligndistil convert``: checkpoints between Hugging Face folders and Megatron's distributed format."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_aligndistil.commands.options import describe, parse, run_on_processes, take, wants_help
from megatron_aligndistil.config import ParallelConfig, PrecisionConfig, Section
from megatron_aligndistil.errors import ConfigError

_USAGE = """usage: aligndistil convert --source PATH --to hf|megatron --out PATH [--nproc N] [--KEY VALUE ...]

Weights are copied bit for bit, each process holding only its own part; tp and pp only share the work out, since either
format loads under any layout.
"""


class ConvertConfig(Section):
    source: str
    """Checkpoint to convert: a Hugging Face folder or a Megatron distributed checkpoint."""
    to: Literal["hf", "megatron"]
    """Format to write."""
    out: str
    """Folder to write; must not exist yet."""
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    """Data type of the weights written."""
    max_shard_gb: float = Field(5.0, gt=0)
    """Largest safetensors file, in 1e9 bytes."""
    parallel: ParallelConfig = ParallelConfig()


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if wants_help(arguments):
        print(_USAGE + "\nkeys:\n" + describe(ConvertConfig))
        return 0
    nproc, rest = take(arguments, "--nproc")
    config = parse(ConvertConfig, rest)
    if Path(config.out).exists():
        raise ConfigError(f"{config.out} exists already; name a new folder with --out")
    tp, pp = config.parallel.tp, config.parallel.pp
    return run_on_processes("convert", rest, nproc, lambda: max(tp * pp, 1), lambda: convert(config))


def convert(config: ConvertConfig) -> None:
    """Load the source into a Megatron model, split as `parallel` says, and write it in the other format."""
    from megatron_aligndistil.engine import checkpoint
    from megatron_aligndistil.engine.hf import save_folder, stored_dtype
    from megatron_aligndistil.engine.model import build_model
    from megatron_aligndistil.engine.parallel import parallel_session

    arch = checkpoint.read_architecture(config.source, "any")
    dtype = stored_dtype(config.source) if config.dtype == "keep" else config.dtype
    with parallel_session(config.parallel) as parallel:
        chunks = build_model(arch, parallel, PrecisionConfig(dtype=dtype))
        checkpoint.load_model(chunks, config.source, arch, parallel)
        if config.to == "megatron":
            checkpoint.save_model(chunks, Path(config.out), config.source, arch)
        else:
            description = checkpoint.description_folder(config.source)
            save_folder(
                chunks, arch, description, config.out, parallel=parallel, max_shard_bytes=config.max_shard_gb * 1e9
            )
        if parallel.is_reporter:
            print(f"wrote {config.out}", flush=True)
