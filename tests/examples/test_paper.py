"""The paper's tables: which runs there are, how settings are chosen, what the tables and plots say."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest

from megatron_aligndistil import algorithms
from megatron_aligndistil.commands.options import parse
from megatron_aligndistil.commands.pipeline import PipelineConfig, Stage, read_stages

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples" / name) for name in ("paper", "common", "demo")]

import claims  # noqa: E402
import corpus  # noqa: E402
import figures  # noqa: E402
import fresh_prompts  # noqa: E402
import methods  # noqa: E402
import page  # noqa: E402
import paper  # noqa: E402
import scoring  # noqa: E402
import search  # noqa: E402
import settings  # noqa: E402
import stories  # noqa: E402
from methods import METHODS, Run, Runs, Setting  # noqa: E402
from pool import Pool, has_failed, is_done  # noqa: E402
from records import read_json, write_json, write_jsonl  # noqa: E402


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, where paths of configurations hold."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stages_of(run: Run) -> list[Stage]:
    return read_stages(parse(PipelineConfig, run.arguments))


# Runs


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


# The choice of settings


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


# The pool


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


# Figures, claims, report


def write_model(folder: Path, texts: list[str], kl: float, length: int = 10) -> None:
    """Samples and KL of a model, to work by hand."""
    samples = [
        {"index": n, "response": text, "response_tokens": [1] * length, "finish": "stop"}
        for n, text in enumerate(texts)
    ]
    write_jsonl(folder / "samples.jsonl", samples)
    write_json(folder / "kl.json", {f"kl_{n}": {"mean": kl, "stderr": 0.1, "count": 2} for n in ("reference", "dpo")})


def write_run(run: Run, texts: list[str], kl: float, length: int = 10) -> Run:
    write_model(run.folder, texts, kl, length)
    write_jsonl(run.folder / "train" / "metrics.jsonl", [{"seconds/total": 0.5}, {"seconds/total": 1.5}])
    return run


TEXTS = {"good": ["love", "love"], "fair": ["good", "good"], "mixed": ["good", "bad"], "bad": ["bad", "bad"]}


def outcome(runs: Runs, method: str, texts: str, kl: float, length: int = 10) -> search.Outcome:
    """Three finals that say the same, and two runs of the search, one of which diverged."""
    own = METHODS[method].own.published if METHODS[method].own else None
    finals = [write_run(runs.of(method, 3e-4, own, n, True), TEXTS[texts], kl + n - 2, length) for n in (1, 2, 3)]
    if METHODS[method].follows:
        return search.Outcome((), None, tuple(finals))
    tried = [write_run(runs.of(method, 3e-4, own, 0, False), TEXTS[texts], kl), runs.of(method, 1e-3, own, 0, False)]
    write_json(tried[1].folder / "failed.json", {"arguments": tried[1].arguments, "said": ""})
    return search.Outcome(tuple(tried), tried[0], tuple(finals))


def gathered(setting: Setting) -> dict:
    """Figures of a whole set of runs, to work by hand."""
    runs = Runs(setting)
    for name, texts in (("initial", "bad"), ("teacher", "mixed")):
        write_model(setting.folder / name, TEXTS[texts], 0.0 if name == "initial" else 2.0)
    pair = {"reward_chosen": 1.0, "reward_rejected": 0.0}
    tie = {"reward_chosen": 0.0, "reward_rejected": 0.0}
    for name in ("train", "test_pairs"):
        write_jsonl(Path(setting.variables[name]), [pair, pair, pair, tie])
    accuracy = {"mean": 0.7, "stderr": 0.01, "count": 100}
    for part in ("train", "test"):
        measured = {
            "dpo_reward": accuracy,
            "contrastive_reward": {**accuracy, "mean": 0.75},
            "reverse_reward": accuracy,
        }
        write_json(setting.folder / f"accuracy_{part}.json", measured)
    found = {
        "dpo": outcome(runs, "dpo", "mixed", 4.0),
        "ppo": outcome(runs, "ppo", "good", 30.0),
        "off_policy": outcome(runs, "off_policy", "fair", 8.0),
        "vanilla": outcome(runs, "vanilla", "mixed", 8.0),
    }
    for number, constant in enumerate(methods.CONSTANTS):
        kl, length = 5.0 + 2 * number, 10 + 2 * number
        found[f"constant_{constant:g}"] = outcome(runs, f"constant_{constant:g}", "mixed", kl, length)
    return figures.gather(figures.Figures(setting, scoring.Scorer()), setting, found, [])


@pytest.fixture
def setting(here: Path) -> Setting:
    made = settings.demo(None)
    for name in ("train", "test_pairs"):
        Path(made.variables[name]).parent.mkdir(parents=True, exist_ok=True)
    return made


def test_figures_of_runs_worked_by_hand(setting: Setting) -> None:
    found = gathered(setting)
    off_policy = found["methods"]["off_policy"]
    assert off_policy["mean"]["reward"] == {"mean": pytest.approx(1 / 4), "stderr": 0.0, "count": 3}  # s = 1: 1/√16
    assert off_policy["mean"]["kl_reference"]["mean"] == pytest.approx(8.0)
    assert off_policy["mean"]["kl_reference"]["stderr"] == pytest.approx(1 / math.sqrt(3))
    assert off_policy["mean"]["win_rate"]["mean"] == 1.0
    assert found["methods"]["dpo"]["mean"]["win_rate"]["mean"] == 0.75  # one won, one tied
    assert found["models"]["initial"]["win_rate"]["mean"] == 0.5
    assert off_policy["tried"][0]["seconds_per_step"] == 1.0 and off_policy["tried"][1]["failed"]
    assert found["accuracy"]["true_reward"]["test"]["mean"] == pytest.approx(3.5 / 4)
    assert "reverse_reward" not in found["accuracy"] and "reward_model" not in found["accuracy"]
    within = off_policy["within"]
    assert within["5"] is None and within["10"]["reward"]["mean"] == pytest.approx(0.25) and within["20"]["lr"] == 3e-4
    assert found["methods"]["vanilla"]["within"] == dict.fromkeys(("2.5", "5", "10", "20"))


def test_claims_worked_by_hand(setting: Setting) -> None:
    found = gathered(setting)
    verdicts = {claim.sentence: claim.verdict for claim in claims.claims(found)}
    assert verdicts["AlignDistil off-policy has more reward than DPO"] == "agrees"
    assert verdicts["AlignDistil off-policy has more reward than PPO"] == "does not agree"
    assert verdicts["the contrastive reward is more accurate than the DPO reward on test pairs"] == "agrees"
    assert verdicts["reward rises from constant 1 to 2"] == "cannot be told"
    assert verdicts["length rises from constant 1 to 2"] == "agrees"
    # At KL 8, half way between constants of 7 and 9: 13 tokens against the 10 of the adaptive coefficient.
    assert claims.at_kl(found, 8.0, "length")["mean"] == pytest.approx(13.0)
    assert claims.at_kl(found, 30.0, "length") is None
    shorter = "the adaptive coefficient is shorter than a constant at the same KL from DPO (between two of them)"
    assert verdicts[shorter] == "agrees"
    assert not any("KTO" in sentence or "on-policy" in sentence for sentence in verdicts)


@pytest.mark.parametrize(
    ("mean", "error", "verdict"),
    [(0.3, 0.1, "agrees"), (0.2, 0.1, "cannot be told"), (-0.3, 0.1, "does not agree"), (0.0, 0.0, "cannot be told")],
)
def test_a_verdict_asks_for_two_standard_errors(mean: float, error: float, verdict: str) -> None:
    assert claims.Claim(1, "", {"mean": mean, "stderr": error, "count": 3}).verdict == verdict


def test_the_report_of_runs_worked_by_hand(setting: Setting, here: Path) -> None:
    found = gathered(setting)
    (here / "out").mkdir()
    (here / "out" / "reading.md").write_text("What a person says.")
    paper.write(setting, found, here / "out")
    text = (here / "out" / "report.md").read_text()
    images = re.findall(r"!\[.*\]\((.*)\)", text)
    assert set(images) == {path.name for path in (here / "out").glob("*.png")} and len(images) == 4
    assert read_json(here / "out" / "paper.json")["claims"][0]["verdict"] == "agrees"
    assert "What a person says." in text
    rows = [
        "| AlignDistil, off-policy | 0.0003 | r 10 | 0.250 ± 0.000 | 8.0 ± 0.6 | 8.0 ± 0.6 | 10.0 ± 0.0 | 100% "
        "| 100% |",
        "| AlignDistil, off-policy | – | – | 0.250 (KL 8.0) | 0.250 (KL 8.0) |",
        "| contrastive DPO reward | 75.0 ± 1.0 | 75.0 ± 1.0 | 74.71 | 71.29 | 0.250 ± 0.000 | 19.45 |",
        "| constant 1.5 | 0.000 ± 0.000 | 9.0 ± 0.6 | 14.0 ± 0.0 | 19.49 | 20.71 | 2973 |",
        "| DPO | 75.0 ± 0.0 | 0.000 ± 0.000 | 85.7 | 1.67 |",
        "| DPO | 0.001 | beta 0.1 | diverged | – | – |",
        "| DPO | 0.0003 | beta 0.1 | **0.000 ± 0.250** | 4.0 ± 0.1 | 10.0 ± 0.0 |",
    ]
    assert [row for row in rows if row not in text] == []
    assert str(here) not in text


def test_the_report_of_part_of_the_methods(setting: Setting, here: Path) -> None:
    found = gathered(setting)
    found["methods"] = {"dpo": found["methods"]["dpo"]}
    paper.write(setting, found, here / "out")
    text = (here / "out" / "report.md").read_text()
    assert "## Table 1" in text and "## Table 3" not in text
    assert page.table_3(found)[1] == []


# Judges


def test_a_judge_scores_prompt_and_response_once(here: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = corpus.train_tokenizer(["A good dog ran.", "A bad cat sat."])
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(here / "judge")
    tokenizer.save_pretrained(here / "judge")
    write_jsonl(here / "prompts.jsonl", [{"prompt": "A good dog"}, {"prompt": "A bad cat"}])
    write_model(here / "model", [" sat.", " ran."], 1.0)

    scorer = scoring.Scorer("judge")
    found = scorer.rewards(here / "model", "prompts.jsonl")
    for text, score in zip(("A good dog sat.", "A bad cat ran."), found, strict=True):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        assert score == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-6)
    (here / "judge" / "model.safetensors").unlink()
    assert scoring.Scorer("judge").rewards(here / "model", "prompts.jsonl") == found  # kept, not judged again
