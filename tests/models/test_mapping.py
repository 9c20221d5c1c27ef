"""Hugging Face tensors -> tensor parallel shards -> Hugging Face tensors, bit for bit, and the order inside a shard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models import families, llama
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.hf_folder import HFFolder
from megatron_aligndistil.models.layout import Replicated
from megatron_aligndistil.models.mapping import (
    hf_sources,
    hf_tensors,
    is_copy,
    is_replicated,
    parameter_names,
    read_shard,
    write_full,
)
from tests.models.tiny import MODELS, make

BLOCK = "decoder.layers.1."


def small_llama(**changes) -> Architecture:
    """hidden 4, 4 heads of size 2 in 2 groups, 4 feed-forward channels, 3 tokens."""
    arch = Architecture(
        model_type="llama",
        num_layers=2,
        hidden_size=4,
        ffn_hidden_size=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=2,
        vocab_size=3,
        max_positions=8,
        norm_eps=1e-5,
        rope_theta=10000.0,
    )
    return replace(arch, **changes)


def numbered(arch: Architecture) -> dict[str, torch.Tensor]:
    """Every Hugging Face tensor with all its elements different, from all other tensors' too."""
    tensors, start = {}, 0
    for name, shape in hf_tensors(arch).items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + count, dtype=torch.float64).view(shape)
        start += count
    return tensors


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_for_bit(name: str, dtype: torch.dtype, tp: int, tmp_path: Path) -> None:
    make(name, tmp_path, dtype)
    arch, folder = Architecture.from_folder(tmp_path), HFFolder(tmp_path)
    folder.check(arch)
    written = {}
    for parameter in parameter_names(arch):
        shards = [read_shard(parameter, arch, rank, tp, folder.get) for rank in range(tp)]
        assert len({(shard.shape, shard.dtype) for shard in shards}) == 1
        written.update(write_full(parameter, arch, shards))
    original = load_file(tmp_path / "model.safetensors")
    assert written.keys() == original.keys() == hf_tensors(arch).keys()
    for tensor, value in original.items():
        assert value.dtype == dtype
        assert torch.equal(written[tensor], value), tensor
        assert hf_tensors(arch)[tensor] == tuple(value.shape)


def test_qkv_is_interleaved_by_query_group() -> None:
    arch = small_llama()
    hf = numbered(arch)
    q, k, v = (hf[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    whole = torch.cat([q[0:4], k[0:2], v[0:2], q[4:8], k[2:4], v[2:4]])
    for tp in (1, 2, 4):  # 4 ranks for 2 groups: Megatron splits inside a group and gathers activations
        shards = [
            read_shard(BLOCK + "self_attention.linear_qkv.weight", arch, r, tp, hf.__getitem__) for r in range(tp)
        ]
        assert torch.equal(torch.cat(shards), whole)
        assert {s.shape[0] for s in shards} == {16 // tp}


def test_gate_and_up_alternate_by_rank() -> None:
    arch = small_llama()
    hf = numbered(arch)
    gate, up = hf["model.layers.1.mlp.gate_proj.weight"], hf["model.layers.1.mlp.up_proj.weight"]
    second = read_shard(BLOCK + "mlp.linear_fc1.weight", arch, 1, 2, hf.__getitem__)
    assert torch.equal(second, torch.cat([gate[2:4], up[2:4]]))


def test_row_parallel_weights_are_split_by_columns() -> None:
    arch = small_llama()
    hf = numbered(arch)
    proj = read_shard(BLOCK + "self_attention.linear_proj.weight", arch, 1, 2, hf.__getitem__)
    assert torch.equal(proj, hf["model.layers.1.self_attn.o_proj.weight"][:, 4:8])
    down = read_shard(BLOCK + "mlp.linear_fc2.weight", arch, 3, 4, hf.__getitem__)
    assert torch.equal(down, hf["model.layers.1.mlp.down_proj.weight"][:, 3:4])


def test_vocabulary_is_padded_with_zeros_and_cut_back() -> None:
    arch = small_llama(vocab_size=130)
    hf = numbered(arch)
    first, second = (read_shard("output_layer.weight", arch, r, 2, hf.__getitem__) for r in range(2))
    assert torch.equal(torch.cat([first, second])[:130], hf["lm_head.weight"])
    assert second.shape == (128, 4) and not second[2:].any()
    second[2:] = float("nan")  # whatever padding has become is not exported
    assert torch.equal(write_full("output_layer.weight", arch, [first, second])["lm_head.weight"], hf["lm_head.weight"])


def test_a_shard_of_nothing_but_padding_has_the_checkpoints_dtype() -> None:
    hf = {"model.embed_tokens.weight": torch.ones(3, 4, dtype=torch.bfloat16)}
    shard = read_shard("embedding.word_embeddings.weight", small_llama(), 1, 2, hf.__getitem__)
    assert shard.dtype == torch.bfloat16 and shard.shape == (128, 4) and not shard.any()


def test_norms_are_replicated_under_both_names() -> None:
    arch = small_llama()
    hf = numbered(arch)
    for plain, fused, source in (
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight", "input_layernorm"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm"),
    ):
        expected = hf[f"model.layers.1.{source}.weight"]
        for name in (BLOCK + plain, BLOCK + fused):
            assert is_replicated(name, arch)
            assert torch.equal(read_shard(name, arch, 1, 2, hf.__getitem__), expected)
            assert torch.equal(write_full(name, arch, [expected])[f"model.layers.1.{source}.weight"], expected)


def test_tied_output_layer_is_read_from_the_embedding_and_never_written() -> None:
    arch = small_llama(tied_embeddings=True)
    hf = numbered(arch)
    assert "lm_head.weight" not in hf and "output_layer.weight" not in parameter_names(arch)
    shard = read_shard("output_layer.weight", arch, 0, 1, hf.__getitem__)
    assert torch.equal(shard[:3], hf["model.embed_tokens.weight"])
    assert is_copy("output_layer.weight", arch) and write_full("output_layer.weight", arch, [shard]) == {}


def test_only_the_slices_of_a_rank_are_asked_for() -> None:
    arch = small_llama()
    hf = numbered(arch)
    asked: dict[str, int] = {}

    class Counting:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, index):
            asked[self.name] = asked.get(self.name, 0) + hf[self.name][index].numel()
            return hf[self.name][index]

    for parameter in parameter_names(arch):
        if not is_replicated(parameter, arch):
            asked.clear()
            read_shard(parameter, arch, 0, 2, Counting)
            whole = sum(hf[source].numel() for source in hf_sources(parameter, arch))
            padded = "word_embeddings" in parameter or "output_layer" in parameter  # all 3 tokens are rank 0's
            assert sum(asked.values()) == (whole if padded else whole // 2), parameter


def test_query_and_key_norms_are_one_more_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """What adding Qwen3 takes: rules of llama and two more, in a family of its own."""
    rules = {
        **llama.PARAMETERS,
        "decoder.layers.{}.self_attention.q_layernorm.weight": Replicated(
            "model.layers.{}.self_attn.q_norm.weight", size="head_dim"
        ),
        "decoder.layers.{}.self_attention.k_layernorm.weight": Replicated(
            "model.layers.{}.self_attn.k_norm.weight", size="head_dim"
        ),
    }
    family = families.Family("normed", "NormedForCausalLM", llama.read, rules)
    known = {**families.families(), "normed": family}
    monkeypatch.setattr(families, "families", lambda: known)
    arch = small_llama(model_type="normed", qk_norm=True)
    assert hf_tensors(arch)["model.layers.1.self_attn.k_norm.weight"] == (2,)
    hf = numbered(arch)
    name = BLOCK + "self_attention.q_layernorm.weight"
    assert torch.equal(read_shard(name, arch, 3, 4, hf.__getitem__), hf["model.layers.1.self_attn.q_norm.weight"])


def test_unknown_parameters_and_layouts_that_do_not_divide() -> None:
    arch = small_llama()
    hf = numbered(arch)
    with pytest.raises(CheckpointError, match="layers.0.mlp.router.weight has no Hugging Face counterpart"):
        read_shard("decoder.layers.0.mlp.router.weight", arch, 0, 1, hf.__getitem__)
    with pytest.raises(ValueError, match="cannot be split evenly over 3 ranks"):
        read_shard(BLOCK + "mlp.linear_fc2.weight", arch, 0, 3, hf.__getitem__)
