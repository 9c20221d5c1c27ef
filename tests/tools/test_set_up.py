"""The scripts behind the Makefile."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest
import torch

from megatron_aligndistil.commands.environment import Finding

ROOT = Path(__file__).parents[2]
HELD_VERSIONS = run_path(str(ROOT / "tools" / "held_versions.py"))
GPU_CHECK = run_path(str(ROOT / "tools" / "gpu_check.py"))


def test_what_an_installation_has_is_left_to_it_and_its_torch_is_held() -> None:
    pins = ["# versions", "torch==2.13.0", "numpy==2.4.6", "PyYAML==6.0.3", "typing_extensions==4.16.0", "ruff==0.17.5"]
    installed = {"torch": "2.11.0a0+nv26.2", "numpy": "1.26.4", "typing-extensions": "4.12.2", "apex": "0.1"}
    assert HELD_VERSIONS["held"](pins, installed) == [
        "# versions",
        "PyYAML==6.0.3",
        "ruff==0.17.5",
        "torch==2.11.0a0+nv26.2",
        "numpy==1.26.4",
    ]
    assert HELD_VERSIONS["held"]([], installed) == ["torch==2.11.0a0+nv26.2", "numpy==1.26.4"]
    assert HELD_VERSIONS["held"](pins, {}) == pins


def test_names_are_compared_as_an_index_compares_them() -> None:
    assert HELD_VERSIONS["normalise"]("Typing_Extensions") == HELD_VERSIONS["normalise"]("typing.extensions")
    assert HELD_VERSIONS["installed_versions"]()["megatron-core"] == "0.16.1"


def test_everything_the_project_asks_for_is_pinned() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {HELD_VERSIONS["normalise"](name) for name in re.findall(r"^([\w.-]+)==\S+$", text, re.MULTILINE)}
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    core = re.search(r"install_requires=\[(.*?)\n    \]", setup, re.DOTALL)
    dev = re.search(r'"dev": \[(.*?)\n        \]', setup, re.DOTALL)
    assert core and dev
    asked = {name.lower() for name in re.findall(r'"([A-Za-z][\w-]*)', core.group(1) + dev.group(1))}
    assert {"torch", "megatron-core", "pytest"} <= asked
    assert asked - pinned == {"triton"}, "of which each CUDA build of torch brings its own version"
    assert "+" not in "".join(line for line in text.splitlines() if line.startswith("torch"))


def test_page_of_a_gpu_check_says_what_each_test_did(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='needs | 2 GPUs')\n"
        "def test_idle(): pass\n"
    )
    report = tmp_path / "report.xml"
    pytest_run = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", "test_three.py"]
    assert subprocess.run(pytest_run, cwd=tmp_path, capture_output=True).returncode == 1
    outcomes = GPU_CHECK["read_outcomes"](report)
    assert [(outcome.name, outcome.result) for outcome in outcomes] == [
        ("test_three::test_good", "passed"),
        ("test_three::test_bad", "failed"),
        ("test_three::test_idle", "skipped"),
    ]
    page = tmp_path / "results" / "page.md"
    findings = [Finding("torch", "2.11.0", "ok", "CUDA 13.0")]
    GPU_CHECK["write_page"](page, "1 x NVIDIA H200", findings, outcomes, 12.3)
    text = page.read_text()
    assert "1 passed, 1 failed, 1 skipped in 12 s" in text
    assert "| torch | 2.11.0 | ok |" in text
    assert "needs \\| 2 GPUs |" in text and "assert 1 == 2 |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_gpu_check_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("gpu-check: torch sees no GPU here") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
