"""The course of an evaluation in one process: answers by an endpoint, verdicts by the judge, results and report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_aligndistil.commands.evaluation.config import JUDGED, SuiteConfig
from megatron_aligndistil.commands.evaluation.stores import (
    answer_store,
    answers_of,
    folder_of,
    missing_answers,
    read_measured,
    to_measure,
)
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.suites import client, report, results
from megatron_aligndistil.suites.alpaca_eval import AlpacaEval
from megatron_aligndistil.suites.arena_hard import ArenaHard
from megatron_aligndistil.suites.asks import Ask, Failure, Reply
from megatron_aligndistil.suites.base import Judging, Sampling, Suite
from megatron_aligndistil.suites.client import Endpoint
from megatron_aligndistil.suites.mt_bench import MTBench
from megatron_aligndistil.suites.page import with_interval
from megatron_aligndistil.suites.policy_shift import PolicyShift
from megatron_aligndistil.suites.progress import AskingProgress
from megatron_aligndistil.suites.reward_accuracy import RewardAccuracy
from megatron_aligndistil.suites.statistics import Figure
from megatron_aligndistil.suites.store import Store
from megatron_aligndistil.suites.tldr import Tldr


def build(config: SuiteConfig) -> dict[str, Suite]:
    """The suites by the name of their folder. Reads and checks every file that they need."""
    sampling = Sampling(
        config.sampling.temperature, config.sampling.max_new_tokens, config.sampling.top_p, config.sampling.seed
    )
    judging = Judging(config.judge.temperature, config.judge.max_tokens)
    limit = config.max_questions
    given = [name for name, path in config.models.model_dump().items() if path]
    makers: dict[str, Callable[[], Suite]] = {
        "alpaca_eval": lambda: AlpacaEval(config.alpaca_eval, sampling, judging, limit),
        "mt_bench": lambda: MTBench(config.mt_bench, sampling, judging, limit),
        "arena_hard": lambda: ArenaHard(config.arena_hard, sampling, judging, limit),
        "tldr": lambda: Tldr(config.tldr, sampling, judging, limit, "reward" in given),
        "policy_shift": lambda: PolicyShift(config.policy_shift, sampling, limit, given),
        "reward_accuracy": lambda: RewardAccuracy(config.reward_accuracy, given),
    }
    suites = [makers[name]() for name in config.suites]
    return {f"{suite.name}_{suite.version}" if isinstance(suite, ArenaHard) else suite.name: suite for suite in suites}


class Flow:
    """One model through all its suites.

    Requests that got no reply are gathered and told at the end: what came is kept, and the same command asks for the
    rest.
    """

    def __init__(self, config: SuiteConfig, suites: Mapping[str, Suite]) -> None:
        self._config, self._suites = config, suites
        self._out = Path(config.out)
        self._folder = folder_of(config)
        self._failures: list[tuple[str, Failure]] = []
        results.require_same(self._folder, config.title, config.identity)

    def folder(self, name: str) -> Path:
        """Where a suite's answers, verdicts and result are."""
        return self._folder / name

    def check_endpoints(self) -> None:
        """Raise ConfigError where an endpoint that will be needed cannot be used."""
        config = self._config
        stores = {name: answer_store(config, self.folder(name)) for name in self._suites}
        unanswered = any(missing_answers(suite, stores[name]) for name, suite in self._suites.items())
        if unanswered and config.endpoint and config.stage != "verdicts":
            client.check(self._answering())
        unjudged = any(self._missing_verdicts(name) for name in self._suites) or unanswered
        if unjudged and config.stage in ("all", "verdicts") and any(name in JUDGED for name in config.suites):
            client.check(self._judging())

    def _missing_verdicts(self, name: str) -> list[Ask]:
        store = self._verdict_store(name)
        return [ask for ask in self._suites[name].verdict_asks(self._answers(name)) if store.get(ask) is None]

    def _answering(self) -> Endpoint:
        config = self._config
        assert config.endpoint is not None and config.model is not None, "checked with the settings"
        return self._endpoint(config.endpoint, config.model, config.api_key_variable, config.route)

    def _judging(self) -> Endpoint:
        judge = self._config.judge
        assert judge.endpoint is not None and judge.model is not None, "checked with the settings"
        return self._endpoint(judge.endpoint, judge.model, judge.api_key_variable, "chat")

    def _endpoint(self, url: str, model: str, variable: str, route: str) -> Endpoint:
        requests = self._config.requests
        return Endpoint(
            url=url,
            model=model,
            api_key=os.environ.get(variable) or "none",
            route="chat" if route == "chat" else "completions",
            concurrency=requests.concurrency,
            timeout=requests.timeout,
            retries=requests.retries,
        )

    def answer(self) -> None:
        """Ask the endpoint for every answer that is not stored."""
        results.write_model(self._folder, self._config.title, self._config.identity)
        for name, suite in self._suites.items():
            store = answer_store(self._config, self.folder(name))
            failed: set[str] = set()
            turn = 0
            while asks := [ask for ask in missing_answers(suite, store) if ask.id not in failed]:
                turn += 1
                title = f"answers {name}" + (f", turn {turn}" if turn > 1 else "")
                failures = self._ask(title, self._answering(), asks, store)
                failed |= {failure.id for failure in failures}
                self._failures += [(f"answer {name}", failure) for failure in failures]
            store.close()

    def judge(self) -> None:
        """Ask the judge for every verdict that is not stored."""
        for name in self._suites:
            missing = self._missing_verdicts(name)
            if missing:
                store = self._verdict_store(name)
                known = len(self._suites[name].verdict_asks(self._answers(name))) - len(missing)
                failures = self._ask(f"verdicts {name}", self._judging(), missing, store, known)
                self._failures += [(f"verdict {name}", failure) for failure in failures]
                store.close()

    def report(self) -> None:
        """Work out the results of this model, and write the report on all models in the folder."""
        results.write_model(self._folder, self._config.title, self._config.identity)
        for name, suite in self._suites.items():
            answers = self._answers(name)
            if not answers and suite.asks({}):
                if self._failures:
                    continue
                raise ConfigError(f"{name} has no stored answer by this model; run the stage `answers` first")
            verdicts = self._verdict_store(name).known(suite.verdict_asks(answers))
            if to_measure(self._config, suite, self.folder(name)) is not None:
                raise ConfigError(f"{name} has something left to measure; run the stage `engine` first")
            result = suite.score(answers, verdicts, read_measured(self.folder(name)))
            if suite.name in JUDGED:
                judge = self._config.judge
                result.settings |= {"judge": judge.model, "judge temperature": judge.temperature}
            sampling = {key: value for key, value in self._config.sampling.model_dump().items() if value is not None}
            result.settings |= {"questions asked": self._config.max_questions or "all", "sampling": _listed(sampling)}
            cut = {
                "answers cut at their length limit": sum(reply.finish == "length" for reply in answers.values()),
                "prompts that lost their beginning": sum(reply.prompt_cut for reply in answers.values()),
            }
            result.counts |= {key: count for key, count in cut.items() if count}
            results.write_result(self.folder(name), result)
            _say(result.suite, result.figures)
        written = report.write(self._out)
        print(f"wrote {written[0]} with {', '.join(path.name for path in written[1:])}", flush=True)

    def complain(self) -> None:
        """Raise ConfigError where requests got no reply."""
        if self._failures:
            what, last = self._failures[-1]
            raise ConfigError(
                f"{len(self._failures)} requests got no reply and count in no figure (the last: {what} {last.id}: "
                f"{last.reason}); once that is mended the same command asks for these only"
            )

    def _answers(self, name: str) -> dict[str, Reply]:
        return answers_of(self._suites[name], answer_store(self._config, self.folder(name)))

    def _verdict_store(self, name: str) -> Store:
        judge = self._config.judge
        return Store(self.folder(name) / "verdicts.jsonl", f"{judge.model} (served)")

    def _ask(self, title: str, endpoint: Endpoint, asks: Sequence[Ask], store: Store, known: int = 0) -> list[Failure]:
        with AskingProgress(title, known + len(asks), known) as progress:

            def keep(ask: Ask, reply: Reply) -> None:
                store.add(ask, reply)
                progress.add(reply)

            return client.ask_all(endpoint, asks, keep)


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _say(suite: str, figures: Mapping[str, Figure]) -> None:
    print(f"{suite}: " + ", ".join(f"{name} {with_interval(figure)}" for name, figure in figures.items()), flush=True)
