"""Folders that are damaged, incomplete or of another kind, and files written a tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.hf_folder import HFFolder
from megatron_aligndistil.models.safetensors_writer import SafetensorsWriter
from tests.models.tiny import make

UP = "model.layers.2.mlp.up_proj.weight"


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a single-file checkpoint."""
    file = folder / "model.safetensors"
    content = {**load_file(file), **tensors}
    save_file({name: t for name, t in content.items() if t is not None}, file, metadata={"format": "pt"})


def test_missing_misshapen_and_foreign_tensors_are_named(tmp_path: Path) -> None:
    make("llama-untied", tmp_path)
    arch = Architecture.from_folder(tmp_path)
    original = load_file(tmp_path / "model.safetensors")
    change(tmp_path, **{UP: None})
    with pytest.raises(CheckpointError, match=f"lacks the tensor {UP}"):
        HFFolder(tmp_path).check(arch)
    change(tmp_path, **{UP: torch.zeros(48, 31)})
    with pytest.raises(
        CheckpointError, match=f"model.safetensors holds {UP} with shape 48x31, but the model needs 48x32"
    ):
        HFFolder(tmp_path).check(arch)
    change(tmp_path, **{UP: original[UP], "score.weight": torch.zeros(1, 32)})
    with pytest.raises(CheckpointError, match="holds score.weight, which a model of type llama"):
        HFFolder(tmp_path).check(arch)


def test_tensors_that_carry_nothing_are_ignored(tmp_path: Path) -> None:
    make("llama-tied", tmp_path)
    change(
        tmp_path,
        **{"lm_head.weight": torch.ones(515, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
    )
    HFFolder(tmp_path).check(Architecture.from_folder(tmp_path))


def test_sharded_checkpoints(tmp_path: Path) -> None:
    model = make("llama-untied", tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    arch = Architecture.from_folder(tmp_path / "many")
    folder = HFFolder(tmp_path / "many")
    folder.check(arch)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert torch.equal(folder.get(UP)[3:5], model.state_dict()[UP][3:5])
    index = tmp_path / "many" / "model.safetensors.index.json"
    (tmp_path / "many" / json.loads(index.read_text())["weight_map"][UP]).unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-\d+-of-\d+.safetensors, which its model.safetensors.index"):
        HFFolder(tmp_path / "many")
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="is not an index"):
        HFFolder(tmp_path / "many")


def test_folders_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="only safetensors are read"):
        HFFolder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        HFFolder(tmp_path)


def test_written_files_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "z": torch.randn(3, 5),
        "a": torch.randn(7).to(torch.bfloat16),
        "strided": torch.randn(6, 4).T,
        "half": torch.randn(2, 2).half(),
        "last": torch.randn(1, dtype=torch.float64),
    }
    file = tmp_path / "x.safetensors"
    with SafetensorsWriter(file, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    read = load_file(file)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    with safe_open(file, framework="pt") as content:
        assert content.metadata() == {"format": "pt"}
