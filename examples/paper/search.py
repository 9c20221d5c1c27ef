"""Choosing the settings of every method by the validation prompts, and its runs for the tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from methods import EXTENSIONS, FACTOR, METHODS, SEEDS, TUNING_SEED, Run, Runs
from pool import Pool, has_failed
from rates import rate_to_try

Score = Callable[[Run], float]  # higher is better


@dataclass(frozen=True)
class Outcome:
    """The runs of one method: those tried, the one chosen of them (None: it follows another), those of the tables."""

    tried: tuple[Run, ...]
    chosen: Run | None
    finals: tuple[Run, ...]


class Search:
    """Does all runs of some methods.

    Args:
        score: what settings are chosen by, asked of runs that are done.
        describe: one line on a run that is done.
    """

    def __init__(self, runs: Runs, pool: Pool, score: Score, describe: Callable[[Run], str]) -> None:
        self._runs, self._pool, self._score, self._describe = runs, pool, score, describe

    def tune_reward(self) -> list[Run]:
        """The runs of the reward model, best first."""
        make = self._runs.of_reward
        runs = [make(rate) for rate in self._runs.setting.rates]
        self._do(runs, [])
        for _ in range(EXTENSIONS):
            runs += (new := [make(rate) for rate in self._beyond(runs)])
            self._do(new, [])
        return sorted(runs, key=self._value, reverse=True)

    def outcomes(self, names: Sequence[str]) -> dict[str, Outcome]:
        """All runs of these methods; one that follows another comes with that other."""
        tuned = {name: METHODS[name].follows or name for name in names}
        tried = self._tune(list(dict.fromkeys(tuned.values())), [name for name in names if METHODS[name].follows])
        chosen = {name: max(runs, key=self._value) for name, runs in tried.items()}
        finals = {name: self._finals(name, chosen[tuned[name]]) for name in names}
        self._pool.do([run for runs in finals.values() for run in runs], [], self._describe)
        return {name: Outcome(tuple(tried.get(name, ())), chosen.get(name), tuple(finals[name])) for name in names}

    def _finals(self, name: str, chosen: Run) -> list[Run]:
        own = chosen.own if METHODS[name].own else None
        return [self._runs.of(name, chosen.lr, own, seed, final=True) for seed in SEEDS]

    def _tune(self, names: Sequence[str], following: Sequence[str]) -> dict[str, list[Run]]:
        """Learning rates at the published value, then the method's own hyper-parameter at the best of them."""
        published = {name: own.published if (own := METHODS[name].own) else None for name in names}
        tried = {
            name: [self._tuning(name, rate, published[name]) for rate in self._runs.setting.rates] for name in names
        }
        rest = [tried[name][0] for name in names for _ in SEEDS]
        rest += [self._finals(name, tried[METHODS[name].follows or name][0])[0] for name in following for _ in SEEDS]
        others = {name: own.others if (own := METHODS[name].own) else () for name in names}
        later = rest + [tried[name][0] for name in names for _ in others[name]]
        self._do([run for runs in tried.values() for run in runs], later)
        for _ in range(EXTENSIONS):
            more = {
                name: [self._tuning(name, rate, published[name]) for rate in self._beyond(runs)]
                for name, runs in tried.items()
            }
            self._do([run for runs in more.values() for run in runs], later)
            for name, runs in more.items():
                tried[name] += runs
        best = {name: max(runs, key=self._value).lr for name, runs in tried.items()}
        more = {name: [self._tuning(name, best[name], value) for value in others[name]] for name in names}
        self._do([run for runs in more.values() for run in runs], rest)
        return {name: runs + more[name] for name, runs in tried.items()}

    def _tuning(self, name: str, rate: float, own: float | None) -> Run:
        return self._runs.of(name, rate, own, TUNING_SEED, final=False)

    def _beyond(self, runs: Sequence[Run]) -> list[float]:
        """The learning rate beyond the edge where the best one lies, if it lies at one."""
        scores = {run.lr: self._value(run) for run in runs}
        if all(math.isinf(value) for value in scores.values()):
            raise SystemExit(f"no learning rate worked; see {runs[0].folder / 'log.txt'} and those beside it")
        rate = rate_to_try(scores, FACTOR)
        return [] if rate is None else [rate]

    def _value(self, run: Run) -> float:
        return -math.inf if has_failed(run) else self._score(run)

    def _do(self, runs: Sequence[Run], later: Sequence[Run]) -> None:
        """A setting under which training diverges is one not to choose, not the end of the search."""
        self._pool.do(runs, later, self._describe, tolerate=True)
