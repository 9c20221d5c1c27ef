"""Which layers a machine gets: Transformer Engine's, or Megatron's own where it is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_aligndistil.backends import Backend
from megatron_aligndistil.config import ParallelConfig, PrecisionConfig
from megatron_aligndistil.engine.model import HAVE_TE, has_transformer_engine, transformer_config
from megatron_aligndistil.engine.parallel import parallel_session
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.models.architecture import Architecture
from tests.models.tiny import make

CUDA = Backend(torch.device("cuda"), "nccl", torch.bfloat16)


def configured(folder: str, precision: PrecisionConfig, backend: Backend | None) -> dict[str, object]:
    """What the configuration says on this machine, or would say with another backend (nothing is built)."""
    with parallel_session(ParallelConfig()) as parallel:
        there = replace(parallel, backend=backend) if backend else parallel
        config = transformer_config(Architecture.from_folder(folder), there, precision)
        names = ("params_dtype", "fp8", "apply_rope_fusion", "persist_layer_norm", "bias_activation_fusion")
        return {name: getattr(config, name) for name in names}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    make("qwen2-tied", tmp_path)
    return str(tmp_path)


@pytest.mark.skipif(HAVE_TE, reason="Transformer Engine is installed here")
def test_a_gpu_without_transformer_engine_trains_in_bf16(workers, folder: str) -> None:
    assert not has_transformer_engine(CUDA)
    (found,) = workers.run(1, configured, folder, PrecisionConfig(), CUDA)
    assert found == {
        "params_dtype": torch.bfloat16,
        "fp8": None,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "bias_activation_fusion": True,
    }
    with pytest.raises(ConfigError, match="fp8 needs Transformer Engine"):
        workers.run(1, configured, folder, PrecisionConfig(fp8="hybrid"), CUDA)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_machine_without_a_gpu_refuses_fp8(workers, folder: str) -> None:
    (found,) = workers.run(1, configured, folder, PrecisionConfig(), None)
    assert found["params_dtype"] == torch.float32
    with pytest.raises(ConfigError, match="fp8 needs a GPU"):
        workers.run(1, configured, folder, PrecisionConfig(fp8="hybrid"), None)
