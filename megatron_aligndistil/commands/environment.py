"""What this environment holds, and whether it fits: the findings behind ``aligndistil doctor``.

Which versions fit is stated here and in setup.py. Packages are looked up, not imported, because the wrong ones fail on
import; only torch is imported, to ask it about GPUs.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

_MEGATRON_CORE = "0.16.1"
_AMPERE = (8, 0)
_ADA = (8, 9)
_TRANSFORMER_ENGINE = (
    "transformer-engine",
    "transformer-engine-torch",
    "transformer-engine-cu12",
    "transformer-engine-cu13",
)

Status = Literal["ok", "absent", "untested", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        part: what was looked for.
        found: the version or device found; None when it is not there.
        status: "absent" is an optional part that is not there; "untested" a version outside those tried, which may well
            work; "wrong" has to be mended before a run.
        meaning: what that means for a run on this machine.
        remedy: what to do; empty when nothing has to be done.
    """

    part: str
    found: str | None
    status: Status
    meaning: str
    remedy: str = ""


@dataclass(frozen=True)
class GPU:
    """One kind of GPU: its name, CUDA compute capability, and how many a run may use."""

    name: str
    capability: tuple[int, int]
    count: int


@dataclass(frozen=True)
class Package:
    """A package whose version is all that matters about it: `fits` is what the project needs."""

    name: str
    fits: str
    meaning: str
    optional: bool = False


_PACKAGES = (
    Package("transformers", ">=5,<6", "reads configurations, tokenizers and chat templates"),
    Package("tokenizers", "", "tokenizers of Hugging Face folders"),
    Package("safetensors", "", "weights of Hugging Face folders"),
    Package("datasets", "", "reads JSON, JSONL and Parquet records"),
    Package("pydantic", ">=2.7,<3", "checks configurations"),
    Package("einops", "", "megatron-core needs it and does not say so"),
    Package("psutil", "", "megatron-core needs it to save checkpoints and does not say so"),
    Package("wandb", "", "logs runs to Weights & Biases (run.wandb)", optional=True),
    Package("nemo-toolkit", "", "NeMo's experiment manager and .nemo archives", optional=True),
)


def examine() -> list[Finding]:
    """Everything a run depends on, as it is in this environment. Takes as long as importing torch."""
    has_gpu = bool(gpus())
    return [
        _python(),
        _torch(),
        *_gpus(),
        _megatron_core(),
        _transformer_engine(has_gpu),
        _apex(has_gpu),
        _flash_attention(has_gpu),
        *(judge(package, version_of(package.name)) for package in _PACKAGES),
    ]


def version_of(*names: str) -> str | None:
    """Version of the first of these distributions that is installed, None when none is."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def folder_of(module: str) -> Path | None:
    """The folder that ``import module`` would take a package from, found without running it, or None."""
    try:
        spec = util.find_spec(module)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def fits(version: str, specifier: str) -> bool:
    """Whether a version is within a specifier such as ``>=2.6,<2.15``; builds and pre-releases of it count as it."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return SpecifierSet(specifier).contains(Version(version).base_version)
    except InvalidVersion:
        return False


def judge(package: Package, version: str | None) -> Finding:
    """A finding about a package of which only the version matters."""
    if version is None and package.optional:
        return Finding(package.name, None, "absent", f"optional: {package.meaning}")
    remedy = f"pip install '{package.name}{package.fits}'"
    if version is None:
        return Finding(package.name, None, "wrong", package.meaning, remedy)
    if not fits(version, package.fits):
        return Finding(package.name, version, "wrong", f"{package.meaning}; versions {package.fits} fit", remedy)
    return Finding(package.name, version, "ok", package.meaning)


def gpus() -> list[GPU]:
    """The CUDA devices that torch sees here, by kind."""
    try:
        import torch
    except Exception:  # a broken torch raises many things; the finding about torch says so
        return []
    if not torch.cuda.is_available():
        return []
    kinds: dict[tuple[str, tuple[int, int]], int] = {}
    for device in range(torch.cuda.device_count()):
        kind = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        kinds[kind] = kinds.get(kind, 0) + 1
    return [GPU(name, capability, count) for (name, capability), count in kinds.items()]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        return Finding("python", version, "ok", sys.executable)
    return Finding("python", version, "wrong", "the project is for 3.11 and 3.12", "use Python 3.12")


def _torch() -> Finding:
    version = version_of("torch")
    remedy = "pip install 'torch>=2.8,<2.15'"
    if version is None:
        return Finding("torch", None, "wrong", "everything is computed with it", remedy)
    try:
        import torch
    except Exception as error:
        message = (str(error).splitlines() or [type(error).__name__])[0]
        return Finding("torch", version, "wrong", f"its import fails: {message}", "install torch anew")
    version = torch.__version__
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if not fits(version, ">=2.8"):
        return Finding("torch", version, "wrong", f"{build}; the project needs 2.8 or later", remedy)
    if not fits(version, "<2.15"):
        return Finding("torch", version, "untested", f"{build}; the project is written for 2.8 to 2.14")
    return Finding("torch", version, "ok", build)


def _gpus() -> list[Finding]:
    found = gpus()
    if found:
        return [_judge_gpu(gpu) for gpu in found]
    # Hiding the devices is how one asks for the CPU on a GPU machine.
    if Path("/dev/nvidiactl").exists() and "CUDA_VISIBLE_DEVICES" not in os.environ:
        remedy = "install a CUDA build of torch that the driver supports, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        return [Finding("GPU", None, "wrong", "NVIDIA's driver is here, and this torch sees no GPU", remedy)]
    return [Finding("GPU", None, "absent", "runs on CPU processes over gloo; FP8 is not available")]


def _judge_gpu(gpu: GPU) -> Finding:
    found = f"{gpu.count} x {gpu.name}"
    capability = f"compute capability {gpu.capability[0]}.{gpu.capability[1]}"
    if gpu.capability < _AMPERE:
        return Finding("GPU", found, "wrong", f"{capability}; bf16 needs 8.0 (A100) or later", "use a later GPU")
    formats = "bf16 and FP8" if gpu.capability >= _ADA else "bf16; FP8 needs 8.9 (Ada, H100) or later"
    return Finding("GPU", found, "ok", f"{capability}: {formats}")


def _megatron_core() -> Finding:
    remedy = f"pip install megatron-core=={_MEGATRON_CORE}"
    folder = folder_of("megatron.core")
    if folder is None:
        return Finding("megatron-core", None, "wrong", "the engine that trains", remedy)
    # The module that would be imported is asked, not the metadata: a PYTHONPATH may hide the installed one.
    try:
        version = str(runpy.run_path(str(folder / "package_info.py"))["__version__"])
    except (OSError, KeyError):
        version = version_of("megatron-core") or "unknown"
    if version != _MEGATRON_CORE:
        meaning = f"from {folder}; the backends are written for {_MEGATRON_CORE}, and its internals move"
        return Finding("megatron-core", version, "wrong", meaning, f"{remedy}, and nothing else on PYTHONPATH")
    return Finding("megatron-core", version, "ok", "the engine that trains")


def _transformer_engine(has_gpu: bool) -> Finding:
    part, version = "transformer-engine", version_of(*_TRANSFORMER_ENGINE)
    install = "in the project's folder, pip install --no-build-isolation -e '.[gpu]'"
    if not has_gpu:
        if version is None:
            return Finding(part, None, "absent", "Megatron's own layers are used on a CPU")
        installed = [name for name in _TRANSFORMER_ENGINE if version_of(name)]
        meaning = "without a GPU its presence makes megatron-core's imports fail"
        return Finding(part, version, "wrong", meaning, f"pip uninstall {' '.join(installed)}")
    if version is None:
        return Finding(part, None, "wrong", "the layers that run on a GPU come from it", install)
    if not fits(version, ">=2.9"):
        return Finding(part, version, "wrong", f"megatron-core {_MEGATRON_CORE} needs 2.9 or later", install)
    problem = _import_problem("transformer_engine.pytorch")
    if problem:
        remedy = "build its torch extension against this torch: pip install --no-build-isolation --no-deps"
        remedy += f" --no-cache-dir --force-reinstall transformer-engine-torch=={version}"
        return Finding(part, version, "wrong", f"its import fails: {problem}", remedy)
    if not fits(version, ">=2.10,<2.12"):
        return Finding(part, version, "untested", f"2.10 and 2.11 are the versions for megatron-core {_MEGATRON_CORE}")
    return Finding(part, version, "ok", "layers, fused attention and FP8")


def _import_problem(module: str) -> str:
    """Last line of what importing a module in a process of its own prints when it fails; empty when it works."""
    result = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
    lines = result.stderr.strip().splitlines()
    return "" if result.returncode == 0 else lines[-1] if lines else f"exit code {result.returncode}"


def _apex(has_gpu: bool) -> Finding:
    folder = folder_of("apex")
    version = version_of("apex") or "unknown version"
    if folder is None:
        return Finding("apex", None, "absent", "optional: Transformer Engine and torch take its place")
    if not (folder / "normalization").is_dir():
        meaning = "not NVIDIA's apex but an unrelated package of that name, which breaks megatron-core's imports"
        return Finding("apex", version, "wrong", meaning, "pip uninstall apex")
    if not has_gpu:
        meaning = "megatron-core would take its CUDA optimiser, and there is no GPU"
        return Finding("apex", version, "wrong", meaning, "pip uninstall apex")
    return Finding("apex", version, "ok", "NVIDIA's; not needed beside Transformer Engine")


def _flash_attention(has_gpu: bool) -> Finding:
    version = version_of("flash-attn", "flash-attn-3")
    if version is None:
        return Finding("flash-attn", None, "absent", "optional: Transformer Engine's attention takes its place")
    if not has_gpu:
        return Finding("flash-attn", version, "ok", "not used without a GPU")
    return Finding("flash-attn", version, "ok", "Transformer Engine chooses between it and cuDNN's attention")
