"""``aligndistil doctor``: what is installed, what will be used, and what to mend."""

from __future__ import annotations

from megatron_aligndistil.commands.environment import GPU, Finding, examine, gpus
from megatron_aligndistil.errors import ConfigError

_USAGE = """usage: aligndistil doctor

Shows what is installed and what a run on this machine will use. The exit code is 1 when something has to be mended.
"""

_COLOURS = {"ok": "green", "absent": "dim", "untested": "yellow", "wrong": "bold red"}


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(_USAGE)
        return 0
    if arguments:
        raise ConfigError(f"unexpected argument '{arguments[0]}'; doctor takes none")
    findings = examine()
    _show(findings)
    wrong = [finding.part for finding in findings if finding.status == "wrong"]
    print(f"\nwill run on: {destination(gpus())}")
    if wrong:
        print(f"to mend first: {', '.join(wrong)}")
    return 1 if wrong else 0


def destination(found: list[GPU]) -> str:
    """Where a run started now would compute, with what data type and layers."""
    if not found:
        return "CPU over gloo, fp32"
    names = ", ".join(f"{gpu.count} x {gpu.name}" for gpu in found)
    return f"{names} over nccl, bf16, Transformer Engine layers"


def _show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False)
    for heading in ("part", "found", "status", "what it means, and the remedy"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        text = finding.meaning + (f". Remedy: {finding.remedy}" if finding.remedy else "")
        status = Text(finding.status, style=_COLOURS[finding.status])
        table.add_row(Text(finding.part), Text(finding.found or "-"), status, Text(text))
    Console().print(table)
