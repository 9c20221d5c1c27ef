"""``aligndistil evaluate --suite``: benchmarks with a judge, and a report of every model evaluated into one folder."""

from __future__ import annotations

from megatron_aligndistil.commands.evaluation.config import SuiteConfig, check
from megatron_aligndistil.commands.launch import under_torchrun
from megatron_aligndistil.commands.options import describe, parse, processes_for, run_on_processes, take, wants_help
from megatron_aligndistil.errors import ConfigError

_USAGE = """usage: aligndistil evaluate --suite NAME[,NAME ...] --out FOLDER
                            (--model PATH | --endpoint URL --model NAME) --judge.endpoint URL --judge.model NAME
                            [--nproc N] [--KEY VALUE ...]

suites: alpaca_eval, mt_bench, arena_hard, tldr       answered by the model, judged by the judge
        policy_shift, reward_accuracy                 measured by the engine, without a judge

The model is a checkpoint, sampled in process, or what an OpenAI-compatible server calls it (`aligndistil serve`, vLLM).
Every answer and verdict is written to FOLDER/MODEL/SUITE as it comes: the same command given again asks only for what
is missing. FOLDER/report.md, report.json and report.png are about all models evaluated into FOLDER, side by side.
"""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if wants_help(arguments):
        print(_USAGE + "\nkeys:\n" + describe(SuiteConfig))
        return 0
    nproc, rest = take(arguments, "--nproc")
    config = parse(SuiteConfig, rest)
    check(config)
    if under_torchrun() and config.stage != "engine":
        raise ConfigError(
            "torchrun is for what the engine does: give --stage engine, then run --stage verdicts without torchrun"
        )
    return _run(config, rest, nproc)


def _run(config: SuiteConfig, arguments: list[str], nproc: str | None) -> int:
    """Answers by an endpoint, then what the engine does on its processes, then verdicts and the report."""
    from megatron_aligndistil.commands.evaluation import engine
    from megatron_aligndistil.commands.evaluation.flow import Flow, build

    suites = build(config)
    flow = Flow(config, suites)
    if config.stage in ("all", "answers", "verdicts"):
        flow.check_endpoints()
    if config.stage in ("all", "answers") and config.endpoint:
        flow.answer()
    if config.stage == "engine" or (config.stage != "verdicts" and engine.has_work(config, suites)):
        # Processes started for it end before a judge is asked, for hours maybe.
        replica = config.parallel.tp * config.parallel.pp
        code = run_on_processes(
            "evaluate",
            [*arguments, "--stage", "engine"],
            nproc,
            lambda: processes_for(replica),
            lambda: engine.work(config, suites),
        )
        if code:
            return code
    if config.stage in ("all", "verdicts"):
        flow.judge()
        flow.report()
    flow.complain()
    return 0
