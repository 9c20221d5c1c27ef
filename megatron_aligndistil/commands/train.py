"""``aligndistil train``: one training stage."""

from __future__ import annotations

from megatron_aligndistil import algorithms
from megatron_aligndistil.commands.options import describe, parse, processes_for, run_on_processes, take, wants_help
from megatron_aligndistil.config import TrainConfig, parse_overrides

_USAGE = """usage: aligndistil train [--config FILE] [--nproc N] [--KEY VALUE ...]

Trains one stage. Without torchrun it starts its processes itself: --nproc of them, else one a GPU, else tp x pp.
A run that was stopped goes on from its last checkpoint when the same command is given again.

algorithms (--algorithm.name):
"""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if wants_help(arguments):
        print(_help(arguments))
        return 0
    nproc, rest = take(arguments, "--nproc")
    config = parse(TrainConfig, rest)
    algorithms.build(config.algorithm)  # so that a wrong key is told before any process is started

    def work() -> None:
        from megatron_aligndistil.engine.trainer import train

        train(config)

    return run_on_processes("train", rest, nproc, lambda: processes_for(config.parallel.tp, config.parallel.pp), work)


def _help(arguments: list[str]) -> str:
    overrides = parse_overrides([argument for argument in arguments if argument not in ("-h", "--help")])
    section = overrides.get("algorithm")
    name = section.get("name") if isinstance(section, dict) else None
    text = _USAGE + f"  {', '.join(algorithms.available())}\n"
    if name:
        text += f"\nkeys of {name}:\n{describe(algorithms.load(name).Config, 'algorithm.')}\n"
    else:
        text += "  (their own keys: aligndistil train --algorithm.name NAME --help)\n"
    return text + "\nkeys of every run:\n" + describe(TrainConfig)
