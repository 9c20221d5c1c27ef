"""config.json -> Architecture, in both spellings, and every sentence a wrong folder gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models.architecture import Architecture, differences, require_same
from tests.models.tiny import make

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
# Each pair: the keys as older folders have them, and as transformers 5 writes them.
SPELLINGS = {
    "default": ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "unsaid": ({}, {"rope_parameters": None}),
    "linear": (
        {"rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000, "factor": 4.0}},
    ),
    "llama3": (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ),
    "llama3 without the original length": (
        {"rope_scaling": {"rope_type": "llama3", **{k: LLAMA3[k] for k in list(LLAMA3)[:3]}}},
        {"rope_parameters": {"rope_type": "llama3", **{k: LLAMA3[k] for k in list(LLAMA3)[:3]}}},
    ),
}


def folder_of(path: Path, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return path


@pytest.mark.parametrize("case", SPELLINGS)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_frequencies_are_those_of_transformers_in_both_spellings(case: str, head_dim: int, tmp_path: Path) -> None:
    old, new = (folder_of(tmp_path / str(i), head_dim=head_dim, **keys) for i, keys in enumerate(SPELLINGS[case]))
    archs = [Architecture.from_folder(old), Architecture.from_folder(new)]
    assert differences(*archs) == []
    for folder, arch in zip((old, new), archs, strict=True):
        expected = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq
        assert torch.equal(arch.inverse_frequencies(), expected)


def test_llama3_scaling_by_hand(tmp_path: Path) -> None:
    scaling = {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    arch = Architecture.from_folder(folder_of(tmp_path, head_dim=8, **scaling))
    # Unscaled 1, 0.1, 0.01, 0.001: wavelengths 6.28 and 62.8 are below 1024/4 and kept, 6283 is above 1024 and divided
    # by 8; 628.3 lies between: smooth = (1024/628.3 - 1)/3 = 0.20993, so 0.01 * (0.79007/8 + 0.20993) = 0.0030869.
    expected = torch.tensor([1.0, 0.1, 0.0030869, 0.000125])
    torch.testing.assert_close(arch.inverse_frequencies(), expected, rtol=1e-4, atol=0)


def test_a_saved_model_is_read_back(tmp_path: Path) -> None:
    make("qwen2-tied", tmp_path)
    arch = Architecture.from_folder(tmp_path)
    assert arch == Architecture(
        model_type="qwen2",
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        num_heads=8,
        num_kv_heads=4,
        head_dim=4,
        vocab_size=300,
        max_positions=256,
        norm_eps=1e-6,
        rope_theta=10000.0,
        tied_embeddings=True,
        qkv_bias=True,
    )


def test_what_an_old_config_leaves_out_follows_from_the_rest(tmp_path: Path) -> None:
    arch = Architecture.from_folder(folder_of(tmp_path))
    assert (arch.num_kv_heads, arch.head_dim, arch.tied_embeddings, arch.qkv_bias) == (4, 16, False, False)


@pytest.mark.parametrize(("vocab", "tp", "padded"), [(300, 1, 384), (300, 2, 512), (512, 4, 512), (151936, 4, 152064)])
def test_padded_vocab_size(vocab: int, tp: int, padded: int, tmp_path: Path) -> None:
    assert Architecture.from_folder(folder_of(tmp_path, vocab_size=vocab)).padded_vocab_size(tp) == padded


def test_differences_name_field_and_values(tmp_path: Path) -> None:
    policy = Architecture.from_folder(folder_of(tmp_path))
    dpo = replace(policy, hidden_size=128, vocab_size=301)
    assert differences(policy, dpo) == ["hidden_size 64 and 128", "vocab_size 300 and 301"]
    with pytest.raises(CheckpointError, match="policy and dpo differ: hidden_size 64 and 128, vocab_size 300 and 301"):
        require_same({"policy": policy, "reference": policy, "dpo": dpo})
    require_same({"policy": policy, "longer": replace(policy, max_positions=9, init_std=1.0)})


WRONG = {
    "gpt2": (
        {"model_type": "gpt2"},
        r"model_type 'gpt2', which is not supported; supported: llama, mistral, qwen2, qwen3",
    ),
    "no type": ({"model_type": None}, r"model_type None"),
    "bias": ({"attention_bias": True}, r"attention_bias True, which is not supported; only False is"),
    "gelu": ({"hidden_act": "gelu"}, r"hidden_act 'gelu'"),
    "window": ({"model_type": "qwen2", "use_sliding_window": True}, r"use_sliding_window True"),
    "yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        r"'yarn', which is not supported.*default, linear, llama3",
    ),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "factor": 4}}, r"RoPE scaling 'dynamic'"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, r"'linear' without factor"),
    "partial": ({"partial_rotary_factor": 0.5}, r"only 0.5 of each head"),
    "heads": ({"num_key_value_heads": 3}, r"4 attention heads, not a multiple of its 3 key-value heads"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, r"quantised"),
}


@pytest.mark.parametrize("case", WRONG)
def test_models_that_we_would_compute_wrongly_are_refused(case: str, tmp_path: Path) -> None:
    changes, sentence = WRONG[case]
    with pytest.raises(CheckpointError, match=sentence):
        Architecture.from_folder(folder_of(tmp_path, **changes))


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        Architecture.from_folder(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="it holds no config.json"):
        Architecture.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        Architecture.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="lacks num_hidden_layers"):
        Architecture.from_folder(tmp_path)
