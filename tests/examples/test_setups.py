"""The set-ups in examples/setups load, say what the paper says, and build models of the published size."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_aligndistil.commands.pipeline import PipelineConfig, Stage, read_stages
from megatron_aligndistil.config import ParallelConfig, TrainConfig, build, merge, parse_overrides, read_yaml
from megatron_aligndistil.data.records import load_records
from megatron_aligndistil.engine.parallel import check_layout
from megatron_aligndistil.models.architecture import Architecture

ROOT = Path(__file__).parents[2]
SETUPS = ROOT / "examples" / "setups"
FILES = sorted(SETUPS.glob("*.yaml"))
NAMES = [path.stem for path in FILES]
PUBLISHED: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "published_models.yaml").read_text())
# examples/setups/README.md: | models | GPUs x kind | `settings` or "as it is" | GB for DPO | GB for AlignDistil |
ROW = re.compile(r"\| ([\w., -]+) \| (\d+) x [^|]+ \| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|")


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Architecture]:
    """Every published model by name, read as a user's folder is."""
    found = {}
    for name, model in PUBLISHED.items():
        folder = tmp_path_factory.mktemp("published")
        (folder / "config.json").write_text(json.dumps(model["config"]))
        found[name] = Architecture.from_folder(folder)
    return found


@pytest.fixture(scope="module")
def held(workers, architectures) -> dict[tuple[str, str], list[Any]]:
    """What the processes of every layout hold that a set-up, or the table of layouts, asks for; by (model, layout)."""
    from tests.examples.meta import build_on_meta

    layouts = {(model_of(path), repr(layout)): layout for path in FILES for layout in layouts_of(path)}
    layouts |= {(name, repr(layout)): layout for name, layout, *_ in table()}
    cases = [(architectures[name], layout) for (name, _), layout in layouts.items()]
    return dict(zip(layouts, workers.run(1, build_on_meta, cases)[0], strict=True))


def stages_of(path: Path, changes: dict[str, Any] | None = None) -> list[Stage]:
    return read_stages(build(PipelineConfig, merge(read_yaml(path), changes or {})))


def layouts_of(path: Path) -> list[ParallelConfig]:
    return [stage.settings.parallel for stage in stages_of(path)]


def model_of(path: Path) -> str:
    variables = read_yaml(path)["vars"]
    return str(variables.get("base", variables["initial"])).removeprefix("models/")


def table() -> list[tuple[str, ParallelConfig, int, float, float]]:
    """The rows of the table of layouts: model, layout, GPUs, GB for DPO and for AlignDistil."""
    rows = []
    for names, gpus, settings, dpo, aligndistil in ROW.findall((SETUPS / "README.md").read_text()):
        changes = {} if settings.startswith("as it is") else parse_overrides(shlex.split(settings.strip("` ")))
        for name in names.split(", "):
            like = next((path for path in FILES if model_of(path) == name), SETUPS / "llama-3-8b_ultrafeedback.yaml")
            layout = stages_of(like, changes)[-1].settings.parallel
            rows.append((name, layout, int(gpus), float(dpo), float(aligndistil)))
    return rows


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where a user starts a pipeline: the files that it includes begin there


def test_every_model_of_the_paper_has_both_data_sets() -> None:
    found = {(model_of(path), path.stem.rpartition("_")[2]) for path in FILES}
    models = ["Qwen2-1.5B-Instruct", "Qwen2.5-1.5B-Instruct", "Qwen2.5-7B", "Meta-Llama-3-8B"]
    assert found == {(model, data) for model in models for data in ("ultrafeedback", "tldr")}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_shapes_add_up_to_the_published_model(held, path: Path) -> None:
    name = model_of(path)
    for layout in layouts_of(path):
        assert sum(part.stage for part in held[name, repr(layout)]) == PUBLISHED[name]["parameters"]


def test_table_of_layouts_says_what_a_gpu_holds(held) -> None:
    rows = table()
    assert len(rows) == 10
    for name, layout, gpus, dpo, aligndistil in rows:
        parts, dp = held[name, repr(layout)], check_layout(layout, gpus)
        assert sum(part.stage for part in parts) == PUBLISHED[name]["parameters"]
        fullest = max(part.held for part in parts) / 1e9
        # bf16 weights, fp32 gradients, and fp32 weights with Adam's two moments shared out over data parallel ranks
        trained, frozen = 2 + 4 + 12 / dp, 2
        assert (2 * trained + frozen) * fullest == pytest.approx(dpo, abs=0.051), f"{name} on {gpus} GPUs"
        assert (trained + 2 * frozen) * fullest == pytest.approx(aligndistil, abs=0.051), f"{name} on {gpus} GPUs"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_settings_are_the_papers(path: Path) -> None:
    stages = stages_of(path)
    runs = {stage.name: stage.settings for stage in stages if stage.kind == "train"}
    is_tldr, is_instruct = path.stem.endswith("tldr"), "instruct" in path.stem
    assert ("sft" in runs) == (is_tldr or not is_instruct)
    for name, config in runs.items():
        optim = config.optim
        assert optim.lr == (2e-5 if name == "sft" else 1e-6) and optim.betas == (0.9, 0.95) and optim.clip == 1
        assert (optim.warmup, optim.decay, optim.min_lr_ratio, optim.weight_decay) == (0.1, "cosine", 0.1, 0)
        assert (config.batch.global_size, config.run.epochs, config.run.steps) == (128, 1, None)
        assert (config.data.max_length, config.data.max_prompt_length) == (2048, 1024)
        dp = check_layout(config.parallel, 8)
        assert config.batch.global_size % (dp * config.batch.micro_size) == 0
    dpo, off, on = (runs[name] for name in ("dpo and reverse dpo", "aligndistil", "aligndistil on-policy"))
    assert dpo.algorithm == {"name": "dpo", "direction": "both", "beta": 0.1}
    for config in (off, on):
        assert config.algorithm["teacher"] == "adaptive" and config.algorithm["beta0"] == 0.1
        assert int(config.algorithm["r"]) in ((1, 2) if is_tldr else (10, 15, 20))
    assert on.algorithm["on_policy"] and "on_policy" not in off.algorithm
    assert (on.rollout.max_new_tokens, on.rollout.temperature, on.rollout.top_p) == (1024, 1, 1)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_stages_take_what_earlier_ones_leave(path: Path) -> None:
    """Every model that a stage names is the one the user brings, or one that a stage before it has made."""
    there = {f"models/{model_of(path)}"}
    for stage in stages_of(path):
        settings = stage.settings
        named = [settings.model] if stage.kind == "generate" else list(settings.models.model_dump().values())
        wanted = {value for value in named if isinstance(value, str) and "/" in value}
        assert wanted <= there, f"{stage.name} needs {wanted - there}"
        if isinstance(settings, TrainConfig):
            models = ("dpo", "reverse") if settings.algorithm["name"] == "dpo" else ("policy",)
            there |= {f"{settings.run.dir}/{model}" for model in models}


def test_a_slice_of_a_split_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`NAME:validation[:2]`, as the TL;DR set-ups name their held-out pairs."""
    rows = [{"prompt": str(number), "chosen": "a", "rejected": "b"} for number in range(5)]
    folder = tmp_path / "owner" / "pairs"
    folder.mkdir(parents=True)
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert [record.values for record in load_records("owner/pairs:validation[:2]")] == rows[:2]
