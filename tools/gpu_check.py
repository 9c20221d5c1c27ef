"""Runs every test marked `gpu` on this machine and writes what it saw to docs/results/gpu-<name of the GPU>.md.

Usage: python tools/gpu_check.py [--out FOLDER] [arguments for pytest]. Exit code: pytest's, or 1 without a GPU.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also runs where the project is not installed

from megatron_aligndistil.commands.doctor import destination  # noqa: E402
from megatron_aligndistil.commands.environment import Finding, examine, gpus  # noqa: E402

_NO_TESTS = 5  # pytest's exit code when it selected nothing


@dataclass(frozen=True)
class Outcome:
    """What one test did: passed, failed or skipped, in how many seconds, and why when it did not pass."""

    name: str
    result: str
    seconds: float
    reason: str


def read_outcomes(report: Path) -> list[Outcome]:
    """The tests of a JUnit report, in the order in which they ran."""
    outcomes = []
    for case in ElementTree.parse(report).iter("testcase"):
        result, reason = "passed", ""
        for tag, word in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
            found = case.find(tag)
            if found is not None:
                result, reason = word, found.get("message", "").partition("\n")[0]
        module = case.get("classname", "").replace(".", "/")
        outcomes.append(Outcome(f"{module}::{case.get('name')}", result, float(case.get("time", 0)), reason))
    return outcomes


def write_page(
    path: Path, where: str, findings: Sequence[Finding], outcomes: Sequence[Outcome], seconds: float
) -> None:
    """The page: where it ran, on what versions, and every test's outcome."""
    counts = Counter(outcome.result for outcome in outcomes)
    total = ", ".join(f"{counts[result]} {result}" for result in ("passed", "failed", "skipped"))
    when = f"{date.today().isoformat()}, {platform.system()} {platform.machine()}"
    lines = [
        f"# GPU tests on {where}",
        "",
        f"`make gpu-check`, {when}: {total} in {seconds:.0f} s.",
        "",
        "| part | found | status |",
        "|---|---|---|",
        *(f"| {finding.part} | {finding.found or '-'} | {finding.status} |" for finding in findings),
        "",
        "| test | outcome | seconds | reason |",
        "|---|---|---|---|",
        *(
            f"| `{_cell(outcome.name)}` | {outcome.result} | {outcome.seconds:.1f} | {_cell(outcome.reason)} |"
            for outcome in outcomes
        ),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """Run the tests and write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="folder of the page")
    options, rest = parser.parse_known_args()
    found = gpus()
    if not found:
        print(
            "gpu-check: torch sees no GPU here, so there is nothing to check; see aligndistil doctor", file=sys.stderr
        )
        return 1
    findings = examine()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", f"--junitxml={report}", *rest]
        code = subprocess.run(command, cwd=ROOT).returncode
        if code == _NO_TESTS or not report.exists():
            print(f"gpu-check: pytest ran no test (exit code {code}); no page was written", file=sys.stderr)
            return code or 1
        outcomes = read_outcomes(report)
    kinds = "-".join(gpu.name for gpu in found)
    page = options.out / f"gpu-{re.sub(r'[^a-z0-9]+', '-', kinds.lower()).strip('-')}.md"
    write_page(page, destination(found), findings, outcomes, time.monotonic() - start)
    print(f"gpu-check: wrote {page}")
    return code


if __name__ == "__main__":
    sys.exit(main())
