"""What commands share on the command line: a YAML file, dotted overrides, help, and local processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megatron_aligndistil.commands.launch import run_local, under_torchrun
from megatron_aligndistil.config import Section, build, merge, parse_overrides, read_yaml, walk
from megatron_aligndistil.errors import ConfigError

SectionT = TypeVar("SectionT", bound=Section)


def take(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    """Remove ``option VALUE`` or ``option=VALUE`` from `arguments`; returns the value, or None, and the rest."""
    rest, value = [], None
    pending = iter(arguments)
    for argument in pending:
        if argument == option:
            value = next(pending, None)
            if value is None:
                raise ConfigError(f"{option} needs a value")
        elif argument.startswith(option + "="):
            value = argument[len(option) + 1 :]
        else:
            rest.append(argument)
    return value, rest


def parse(schema: type[SectionT], arguments: list[str]) -> SectionT:
    """``--config FILE`` with the other arguments laid over it. Raises ConfigError for anything that is wrong."""
    path, overrides = take(arguments, "--config")
    values = read_yaml(path) if path else {}
    return build(schema, merge(values, parse_overrides(overrides)))


def wants_help(arguments: list[str]) -> bool:
    return any(argument in ("-h", "--help") for argument in arguments)


def describe(schema: type[Section], prefix: str = "") -> str:
    """One entry a key: name, default, and help text."""
    lines = []
    for name, default, _, text in walk(schema, prefix):
        shown = "required" if default is ... else f"default {default}"
        lines.append(f"  --{name}  ({shown})\n      {' '.join(text.split())}")
    return "\n".join(lines)


def run_on_processes(
    command: str, arguments: list[str], nproc: str | None, default: Callable[[], int], work: Callable[[], None]
) -> int:
    """Do `work` here when torchrun (or this function) started the process or one is enough; else start local processes.

    `nproc` is what the user asked for; `default` says how many the layout needs.
    """
    if under_torchrun():
        from megatron_aligndistil.engine.parallel import process_group

        # Joined before any work, so that an error of any one process is known, and told, by one (see __main__).
        with process_group():
            work()
        return 0
    if nproc is not None and not nproc.isdigit():
        raise ConfigError(f"--nproc {nproc} is not a number of processes")
    count = int(nproc) if nproc else default()
    if count < 1:
        raise ConfigError(f"--nproc {count} starts no process; give at least 1")
    if count > 1:
        return run_local(count, [command, *arguments])
    work()
    return 0


def processes_for(tp: int, pp: int = 1) -> int:
    """All GPUs of this machine, or without one as many processes as one model replica needs."""
    import torch

    return torch.cuda.device_count() or tp * pp
