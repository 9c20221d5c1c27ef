"""The comparison of convergence: curves, levels, the choice of learning rates, its runs, its report."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest

from megatron_aligndistil import algorithms
from megatron_aligndistil.commands.options import parse
from megatron_aligndistil.commands.pipeline import PipelineConfig, Stage, read_stages
from megatron_aligndistil.config import TrainConfig

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples" / name) for name in ("convergence", "common", "demo")]

import compare  # noqa: E402
import curves  # noqa: E402
import jobs  # noqa: E402
import plan  # noqa: E402
import rates  # noqa: E402
import results  # noqa: E402
import tables  # noqa: E402
from jobs import METHODS, Run  # noqa: E402
from pool import Pool, is_done  # noqa: E402
from records import write_json, write_jsonl  # noqa: E402

# Curves


def test_steps_to_a_level_are_linear_between_steps() -> None:
    assert curves.steps_to([0.0, 1.0, 3.0], 2.0) == 1.5
    assert curves.steps_to([0.0, 1.0, 3.0], 3.0) == 2.0
    assert curves.steps_to([0.0, 4.0, 1.0, 4.0], 2.0) == 0.5  # the first time counts


def test_a_level_already_there_takes_no_step_and_one_never_reached_has_none() -> None:
    assert curves.steps_to([1.0, 2.0], 1.0) == 0.0
    assert curves.steps_to([1.0, 2.0], 0.5) == 0.0
    assert curves.steps_to([1.0, 2.0], 2.5) is None
    assert curves.steps_to([], 0.0) is None


def test_levels_are_shares_of_the_lowest_gain() -> None:
    assert curves.levels(1.0, [3.0, 2.0, 9.0], (0.5, 0.9)) == {"50%": 1.5, "90%": pytest.approx(1.9)}
    assert curves.levels(1.0, [3.0, 1.0], (0.5,)) == {}  # one that gained nothing: no level to ask for


def test_band_and_running_mean_by_hand() -> None:
    assert curves.band([[1.0, 2.0], [3.0, -2.0]]) == {"mean": [2.0, 0.0], "low": [1.0, -2.0], "high": [3.0, 2.0]}
    # Windows of 1, 3, 5, 3 and 1 values.
    assert curves.smooth([0.0, 0.0, 6.0, 0.0, 9.0]) == [0.0, 2.0, 3.0, 5.0, 9.0]
    assert curves.smooth([1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0]) == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0]
    assert curves.last_quarter([9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 1.0, 2.0]) == 1.5
    assert curves.last_quarter([9.0, 4.0]) == 4.0


def test_the_best_rate_and_where_to_look_next() -> None:
    assert rates.best_rate({1e-4: 1.0, 2e-4: 3.0, 4e-4: 3.0}) == 2e-4
    assert rates.rate_to_try({1e-4: 1.0, 2e-4: 3.0, 4e-4: 2.0}, 2.0) is None
    assert rates.rate_to_try({1e-4: 5.0, 2e-4: 3.0, 4e-4: 2.0}, 2.0) == 5e-5
    assert rates.rate_to_try({1e-4: 1.0, 2e-4: 3.0, 4e-4: 4.0}, 2.0) == 8e-4


# Runs


def stages_of(run: Run) -> list[Stage]:
    return read_stages(parse(PipelineConfig, run.arguments))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_differs_in_its_algorithm_alone(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = Run(method, batch=8, steps=48, lr=5e-5, seed=3)
    train, samples, kl = (stage.settings for stage in stages_of(run))
    assert isinstance(train, TrainConfig)
    config = algorithms.build(train.algorithm).config
    assert (config.beta0, config.beta) == (0.1, 0.08)
    assert train.algorithm["name"] == ("aligndistil" if method == "distribution" else "reinforce")
    assert method == "distribution" or config.level == method
    assert (train.batch.global_size, train.run.steps, train.optim.lr, train.run.seed) == (8, 48, 5e-5, 3)
    assert samples.model == f"{run.folder}/train/policy" and kl.models.policy == samples.model

    other = stages_of(Run("sentence", batch=8, steps=48, lr=5e-5, seed=3))[0].settings
    same = {"algorithm": {}, "run": train.run.model_copy(update={"dir": ""})}
    assert train.model_copy(update=same) == other.model_copy(update=same)


def test_no_prompt_is_answered_twice() -> None:
    assert all(batch * steps <= 3072 for batch, steps in plan.BATCHES.items())
    assert plan.TUNING_SEED not in plan.SEEDS and len(plan.SEEDS) >= 3


def test_the_models_are_those_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages with the same fingerprints: what `make demo` made is not made again."""
    monkeypatch.chdir(ROOT)
    demo, ours = (
        {stage.name: stage.fingerprint for stage in read_stages(parse(PipelineConfig, ["--config", path]))}
        for path in ("examples/demo/pipeline.yaml", "examples/convergence/models.yaml")
    )
    shared = list(ours)[: list(ours).index(compare.MODELS_STAGE) + 1]
    assert shared == list(demo)[: len(shared)]
    assert [ours[name] for name in shared] == [demo[name] for name in shared]
    assert not set(list(ours)[len(shared) :]) & set(demo)  # the record of both is one file


def test_a_run_is_done_when_its_record_has_these_very_settings(tmp_path, monkeypatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    run = Run("token", batch=8, steps=48, lr=1e-4, seed=1)
    assert not is_done(run)
    write_json(run.folder / "pipeline.json", {stage.name: stage.fingerprint for stage in stages_of(run)})
    assert is_done(run)
    assert not is_done(Run("token", batch=8, steps=48, lr=1e-4, seed=2))
    record = json.loads((run.folder / "pipeline.json").read_text())
    write_json(run.folder / "pipeline.json", record | {"kl": f"begun {record['kl']}"})
    assert not is_done(run)


def test_a_run_that_fails_is_told_with_its_log(tmp_path, monkeypatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)  # where there is no model to begin from
    run = Run("token", batch=8, steps=48, lr=1e-4, seed=1)
    with (
        Pool(2) as pool,
        pytest.raises(SystemExit, match=r"exit code 1; all that it said is in .*log.txt(.|\n)*runs/demo/sft/policy"),
    ):
        pool.do([run], [], str)


# Report


def write_run(run: Run, rewards: list[float]) -> None:
    """A run's files, to work by hand: responses of 10 tokens, KL twice the step, true rewards that cancel."""
    steps = [
        {"reward_token": reward, "reward_sampled": 10 * reward, "kl_dpo_sequence": 2.0 * n, "length": 10.0}
        for n, reward in enumerate(rewards)
    ]
    lines = [{f"train/policy/{key}": value for key, value in step.items()} | {"seconds/total": 0.5} for step in steps]
    write_jsonl(run.folder / "train" / "metrics.jsonl", lines)
    write_json(run.folder / "train" / "config.yaml", {"algorithm": {"beta": 0.5}})
    write_json(run.folder / "kl.json", {"kl_dpo": {"mean": 8.0, "stderr": 0.5, "count": 2}})
    write_samples(run.folder)


def write_samples(folder: Path) -> None:
    write_jsonl(folder / "samples.jsonl", [{"response": text, "response_tokens": [1]} for text in ("happy", "sad")])


def test_the_report_of_runs_worked_by_hand(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Straight lines, which a running mean leaves as they are.
    slopes = {"distribution": 4.0, "token": 2.0, "sentence": 1.0}
    searched, final = {}, {}
    for method, slope in slopes.items():
        searched[method] = [Run(method, 64, 9, rate, 0) for rate in (2e-4, 1e-4)]
        final[method] = [Run(method, 64, 9, 2e-4, seed) for seed in (1, 2)]
        for run in [*searched[method], *final[method]]:
            slower = 0.1 if run.lr == 1e-4 else 1.0
            write_run(run, [slower * slope * n + (0.5 if run.seed == 2 else 0.0) for n in range(9)])
    for name in ("initial", "dpo"):
        write_samples(jobs.MODELS / "convergence" / name)

    # Of the sentence level, n = 0 ... 8: reward n and n / 10; objective, 10 times that less half of the KL, 9 n and 0.
    assert results.scores(searched["sentence"], "reward") == {2e-4: 4.0, 1e-4: pytest.approx(0.4)}
    assert results.scores(searched["sentence"], "objective") == {2e-4: 36.0, 1e-4: pytest.approx(0.0)}
    found = results.comparison("reward", final)
    # From 0.25, the mean of the starts, to the lowest end, 7.75 (the sentence level's 7.5 and 8): half way is 4.
    assert found["levels"]["reward"]["50%"] == pytest.approx((0.25 + 7.75) / 2)
    steps = {name: method["steps_to"]["reward"]["50%"] for name, method in found["methods"].items()}
    assert steps["sentence"] == {"each": [pytest.approx(4.0), pytest.approx(3.5)], "mean": pytest.approx(3.75)}
    assert steps["token"]["each"] == [pytest.approx(2.0), pytest.approx(1.75)]
    ours = found["methods"]["distribution"]["final"]
    assert ours["kl"]["mean"] == 8.0 and ours["true_reward"] == {"mean": 0.0, "stderr": 0.0, "count": 2}
    curve = found["methods"]["token"]["curves"]["reward"]
    assert [high - low for low, high in zip(curve["low"], curve["high"], strict=True)] == pytest.approx([0.5] * 9)

    (tmp_path / "out").mkdir()
    content = {"plan": plan.in_sentences("x"), "baselines": results.baselines(), "comparisons": [found]}
    content["searches"] = [results.search_results(searched)]
    compare.write(content, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "convergence.json").read_text())["comparisons"][0]["tuned_for"] == "reward"
    text = (tmp_path / "out" / "report.md").read_text()
    images = re.findall(r"!\[.*\]\((.*)\)", text)
    assert set(images) == {path.name for path in (tmp_path / "out").glob("*.png")} and "convergence.png" in images
    assert "| scalar, sentence level | 3.8 (4.0, 3.5) |" in text
    assert "| scalar, token level | 0.0002 | **76.00** | **8.0000** |" in text

    (tmp_path / "out" / "reading.md").write_text("What a person says.")
    compare.write(content, tmp_path / "out")
    assert "What a person says." in (tmp_path / "out" / "report.md").read_text()


def test_a_mean_of_steps_needs_every_seed() -> None:
    cell = results._steps([[0.0, 2.0, 4.0], [0.0, 1.0, 2.0]], {"50%": 2.0, "90%": 3.0})
    assert cell == {"50%": {"each": [1.0, 2.0], "mean": 1.5}, "90%": {"each": [1.5, None], "mean": None}}
    methods = {
        name: {"label": name, "steps_to": {"reward": steps}}
        for name, steps in (("ours", cell | {"90%": {"each": [1.0], "mean": 1.0}}), ("theirs", cell))
    }
    found = {"batch": 8, "tuned_for": "reward", "levels": {"reward": {"50%": 2.0, "90%": 3.0}}, "methods": methods}
    assert "| theirs | 1.5 (1.0, 2.0) | – (1.5, never) |" in tables.level_table(found, "reward")
    _, cells = tables.summary_table({"comparisons": [found]}, "reward")
    assert cells == [["8, reward", "1.0", "–"]]


def test_where_nothing_is_gained_there_is_no_level() -> None:
    method = {"label": "ours", "steps_to": {"reward": {}}}
    found = {"batch": 8, "tuned_for": "reward", "levels": {"reward": {}}, "methods": {"distribution": method}}
    assert tables.summary_table({"comparisons": [found]}, "reward")[1] == [["8, reward", "–"]]
    assert tables.level_table(found, "reward") == [
        "One method did not gain any reward: there is no level that all reach."
    ]


def test_the_true_reward_has_its_error_over_prompts(tmp_path) -> None:
    write_samples(tmp_path)
    two = 2 / math.sqrt(19)
    figure = results.samples_of(tmp_path)["true_reward"]
    assert figure == {"mean": pytest.approx(0), "stderr": pytest.approx(two), "count": 2}
