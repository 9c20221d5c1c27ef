"""Models built and loaded through Megatron-Core give transformers' logits, whatever the layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from megatron_aligndistil.config import ParallelConfig, PrecisionConfig
from megatron_aligndistil.data.batch import MicroBatch, Responses
from megatron_aligndistil.engine.checkpoint import read_architecture
from megatron_aligndistil.engine.hf import load_weights
from megatron_aligndistil.engine.model import build_model
from megatron_aligndistil.engine.parallel import parallel_session
from megatron_aligndistil.engine.schedule import Model, frozen_outputs

SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=301,
    max_position_embeddings=256,
    initializer_range=0.2,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama3": LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
}
LAYOUTS = {
    "single": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tp=2)),
    "tp4": (4, ParallelConfig(tp=4)),
    "pp2": (2, ParallelConfig(pp=2)),
    "tp2 sp": (2, ParallelConfig(tp=2, sequence_parallel=True)),
    "pp2 vpp2": (2, ParallelConfig(pp=2, vpp=2)),
    "tp2 pp2": (4, ParallelConfig(tp=2, pp=2)),
}


def all_positions(tokens_BS: torch.Tensor) -> MicroBatch:
    """A batch in which every state counts as a response position."""
    num_rows, length = tokens_BS.shape
    positions_T = torch.arange(num_rows * length)
    responses = Responses(tokens_BS.roll(-1, 1).flatten(), positions_T // length, torch.full((num_rows,), length))
    return MicroBatch(tokens_BS, positions_T, responses)


def logits_of(folder: str, layout: ParallelConfig, batches: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """Each last-stage rank's columns of the logits, for every micro-batch."""
    with parallel_session(layout) as parallel:
        arch = read_architecture(folder)
        chunks = build_model(arch, parallel, PrecisionConfig(dtype="fp32"))
        load_weights(chunks, folder, arch, parallel)
        outputs = frozen_outputs(Model(chunks, arch), "distribution", [all_positions(b) for b in batches], parallel)
        return [frozen.head.logits() for frozen in outputs] if parallel.is_last_stage else None


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random transformers model of each family."""
    found = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for key, parameter in model.named_parameters():
            if key.endswith(("bias", "q_norm.weight", "k_norm.weight")):
                torch.nn.init.normal_(parameter)
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equal_transformers(workers, folders, family: str, layout: str) -> None:
    world_size, config = LAYOUTS[layout]
    batches = [torch.randint(0, 301, (2, 48), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    results = [rank for rank in workers.run(world_size, logits_of, str(folders[family]), config, batches) if rank]
    model = AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    for index, tokens_BS in enumerate(batches):
        with torch.no_grad():
            expected = model(tokens_BS).logits.flatten(0, 1)
        ours = torch.cat([rank[index] for rank in results], dim=-1)
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
