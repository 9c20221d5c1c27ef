"""The doctor in real environments: this one, and this one behind folders with the packages that people get wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_aligndistil.commands.doctor import destination
from megatron_aligndistil.commands.environment import GPU, Package, examine, fits, judge

ROOT = Path(__file__).parents[2]
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is wrong without a GPU is right with one")


def install(folder: Path, name: str, version: str, *modules: str) -> None:
    """Put a distribution in `folder` as pip would; every module raises when it is imported."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for module in modules:
        path = folder.joinpath(*module.split("."))
        path.mkdir(parents=True, exist_ok=True)
        (path / "__init__.py").write_text("raise RuntimeError('imported')\n")


def doctor(*folders: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*map(str, folders), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "megatron_aligndistil", "doctor"],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def row(output: str, part: str) -> list[str]:
    """The cells of one line of the table."""
    (line,) = (line for line in output.splitlines() if line.startswith(part + " "))
    return [cell.strip() for cell in line.split("│")]


@needs_cpu
def test_this_environment_is_sound_and_said_to_run_on_the_cpu() -> None:
    start = time.monotonic()
    result = doctor()
    assert result.returncode == 0, result.stdout + result.stderr
    assert time.monotonic() - start < 20  # about 2 s on an idle machine
    assert "will run on: CPU over gloo, fp32" in result.stdout
    assert row(result.stdout, "megatron-core")[1:3] == ["0.16.1", "ok"]
    assert row(result.stdout, "torch")[1:3] == [torch.__version__, "ok"]


def test_every_part_is_named_once_and_every_wrong_one_has_a_remedy() -> None:
    findings = examine()
    parts = [finding.part for finding in findings]
    assert len(set(parts)) == len(parts)
    assert {"python", "torch", "GPU", "megatron-core", "transformer-engine", "apex", "flash-attn"} <= set(parts)
    assert all(finding.remedy for finding in findings if finding.status == "wrong")


def test_the_unrelated_apex_is_told_from_nvidias(tmp_path: Path) -> None:
    install(tmp_path, "apex", "0.9.10.dev0", "apex")
    result = doctor(tmp_path)
    assert result.returncode == 1
    cells = row(result.stdout, "apex")
    assert cells[1:3] == ["0.9.10.dev0", "wrong"]
    assert "not NVIDIA's" in cells[3] and "pip uninstall apex" in result.stdout
    assert "to mend first: apex" in result.stdout


@needs_cpu
def test_packages_for_gpus_are_wrong_without_one(tmp_path: Path) -> None:
    install(tmp_path, "apex", "0.1", "apex", "apex.normalization")
    install(tmp_path, "transformer_engine", "2.11.0", "transformer_engine")
    install(tmp_path, "transformer_engine_cu13", "2.11.0")
    result = doctor(tmp_path)
    assert result.returncode == 1
    assert row(result.stdout, "apex")[1:3] == ["0.1", "wrong"]
    assert row(result.stdout, "transformer-engine")[1:3] == ["2.11.0", "wrong"]
    assert "pip uninstall transformer-engine transformer-engine-cu13" in " ".join(result.stdout.split())
    assert "to mend first: transformer-engine, apex" in result.stdout


def test_another_megatron_core_in_front_is_found_out(tmp_path: Path) -> None:
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (core / "package_info.py").write_text("__version__ = '0.19.2'\n")
    result = doctor(tmp_path)
    assert result.returncode == 1
    assert row(result.stdout, "megatron-core")[1:3] == ["0.19.2", "wrong"]


def test_versions_that_do_not_fit() -> None:
    package = Package("transformers", ">=5,<6", "reads configurations")
    assert judge(package, "5.23.0").status == "ok"
    finding = judge(package, "4.57.1")
    assert finding.status == "wrong" and finding.remedy == "pip install 'transformers>=5,<6'"
    assert judge(package, None).status == "wrong"
    assert judge(Package("wandb", "", "logs", optional=True), None).status == "absent"


@pytest.mark.parametrize(
    ("version", "specifier", "answer"),
    [
        ("2.11.0a0+eb65b36914.nv26.2", ">=2.6,<2.15", True),  # NVIDIA's own builds
        ("2.13.0+cpu", ">=2.6,<2.15", True),
        ("2.15.0", ">=2.6,<2.15", False),
        ("2.5.1", ">=2.6", False),
        ("2.12.0.dev0+abc", "<2.12", False),
        ("built here", "", False),
    ],
)
def test_builds_and_pre_releases_count_as_their_version(version: str, specifier: str, answer: bool) -> None:
    assert fits(version, specifier) is answer


def test_destination_counts_gpus_by_kind() -> None:
    found = [GPU("NVIDIA H200", (9, 0), 8)]
    assert destination(found) == "8 x NVIDIA H200 over nccl, bf16, Transformer Engine layers"


def test_arguments_are_refused() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "megatron_aligndistil", "doctor", "--fix"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 1
    assert result.stderr == "aligndistil: unexpected argument '--fix'; doctor takes none\n"
