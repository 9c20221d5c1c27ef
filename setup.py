"""Packaging: what the project is called, what it needs, and the command it installs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
SERVE = ["fastapi", "uvicorn"]
# Asking endpoints; AlpacaEval's own model of length-controlled win rates, which scikit-learn 1.10 is to break.
EVAL = ["openai", "alpaca-eval>=0.6.6,<0.7", "scikit-learn<1.10"]


def read_version() -> str:
    """The version in the package, read without importing it (its dependencies are not there yet)."""
    text = (ROOT / "megatron_aligndistil" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('megatron_aligndistil/__init__.py has no line __version__ = "..."')
    return found.group(1)


setup(
    name="megatron-aligndistil",
    version=read_version(),
    description="Token-level language model alignment by adaptive policy distillation, on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["megatron_aligndistil", "megatron_aligndistil.*"]),
    package_data={"megatron_aligndistil": ["commands/pages/*"]},
    python_requires=">=3.11,<3.13",
    install_requires=[
        "torch>=2.8,<2.15",
        # Later versions need Python 3.12 and import triton. Bare: the extras pull in packages for GPUs only.
        "megatron-core==0.16.1",
        # megatron-core imports these without declaring them.
        "einops",
        "psutil",
        "transformers>=5,<6",
        "datasets",
        "filelock",
        "pyarrow",
        "tokenizers",
        "sentencepiece",
        "protobuf",  # transformers reads SentencePiece models with it
        "safetensors",
        "pydantic>=2.7,<3",
        "pyyaml",
        "rich",
        "tensorboard",
        "matplotlib",
        "numpy",
    ],
    extras_require={
        # Never on a machine without CUDA: megatron-core's imports fail where Transformer Engine is there without it.
        "gpu": ["transformer-engine[pytorch]>=2.10,<2.12"],
        "nemo": ["nemo-toolkit"],
        "wandb": ["wandb"],
        "serve": SERVE,
        "eval": EVAL,
        "dev": [
            *SERVE,
            *EVAL,
            "pytest>=8",
            "hypothesis>=6",
            "ruff>=0.17,<0.18",
            "mypy>=2,<3",
            "types-PyYAML",
            # Software that tests and benchmarks compare with.
            "trl>=1.16,<2",
            "liger-kernel>=0.8,<0.9",
            # For its interpreter, where torch is a CPU build. Not pinned further: CUDA builds of torch bring their own.
            "triton>=3.4; sys_platform == 'linux'",
        ],
    },
    entry_points={"console_scripts": ["aligndistil = megatron_aligndistil.__main__:main"]},
)
