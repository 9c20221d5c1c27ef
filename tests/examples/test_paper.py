"""The paper's tables: which runs there are, and with which settings."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest

from megatron_aligndistil import algorithms
from megatron_aligndistil.commands.options import parse
from megatron_aligndistil.commands.pipeline import PipelineConfig, Stage, read_stages

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples" / name) for name in ("paper", "common", "demo")]

import fresh_prompts  # noqa: E402
import methods  # noqa: E402
import paper  # noqa: E402
import settings  # noqa: E402
import stories  # noqa: E402
from methods import METHODS, Run, Runs  # noqa: E402
from records import write_json, write_jsonl  # noqa: E402


def stages_of(run: Run) -> list[Stage]:
    return read_stages(parse(PipelineConfig, run.arguments))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_differs_in_nothing_that_is_not_its_own(method: str, here: Path) -> None:
    setting, described = settings.demo(None), METHODS[method]
    own = described.own.others[-1] if described.own and described.own.others else None
    run = Runs(setting, "runs/paper/rm").of(method, 1e-5, own, 3, final=True)
    train, samples, kl = (stage.settings for stage in stages_of(run))
    algorithm = algorithms.build(train.algorithm)
    for key, value in described.algorithm.items():
        assert getattr(algorithm.config, key) == value
    if own is not None:
        assert getattr(algorithm.config, described.own.key) == own
    assert described.trained in algorithm.trained
    assert samples.model == kl.models.policy == f"{run.folder}/train/{described.trained}"
    assert samples.prompts == "runs/demo/data/prompts_eval.jsonl"
    assert (train.optim.lr, train.run.seed, train.run.epochs, train.run.steps) == (1e-5, 3, 1, None)
    assert train.batch.global_size == 64 * (2 if algorithm.data == "unpaired" else 1)
    assert train.rollout.updates == (4 if "critic" in algorithm.trained else 1)
    assert (train.rollout.reward is not None) == (method == "ppo_known")
    uses_reward_model = "reward" in algorithm.frozen
    assert uses_reward_model == (method in methods.NEED_REWARD_MODEL)
    assert train.models.critic == ("runs/paper/rm" if uses_reward_model else "runs/demo/sft/policy")

    other = stages_of(Runs(setting, "runs/paper/rm").of("simpo", 1e-5, None, 3, final=True))[0].settings
    blank = {"algorithm": {}, "batch": other.batch, "rollout": other.rollout, "models": other.models}
    blank["run"] = train.run.model_copy(update={"dir": ""})
    assert train.model_copy(update=blank) == other.model_copy(update=blank)


def test_settings_are_chosen_on_other_prompts_than_the_tables_are_of(here: Path) -> None:
    for setting in (settings.demo(None), settings.node("model", ["pairs.jsonl"], "judge", 100, None)):
        tuning, final = (Runs(setting).of("dpo", 1e-4, 0.1, 0, final=final) for final in (False, True))
        prompts = [stages_of(run)[1].settings.prompts for run in (tuning, final)]
        assert prompts == [setting.validation, setting.test] and len(set(prompts)) == 2
        assert tuning.folder != final.folder
    assert methods.TUNING_SEED not in methods.SEEDS and len(methods.SEEDS) >= 3


def test_the_published_values_are_in_the_search() -> None:
    for name, method in METHODS.items():
        if method.follows is None:
            assert method.own is not None and len(method.own.others) == 1, name
            assert method.own.published not in method.own.others
        else:
            followed = METHODS[method.follows]
            assert followed.follows is None
            assert method.own is None or method.own.key == followed.own.key
    betas = [METHODS[f"constant_{constant:g}"].algorithm["beta"] for constant in methods.CONSTANTS]
    assert [0.1 / beta for beta in betas] == pytest.approx([1.0, 1.2, 1.5, 1.8, 2.0])


def test_numbers_are_read_back_as_numbers() -> None:
    import yaml

    for value in (1e-7, 3e-5, 0.1 / 1.2, 2.5, 10.0, True, "model"):
        assert yaml.safe_load(methods._text(value)) == pytest.approx(value) if value != "model" else "model"


def test_the_pipelines_of_a_model_of_ones_own_load(here: Path) -> None:
    setting = settings.node("model", ["pairs.jsonl"], "judge", 100, Path("runs/mine"))
    given = [part for name, value in setting.variables.items() for part in (f"--vars.{name}", value)]
    arguments = ["--config", "examples/paper/preferences.yaml", "--dir", "runs/mine", *given]
    stages = {stage.name: stage for stage in read_stages(parse(PipelineConfig, arguments))}
    dpo = stages["dpo and reverse dpo"].settings
    assert (dpo.models.policy, f"{dpo.run.dir}/reverse") == ("model", setting.variables["reverse"])
    assert stages["halves"].settings[-1] == "50"
    assert stages["samples of initial"].settings.prompts == setting.test
    reward = stages_of(Runs(setting).of_reward(1e-6))
    assert reward[0].settings.data.eval == setting.validation and reward[2].settings.models.reward.endswith("/reward")


def test_options_reach_every_pipeline_and_kto_doubles_a_batch_given(here: Path) -> None:
    variables, options = paper.split_options(["--vars.batch", "16", "--defaults.run.steps=3"])
    assert (variables, options) == ({"batch": "16"}, ["--defaults.run.steps", "3"])
    setting = settings.demo(None)
    given = dataclasses.replace(setting, variables={**setting.variables, **variables}, options=tuple(options))
    train = stages_of(Runs(given).of("kto", 1e-4, 0.1, 0, final=False))[0].settings
    assert (train.batch.global_size, train.run.steps) == (32, 3)
    with pytest.raises(SystemExit, match="unexpected argument 'steps'"):
        paper.split_options(["steps", "3"])


def test_several_files_of_pairs_become_one(here: Path) -> None:
    write_jsonl(here / "a.jsonl", [{"n": 1}])
    write_json(here / "b.json", [{"n": 2}, {"n": 3}])
    setting = settings.node("model", ["a.jsonl", "b.json"], "judge", 2, Path("runs/mine"))
    assert [json.loads(line)["n"] for line in Path(setting.variables["data"]).read_text().splitlines()] == [1, 2, 3]


def test_fresh_prompts_begin_no_known_text() -> None:
    rng = random.Random(1)  # the seed that would draw these very stories again
    known = [stories.write_story(rng) for _ in range(300)]
    texts = [story.text for story in known[:150]] + [story.prompt for story in known[150:]]
    fresh = fresh_prompts.fresh_prompts(200, texts, seed=1)
    assert len(set(fresh)) == 200
    assert not any(text.startswith(prompt) for prompt in fresh for text in texts)
