"""What only a GPU can show: Transformer Engine's layers, bf16 and FP8 training, generation and checkpoints on CUDA.

One process, nccl over a world of one. Everything that needs no GPU is tested elsewhere, on the CPU.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_aligndistil.config import ParallelConfig, PrecisionConfig, TrainConfig, build, merge
from megatron_aligndistil.data.batch import MicroBatch, Responses
from megatron_aligndistil.engine import model as engine_model
from megatron_aligndistil.engine.checkpoint import load_model, read_architecture
from megatron_aligndistil.engine.completions import Sampling
from megatron_aligndistil.engine.generate import MegatronSampler
from megatron_aligndistil.engine.hf import global_parameters
from megatron_aligndistil.engine.model import build_model, freeze, has_transformer_engine
from megatron_aligndistil.engine.parallel import parallel_session, process_group
from megatron_aligndistil.engine.schedule import Model, frozen_outputs
from megatron_aligndistil.engine.trainer import train
from megatron_aligndistil.models import mapping
from tests.engine import dense
from tests.engine.tiny import make_checkpoint

pytestmark = pytest.mark.gpu

ARCHITECTURES = ("qwen2-tied", "llama-untied")
# Heads wide enough for the fused attention kernels; every dimension a multiple of 16, as FP8 wants it.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 320}
DISTIL: dict[str, Any] = {"teacher": "adaptive", "beta0": 0.1, "beta": 0.08, "r": 1.0, "eps": 1e-3}
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def collectives() -> Iterator[None]:
    """One process group for all tests here, so that nccl starts once."""
    with process_group():
        yield


def make_models(architecture: str, folder: Path, dtype: torch.dtype) -> None:
    """policy, dpo and reverse, their matrices scaled so that activations stay of order one in every layer."""
    changes = SIZES | ({"head_dim": 64} if architecture == "llama-untied" else {})
    for seed, name in enumerate(("policy", "dpo", "reverse")):
        make_checkpoint(architecture, folder / name, seed=seed, **changes)
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(0.2)
        model.to(dtype).save_pretrained(folder / name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose weights bf16 holds exactly, and pairs to train on, by architecture."""
    found = {}
    for architecture in ARCHITECTURES:
        folder = found[architecture] = tmp_path_factory.mktemp(architecture)
        make_models(architecture, folder, torch.bfloat16)
        dense.write_pairs(folder / "pairs.jsonl", SIZES["vocab_size"])
    return found


def transformers_logits(folder: Path, tokens_BS: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    with torch.no_grad():
        return model(tokens_BS.to(device)).logits.float().flatten(0, 1)


def our_logits(folder: Path, tokens_BS: Tensor, dtype: str) -> tuple[Tensor, bool]:
    """Logits at every position, and whether Transformer Engine's layers made them."""
    num_rows, length = tokens_BS.shape
    positions_T = torch.arange(num_rows * length)
    responses = Responses(tokens_BS.roll(-1, 1).flatten(), positions_T // length, torch.full((num_rows,), length))
    with parallel_session(ParallelConfig()) as parallel:
        arch = read_architecture(folder)
        chunks = build_model(arch, parallel, build(PrecisionConfig, {"dtype": dtype}))
        load_model(chunks, folder, arch, parallel)
        batch = MicroBatch(tokens_BS, positions_T, responses).to(parallel.backend.device)
        (output,) = frozen_outputs(Model(chunks, arch), "distribution", [batch], parallel)
        fused = any("transformer_engine" in type(module).__module__ for chunk in chunks for module in chunk.modules())
        assert fused == has_transformer_engine(parallel.backend)
        assert output.head is not None
        return output.head.logits().float(), fused


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture
def tokens_BS() -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (3, 48), generator=torch.Generator().manual_seed(5))


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fp32_logits_equal_transformers(folders, tokens_BS: Tensor, architecture: str) -> None:
    folder = folders[architecture] / "policy"
    found, transformer_engine = our_logits(folder, tokens_BS, "fp32")
    wanted = transformers_logits(folder, tokens_BS, torch.float32, device())
    # Transformer Engine multiplies fp32 matrices in TF32, which keeps ten bits.
    assert relative(found, wanted) < (5e-3 if transformer_engine else 1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_logits_are_as_close_to_fp32_as_transformers_bf16(folders, tokens_BS: Tensor, architecture: str) -> None:
    folder = folders[architecture] / "policy"
    found, _ = our_logits(folder, tokens_BS, "bf16")
    exact = transformers_logits(folder, tokens_BS, torch.float32, device())
    rounded = transformers_logits(folder, tokens_BS, torch.bfloat16, device())
    assert relative(found, exact) < 2 * relative(rounded, exact) + 1e-3
    assert relative(found, exact) < 0.05


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_local_layers_give_the_same_logits(folders, tokens_BS: Tensor, architecture: str, monkeypatch) -> None:
    """What a machine without Transformer Engine runs."""
    monkeypatch.setattr(engine_model, "HAVE_TE", False)
    folder = folders[architecture] / "policy"
    found, transformer_engine = our_logits(folder, tokens_BS, "fp32")
    assert not transformer_engine
    assert relative(found, transformers_logits(folder, tokens_BS, torch.float32, device())) < 1e-4
    in_bf16, _ = our_logits(folder, tokens_BS, "bf16")
    assert relative(in_bf16, found) < 0.05


def configuration(folder: Path, run: Path, algorithm: dict[str, Any], **precision: Any) -> dict[str, Any]:
    return {
        "algorithm": algorithm,
        "models": {name: str(folder / name) for name in ("policy", "dpo", "reverse")},
        "data": {"train": str(folder / "pairs.jsonl")},
        "batch": {"global_size": 8, "micro_size": 4},
        "run": {"dir": str(run), "steps": STEPS},
        "optim": {"lr": 1e-3, "warmup": 0.0, "min_lr_ratio": 1.0, "decay": "constant"},
        "precision": precision,
    }


def trained(values: dict[str, Any]) -> list[dict[str, float]]:
    """Metrics of each step."""
    train(build(TrainConfig, values))
    return [json.loads(line) for line in (Path(values["run"]["dir"]) / "metrics.jsonl").read_text().splitlines()]


def first_step(folder: Path, loss: dense.Loss) -> tuple[float, float]:
    """Loss and gradient norm of the dense fp64 reference, on the CPU."""
    models = {name: dense.load(folder / name) for name in ("policy", "dpo", "reverse")}
    value = loss(models, dense.read_pairs(folder / "pairs.jsonl"))
    value.backward()
    return value.item(), torch.nn.utils.get_total_norm([p.grad for p in models["policy"].parameters()]).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.05), ("fp32", 0.01)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aligndistil_trains(folders, tmp_path: Path, architecture: str, dtype: str, tolerance: float) -> None:
    folder = folders[architecture]
    metrics = trained(configuration(folder, tmp_path, {"name": "aligndistil", **DISTIL}, dtype=dtype))
    assert len(metrics) == STEPS
    loss, grad_norm = first_step(folder, partial(dense.aligndistil, **DISTIL))
    assert metrics[0]["train/policy/loss"] == pytest.approx(loss, rel=tolerance)
    assert metrics[0]["train/policy/grad_norm"] == pytest.approx(grad_norm, rel=2 * tolerance)
    assert metrics[-1]["train/policy/loss"] < 0.9 * metrics[0]["train/policy/loss"]


@pytest.mark.parametrize(
    ("algorithm", "tolerance"),
    [({"name": "sft"}, 0.04), ({"name": "aligndistil", **DISTIL}, 0.1)],
    ids=["sft", "aligndistil"],
)
def test_fp8_trains_like_bf16(folders, tmp_path: Path, algorithm: dict[str, Any], tolerance: float) -> None:
    """AlignDistil is given more room: it extrapolates the difference of two models, and their FP8 errors with it."""
    if not engine_model.HAVE_TE:
        pytest.skip("FP8 needs Transformer Engine, which is not installed")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9 or higher (Ada, Hopper or later)")
    folder = folders["llama-untied"]
    slower = {"optim": {"lr": 2e-4}}  # so that losses stay large enough to compare
    plain = trained(merge(configuration(folder, tmp_path / "bf16", algorithm, dtype="bf16"), slower))
    precision = {"dtype": "bf16", "fp8": "hybrid", "fp8_recipe": "delayed"}
    fp8 = trained(merge(configuration(folder, tmp_path / "fp8", algorithm, **precision), slower))
    assert len(fp8) == STEPS
    assert fp8[0]["train/policy/loss"] != plain[0]["train/policy/loss"], "FP8 products should leave a trace"
    for one, other in zip(plain, fp8, strict=True):
        assert other["train/policy/loss"] == pytest.approx(one["train/policy/loss"], rel=tolerance)
    assert fp8[-1]["train/policy/loss"] < fp8[0]["train/policy/loss"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_generation_follows_transformers(folders, architecture: str) -> None:
    """Every token is transformers' most likely one, or so near to it that TF32's rounding decides."""
    folder = folders[architecture] / "policy"
    prompts = [[0, 5, 9], [7], [0, 7, 7, 30, 41, 2]]
    sampling = Sampling(max_new_tokens=20, temperature=0.0, seed=0, stop_tokens=frozenset({1}))
    with parallel_session(ParallelConfig()) as parallel:
        arch = read_architecture(folder)
        chunks = build_model(arch, parallel, PrecisionConfig(dtype="fp32"))
        load_model(chunks, folder, arch, parallel)
        freeze(chunks)
        # Two rows for three prompts: the third joins when the first is done.
        found = MegatronSampler(Model(chunks, arch), parallel, 2, str).generate(prompts, sampling)
    for prompt, completion in zip(prompts, found, strict=True):
        assert completion is not None
        assert len(completion.tokens) == 20 or completion.tokens[-1] == 1
        tokens_1S = torch.tensor([prompt + completion.tokens])
        logits = transformers_logits(folder, tokens_1S, torch.float32, device())[len(prompt) - 1 : -1].cpu()
        behind = logits.max(-1).values - logits.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert behind.max() < 0.02 * logits.std()
        assert (behind == 0).float().mean() > 0.8


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("fp8", [None, "hybrid"])
def test_on_policy_trains(folders, tmp_path: Path, fp8: str | None, ahead: bool) -> None:
    """Sampling between updates, and in the background; FP8 wants rows and lengths in multiples of 16."""
    if fp8 and (not engine_model.HAVE_TE or torch.cuda.get_device_capability() < (8, 9)):
        pytest.skip("FP8 needs Transformer Engine and compute capability 8.9 or higher (Ada, Hopper or later)")
    algorithm = {"name": "aligndistil", "on_policy": True, **DISTIL}
    values = configuration(folders["llama-untied"], tmp_path, algorithm, dtype="bf16", fp8=fp8)
    rollout = {"rollout": {"max_new_tokens": 20, "batch_size": 3, "ahead": ahead}}
    metrics = trained(merge(values, {**rollout, "optim": {"lr": 2e-4}}))
    assert [line["rollout/staleness"] for line in metrics] == [0.0] + [float(ahead)] * (STEPS - 1)
    assert all(0 < line["rollout/length"] <= 20 for line in metrics)
    assert metrics[-1]["train/policy/loss"] < metrics[0]["train/policy/loss"]


def test_checkpoint_loads_and_resumes(folders, tmp_path: Path) -> None:
    folder = folders["qwen2-tied"]
    values = configuration(folder, tmp_path / "whole", {"name": "aligndistil", **DISTIL}, dtype="bf16")
    values = merge(values, {"optim": {"lr": 2e-4}})
    whole = trained(values)
    broken = merge(values, {"run": {"dir": str(tmp_path / "broken"), "save_every": STEPS // 2}})
    trained(broken)
    last = f"step_{STEPS:06d}"
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / last)
    shutil.rmtree(tmp_path / "broken" / "policy")
    resumed = trained(broken)[-1]
    # Kernels on a GPU may add in any order, so a resumed run is equal to rounding only.
    for key in ("train/policy/loss", "train/policy/grad_norm"):
        assert resumed[key] == pytest.approx(whole[-1][key], rel=0.05)

    exported = load_file(tmp_path / "broken" / "policy" / "model.safetensors")
    with parallel_session(ParallelConfig()) as parallel:
        path = tmp_path / "broken" / "checkpoints" / last / "policy"
        arch = read_architecture(path)
        chunks = build_model(arch, parallel, PrecisionConfig(dtype="bf16"))
        load_model(chunks, path, arch, parallel)
        loaded: dict[str, Tensor] = {}
        for name, parameter in global_parameters(chunks):
            loaded |= mapping.write_full(name, arch, [parameter.detach().cpu()])
    assert loaded.keys() == exported.keys()
    for name, tensor in exported.items():
        assert torch.equal(loaded[name], tensor), name
