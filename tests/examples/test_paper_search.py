"""The paper's tables: how settings are chosen, and the pool that makes the runs."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples" / name) for name in ("paper", "common", "demo")]

import figures  # noqa: E402
import scoring  # noqa: E402
import search  # noqa: E402
import settings  # noqa: E402
from methods import Run, Runs  # noqa: E402
from pool import Pool, has_failed, is_done  # noqa: E402
from records import read_json, write_json, write_jsonl  # noqa: E402


class Done:
    """Stands for the training: notes the runs in the order asked for, and fails those it is told to."""

    def __init__(self, *diverging: tuple[str, float]) -> None:
        self.asked: list[Run] = []
        self._diverging = diverging

    def do(self, runs, later, describe, tolerate=False) -> None:
        self.asked += runs
        for run in runs:
            if tolerate and (run.method, run.lr) in self._diverging:
                write_json(run.folder / "failed.json", {"arguments": run.arguments, "said": "not finite"})


def outcomes_of(pool: Done, score, names: list[str]) -> dict[str, search.Outcome]:
    return search.Search(Runs(settings.demo(None)), pool, score, str).outcomes(names)


def test_the_rate_is_chosen_first_then_the_methods_own_value(here: Path) -> None:
    def score(run: Run) -> float:
        return -abs(math.log(run.lr / 3e-4)) - abs(run.own - 0.3)

    pool = Done()
    found = outcomes_of(pool, score, ["dpo"])["dpo"]
    tuned = [(run.lr, run.own) for run in found.tried]
    assert tuned == [(3e-4, 0.1), (1e-3, 0.1), (1e-4, 0.1), (3e-4, 0.3)]
    assert not any(run.final for run in found.tried) and {run.seed for run in found.tried} == {0}
    assert [(run.lr, run.own, run.seed, run.final) for run in found.finals] == [(3e-4, 0.3, n, True) for n in (1, 2, 3)]
    assert pool.asked == [*found.tried, *found.finals]


def test_the_search_goes_on_beyond_an_edge_once(here: Path) -> None:
    found = outcomes_of(Done(), lambda run: run.lr, ["kto"])["kto"]
    assert [run.lr for run in found.tried] == [3e-4, 1e-3, 3e-3, 3e-3]
    assert found.chosen is not None and found.chosen.lr == 3e-3


def test_what_follows_takes_the_settings_of_what_it_follows(here: Path) -> None:
    pool = Done()
    found = outcomes_of(pool, lambda run: -abs(run.lr - 3e-4) + run.own, ["constant_1.5", "vanilla", "ppo_known"])
    assert {run.method for run in pool.asked if not run.final} == {"off_policy", "ppo"}
    settings_of = {name: {(run.lr, run.own) for run in each.finals} for name, each in found.items()}
    assert settings_of == {"constant_1.5": {(3e-4, None)}, "vanilla": {(3e-4, 10.0)}, "ppo_known": {(3e-4, 0.07)}}
    assert all(each.chosen is None and not each.tried for each in found.values())


def test_a_setting_that_diverges_is_not_chosen(here: Path) -> None:
    found = outcomes_of(Done(("dpo", 1e-3)), lambda run: run.lr, ["dpo"])["dpo"]
    assert found.chosen is not None and found.chosen.lr == 3e-4
    with pytest.raises(SystemExit, match="no learning rate worked"):
        outcomes_of(Done(*(("kto", rate) for rate in (3e-4, 1e-3))), lambda run: run.lr, ["kto"])


def test_the_reward_model_is_chosen_by_its_loss(here: Path) -> None:
    losses = {1e-4: 0.66, 3e-4: 0.61, 1e-3: 0.64}
    runs = Runs(settings.demo(None))
    for rate, loss in losses.items():
        lines = [{"seconds/total": 1.0}, {"step": 2, "eval/reward/loss": loss, "eval/reward/accuracy": 0.5}]
        write_jsonl(runs.of_reward(rate).folder / "train" / "metrics.jsonl", lines)
    judged = figures.Figures(runs.setting, scoring.Scorer())
    found = search.Search(runs, Done(), judged.score, judged.describe).tune_reward()
    assert [run.lr for run in found] == [3e-4, 1e-3, 1e-4]


def write_pipeline(folder: Path, name: str, script: Path) -> Run:
    """A run whose pipeline is a script that notes which process ran it."""
    import yaml

    stage = {"name": "only", "script": [str(script), f"${{dir}}/parent-{name}"]}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"dir": "x", "stages": [stage]}))
    arguments = ["--config", str(folder / f"{name}.yaml"), "--dir", str(folder / name)]
    return Run("dpo", 1e-4, None, 1, True, folder / name, arguments)


def test_a_worker_does_several_runs_and_survives_one_that_fails(here: Path) -> None:
    script = here / "note.py"
    script.write_text("import os, sys\nopen(sys.argv[1], 'w').write(str(os.getppid()))\n")
    runs = [write_pipeline(here, name, script) for name in ("one", "two")]
    broken = write_pipeline(here, "broken", here / "absent.py")
    last = write_pipeline(here, "last", script)
    said: list[Run] = []
    with Pool(1) as pool:
        pool.do([*runs, broken, last], [], lambda run: str(said.append(run)), tolerate=True)
        assert said == [*runs, last] and has_failed(broken) and not is_done(broken)
        parents = [(run.folder / f"parent-{run.folder.name}").read_text() for run in [*runs, last]]
        assert parents[0] == parents[1] != parents[2]  # after the one that failed, another process
        pool.do([*runs, broken, last], [], lambda run: str(said.append(run)), tolerate=True)
        assert len(said) == 3  # nothing was done again
    assert all(is_done(run) for run in [*runs, last])
    assert "absent.py" in read_json(broken.folder / "failed.json")["said"]
