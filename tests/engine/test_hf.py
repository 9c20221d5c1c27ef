"""A folder read into a real GPTModel over processes and written again is the same folder, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_aligndistil.config import ParallelConfig, PrecisionConfig
from megatron_aligndistil.engine.hf import draw_weights, global_parameters, load_weights, save_folder, stored_dtype
from megatron_aligndistil.engine.model import build_model
from megatron_aligndistil.engine.parallel import parallel_session
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.hf_folder import HFFolder
from tests.models.tiny import MODELS, make

LAYOUTS = {
    "one": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tp=2)),
    "dp2": (2, ParallelConfig()),
    "pp2": (2, ParallelConfig(pp=2)),
    "pp2 vpp2": (2, ParallelConfig(pp=2, vpp=2)),
    "tp2 pp2": (4, ParallelConfig(tp=2, pp=2)),
    "tp2 dp2": (4, ParallelConfig(tp=2)),
}


def build(arch: Architecture, parallel, dtype: str) -> list[torch.nn.Module]:
    """A model whose weights, before anything is loaded, are all NaN: what stays unfilled is seen."""
    chunks = build_model(arch, parallel, PrecisionConfig(dtype=dtype))
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    return chunks


def copy_folder(source: str, target: str, layout: ParallelConfig, dtype: str, options: dict) -> list[str]:
    with parallel_session(layout) as parallel:
        arch = Architecture.from_folder(source)
        chunks = build(arch, parallel, dtype)
        load_weights(chunks, source, arch, parallel)
        assert not any(parameter.isnan().any() for _, parameter in global_parameters(chunks))
        save_folder(chunks, arch, source, target, parallel=parallel, **options)
        assert (Path(target) / "config.json").is_file()  # no rank returns before the folder is there
        return [name for name, _ in global_parameters(chunks)]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_for_bit(workers, name: str, layout: str, tmp_path: Path) -> None:
    world_size, config = LAYOUTS[layout]
    dtype = "bf16" if "qwen2" in name else "fp32"
    source, target = tmp_path / "source", tmp_path / "target"
    make(name, source, torch.bfloat16 if dtype == "bf16" else torch.float32)
    workers.run(world_size, copy_folder, str(source), str(target), config, dtype, {})
    assert_same(tensors_of(target), tensors_of(source))
    assert json.loads((target / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (target / "model.safetensors").is_file() == (config.pp == 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["source", "target"]


def test_layers_have_their_global_numbers_in_interleaved_stages(workers, tmp_path: Path) -> None:
    make("llama-untied", tmp_path / "source")
    names = workers.run(
        2, copy_folder, str(tmp_path / "source"), str(tmp_path / "target"), ParallelConfig(pp=2, vpp=2), "fp32", {}
    )
    layers = [sorted({int(name.split(".")[2]) for name in rank if "layers" in name}) for rank in names]
    assert layers == [[0, 2], [1, 3]]


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_exports_are_cut_into_files_that_transformers_loads(workers, layout: str, tmp_path: Path) -> None:
    model = make("qwen2-tied", tmp_path / "source")
    world_size, config = LAYOUTS[layout]
    target = tmp_path / "target"
    options = {"max_shard_bytes": 30_000, "dtype": torch.bfloat16}
    workers.run(world_size, copy_folder, str(tmp_path / "source"), str(target), config, "fp32", options)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files == sorted(file.name for file in target.glob("*.safetensors"))
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    for file in files:
        with safe_open(target / file, framework="pt") as content:
            assert content.metadata() == {"format": "pt"}
            assert all(index["weight_map"][name] == file for name in content.keys())  # noqa: SIM118
            sizes = [content.get_tensor(name).nbytes for name in content.keys()]  # noqa: SIM118
            assert sum(sizes) <= 30_000 or len(sizes) == 1
    expected = {name: tensor.bfloat16() for name, tensor in tensors_of(tmp_path / "source").items()}
    assert_same(tensors_of(target), expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    loaded, report = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())


def test_everything_but_weights_travels_and_an_older_export_is_replaced(workers, shared_data, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    make("llama-untied", source, vocab_size=512)
    pretrained = shared_data / "stories260K" / "hf"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((pretrained / file).read_bytes())
    (source / "LICENSE").write_text("MIT")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "optimizer.pt").write_bytes(b"large")
    target.mkdir()
    (target / "config.json").write_text("{}")
    (target / "stale.txt").write_text("from the export before")
    workers.run(2, copy_folder, str(source), str(target), LAYOUTS["tp2"][1], "fp32", {})
    names = {file.name for file in source.iterdir()} - {"optimizer.pt"}
    assert {file.name for file in target.iterdir()} == names
    text = "Once upon a time"
    assert AutoTokenizer.from_pretrained(target)(text) == AutoTokenizer.from_pretrained(pretrained)(text)


def test_a_real_pretrained_model_survives_tp2_pp1(workers, shared_data, tmp_path: Path) -> None:
    source = shared_data / "stories260K" / "hf"
    workers.run(2, copy_folder, str(source), str(tmp_path / "target"), LAYOUTS["tp2"][1], "fp32", {})
    assert_same(tensors_of(tmp_path / "target"), tensors_of(source))


def test_stored_dtype_is_what_the_weights_need_whatever_config_json_says(tmp_path: Path) -> None:
    for number, (dtype, expected) in enumerate(
        ((torch.bfloat16, "bf16"), (torch.float32, "fp32"), (torch.float16, "fp16"))
    ):
        folder = tmp_path / str(number)
        make("llama-tied", folder, dtype)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
        assert stored_dtype(folder) == expected
        distributed = tmp_path / f"distributed{number}"
        (distributed / "hf").mkdir(parents=True)
        (distributed / "hf" / "config.json").write_text(json.dumps({**config, "dtype": str(dtype)[6:]}))
        assert stored_dtype(distributed) == expected


def draw(source: str, target: str, layout: ParallelConfig, seed: int) -> None:
    with parallel_session(layout) as parallel:
        arch = Architecture.from_folder(source)
        chunks = build(arch, parallel, "fp32")
        draw_weights(chunks, arch, parallel, seed)
        save_folder(chunks, arch, source, target, parallel=parallel)


def test_weights_drawn_from_scratch_are_the_same_under_any_layout(workers, tmp_path: Path) -> None:
    make("qwen2-untied", tmp_path / "source", initializer_range=0.05)
    for number, layout in enumerate(("one", "tp2 pp2")):
        world_size, config = LAYOUTS[layout]
        workers.run(world_size, draw, str(tmp_path / "source"), str(tmp_path / str(number)), config, 7)
    workers.run(1, draw, str(tmp_path / "source"), str(tmp_path / "other"), ParallelConfig(), 8)
    drawn = tensors_of(tmp_path / "0")
    assert_same(tensors_of(tmp_path / "1"), drawn)
    HFFolder(tmp_path / "0").check(Architecture.from_folder(tmp_path / "source"))
    assert (drawn["model.norm.weight"] == 1).all()
    assert (drawn["model.layers.0.self_attn.q_proj.bias"] == 0).all()
    embedding = drawn["model.embed_tokens.weight"]
    assert embedding.std().item() == pytest.approx(0.05, rel=0.05)
    assert not torch.equal(embedding, drawn["lm_head.weight"])
    assert not torch.equal(embedding, tensors_of(tmp_path / "other")["model.embed_tokens.weight"])


def refused(source: str, target: str, arch_of: str) -> list[str]:
    with parallel_session(ParallelConfig(tp=2)) as parallel:
        arch = Architecture.from_folder(arch_of)
        chunks = build(arch, parallel, "fp32")
        sentences = []
        for call in (
            lambda: load_weights(chunks, source, arch, parallel),
            lambda: save_folder(chunks, arch, arch_of, target, parallel=parallel),
            lambda: save_folder(chunks, arch, source, target + "-new", parallel=parallel),
        ):
            try:
                call()
            except CheckpointError as error:
                sentences.append(str(error))
        assert all(parameter.isnan().all() for chunk in chunks for parameter in chunk.parameters())
        dist.barrier()
        return sentences


def test_what_does_not_fit_is_refused_on_every_rank_before_anything_changes(workers, tmp_path: Path) -> None:
    make("llama-untied", tmp_path / "arch")
    make("llama-untied", tmp_path / "source", intermediate_size=64)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "thesis.txt").write_text("precious")
    for sentences in workers.run(2, refused, *(str(tmp_path / name) for name in ("source", "target", "arch"))):
        misshapen, not_ours, other = sentences
        assert "model.layers.0.mlp.gate_proj.weight with shape 64x32, but the model needs 48x32" in misshapen
        assert "model.safetensors" in misshapen
        assert "target exists and is not a checkpoint folder" in not_ours
        assert "ffn_hidden_size 48 and 64" in other
    assert (tmp_path / "target" / "thesis.txt").read_text() == "precious"
