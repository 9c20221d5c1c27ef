"""Packed rows on a GPU: Transformer Engine's attention within rows, and torch's by row where it has no kernel for them.

Not run on a GPU yet; that packed rows equal padded ones is tested on the CPU, where the same layers attend row by row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_aligndistil.config import ParallelConfig, PrecisionConfig, build, merge
from megatron_aligndistil.data.batch import MicroBatch
from megatron_aligndistil.data.collate import collate, pack
from megatron_aligndistil.data.tokens import make_row
from megatron_aligndistil.engine import model as engine_model
from megatron_aligndistil.engine.checkpoint import load_model, read_architecture
from megatron_aligndistil.engine.model import build_model, freeze
from megatron_aligndistil.engine.parallel import parallel_session
from megatron_aligndistil.engine.schedule import Model, frozen_outputs
from tests.gpu.test_gpu import DISTIL, collectives, configuration, folders, relative, trained

__all__ = ["collectives", "folders"]  # fixtures
pytestmark = pytest.mark.gpu

LENGTHS = (1, 130, 7, 64, 257, 30)


def logits_of(folder: Path, dtype: str, batches: list[MicroBatch]) -> list[Tensor]:
    """Logits at the response positions of each micro-batch, in fp32."""
    with parallel_session(ParallelConfig()) as parallel:
        arch = read_architecture(folder)
        chunks = build_model(arch, parallel, build(PrecisionConfig, {"dtype": dtype}))
        load_model(chunks, folder, arch, parallel)
        freeze(chunks)
        found = []
        for batch in batches:
            there = batch.to(parallel.backend.device)
            (output,) = frozen_outputs(Model(chunks, arch), "distribution", [there], parallel)
            assert output.head is not None
            found.append(output.head.logits().float())
        return found


@pytest.mark.parametrize("transformer_engine", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.02), ("fp32", 1e-3)])
def test_rows_see_themselves_only(folders, dtype: str, tolerance: float, transformer_engine, monkeypatch) -> None:
    """Each row's logits are those of its padded self, and stay when the other rows change."""
    if transformer_engine and not engine_model.HAVE_TE:
        pytest.skip("Transformer Engine is not installed")
    monkeypatch.setattr(engine_model, "HAVE_TE", transformer_engine)
    generator = torch.Generator().manual_seed(0)
    rows = [(make_row([0], torch.randint(3, 320, (n,), generator=generator).tolist()),) for n in LENGTHS]
    others = [(make_row([0], [5] * n),) for n in LENGTHS[:3]] + rows[3:]
    length = sum(len(row.tokens) for (row,) in rows) + 19
    padded, packed, changed = logits_of(
        folders["llama-untied"] / "policy",
        dtype,
        [
            collate(rows, length=272, pad_id=0),
            pack(rows, length=length, pad_id=0),
            pack(others, length=length, pad_id=0),
        ],
    )
    assert packed.isfinite().all()
    assert relative(packed, padded) < tolerance
    same = sum(LENGTHS[:3])
    assert relative(changed[same:], packed[same:]) < 1e-6
    assert relative(changed[:same], packed[:same]) > 0.1


@pytest.mark.parametrize("precision", [{"dtype": "bf16"}, {"dtype": "bf16", "fp8": "hybrid"}], ids=["bf16", "fp8"])
def test_packed_rows_train_like_padded_ones(folders, tmp_path: Path, precision: dict[str, Any]) -> None:
    if "fp8" in precision and not (engine_model.HAVE_TE and torch.cuda.get_device_capability() >= (8, 9)):
        pytest.skip("FP8 needs Transformer Engine and compute capability 8.9 or higher")
    folder = folders["llama-untied"]
    slower = {"optim": {"lr": 2e-4}}
    values = merge(configuration(folder, tmp_path / "padded", {"name": "aligndistil", **DISTIL}, **precision), slower)
    padded = trained(values)
    packed = trained(merge(values, {"run": {"dir": str(tmp_path / "packed")}, "batch": {"max_tokens": 64}}))
    for one, other in zip(padded, packed, strict=True):
        assert other["train/policy/loss"] == pytest.approx(
            one["train/policy/loss"], rel=0.1 if "fp8" in precision else 0.05
        )
