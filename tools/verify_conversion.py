#!/usr/bin/env python3
"""Check a conversion: are all tensors the same, bit for bit, and do our logits (or scores) equal transformers'?

    tools/verify_conversion.py HF_FOLDER CHECKPOINT [--tolerance 1e-4]

CHECKPOINT is a Megatron distributed checkpoint or a Hugging Face folder made from HF_FOLDER. It is loaded into a
Megatron model in fp32 in one process; its weights are written back to a temporary folder and compared, and its logits
on random tokens are compared with those that transformers computes from HF_FOLDER.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils.logging import disable_progress_bar

from megatron_aligndistil.config import ParallelConfig, PrecisionConfig
from megatron_aligndistil.data.batch import MicroBatch, Responses
from megatron_aligndistil.engine.checkpoint import description_folder, load_model, read_architecture
from megatron_aligndistil.engine.hf import save_folder, stored_dtype
from megatron_aligndistil.engine.model import build_model, freeze
from megatron_aligndistil.engine.parallel import parallel_session
from megatron_aligndistil.engine.schedule import Model, frozen_outputs
from megatron_aligndistil.errors import AlignDistilError
from megatron_aligndistil.models.hf_folder import HFFolder
from megatron_aligndistil.models.mapping import hf_tensors


def different_tensors(first: Path, second: Path) -> list[str]:
    """Names of the model's tensors that are not the same, bit for bit."""
    one, other = HFFolder(first), HFFolder(second)
    return [
        name
        for name in hf_tensors(read_architecture(first, "any"))
        if not torch.equal(one.get(name)[...].view(torch.uint8), other.get(name)[...].view(torch.uint8))
    ]


def largest_difference(hf_folder: Path, checkpoint: Path) -> float:
    """Largest absolute difference between our fp32 logits (or scores) and transformers' on 2 x 64 random tokens."""
    with parallel_session(ParallelConfig()) as parallel:
        arch = read_architecture(checkpoint, "any")
        chunks = build_model(arch, parallel, PrecisionConfig(dtype="fp32"))
        load_model(chunks, checkpoint, arch, parallel)
        freeze(chunks)
        tokens_BS = torch.randint(arch.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
        positions_T = torch.arange(tokens_BS.numel())
        responses = Responses(tokens_BS.flatten(), positions_T // 64, torch.tensor([64, 64]))
        batch = MicroBatch(tokens_BS, positions_T, responses).to(parallel.backend.device)
        scalar = arch.head == "scalar"
        (frozen,) = frozen_outputs(Model(chunks, arch), "values" if scalar else "distribution", [batch], parallel)
        ours = frozen.values_T if frozen.head is None else frozen.head.logits()
        assert ours is not None
    disable_progress_bar()
    kind: Any = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    reference = kind.from_pretrained(hf_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        output_layer = reference.score if scalar else reference.lm_head
        theirs = output_layer(reference.model(tokens_BS).last_hidden_state).flatten(0, 1)
    return float((theirs.view_as(ours) - ours.cpu()).abs().max())


def write_back(checkpoint: Path, target: Path) -> None:
    """Load the checkpoint in the dtype it is stored in, and write it as a Hugging Face folder."""
    with parallel_session(ParallelConfig()) as parallel:
        arch = read_architecture(checkpoint, "any")
        chunks = build_model(arch, parallel, PrecisionConfig(dtype=stored_dtype(checkpoint)))
        load_model(chunks, checkpoint, arch, parallel)
        save_folder(chunks, arch, description_folder(checkpoint), target, parallel=parallel)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_folder", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest allowed difference of a logit")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "hf"
            write_back(arguments.checkpoint, target)
            wrong = different_tensors(arguments.hf_folder, target)
        difference = largest_difference(arguments.hf_folder, arguments.checkpoint)
    except AlignDistilError as error:
        print(f"verify_conversion: {error}", file=sys.stderr)
        return 1
    print(f"tensors that differ: {len(wrong)}{' (' + ', '.join(wrong[:5]) + ' ...)' if wrong else ''}")
    print(f"largest difference of a logit: {difference:.2e} (tolerance {arguments.tolerance:.0e})")
    return 1 if wrong or difference > arguments.tolerance else 0


if __name__ == "__main__":
    sys.exit(main())
