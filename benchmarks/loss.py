"""Time, memory and communication of AlignDistil's loss: fused, composed, and the authors' formulas, in one run.

    python -m benchmarks.loss --out docs/results/loss             # on this machine's CPU
    python -m benchmarks.loss --cuda --out docs/results/loss-gpu  # on its GPU

Writes loss.json (every measurement), loss.md and loss.png. Variants take turns, each in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.variants import VARIANTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CPU_CASES = [
    {"T": 3000, "V": 361, "H": 128, "tp": 1},  # the demo's micro-batch
    {"T": 3000, "V": 361, "H": 128, "tp": 2},
    {"T": 2048, "V": 32_000, "H": 288, "tp": 1},
    {"T": 2048, "V": 32_000, "H": 288, "tp": 2},
    {"T": 512, "V": 151_936, "H": 288, "tp": 1},
    {"T": 2048, "V": 151_936, "H": 288, "tp": 1},
]
GPU_CASES = [
    {"T": 8192, "V": 151_936, "H": 1536, "tp": 1},
    {"T": 8192, "V": 151_936, "H": 3584, "tp": 1},
    {"T": 8192, "V": 128_256, "H": 4096, "tp": 1},
]


def main() -> None:
    """Measure every case and variant, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for loss.json, loss.md and loss.png")
    parser.add_argument("--cuda", action="store_true", help="measure on the GPU, in bf16")
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    cases = GPU_CASES if arguments.cuda else CPU_CASES
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    results = []
    with Progress(*columns) as progress:
        task = progress.add_task("measuring", total=len(cases) * len(VARIANTS))
        for case in cases:
            for variant in VARIANTS:
                progress.update(task, description=f"{variant} {describe(case)}")
                if variant != "authors" or case["tp"] == 1:  # the authors' code knows one process
                    results.append(measure(case, variant, arguments.cuda, arguments.repetitions))
                progress.advance(task)
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(arguments.cuda), "results": results}
    (arguments.out / "loss.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "loss.md").write_text(markdown(report))
    plot(results, arguments.out / "loss.png")
    print(f"wrote {arguments.out}/loss.md")


def measure(case: dict[str, int], variant: str, cuda: bool, repetitions: int) -> dict[str, Any]:
    """Run benchmarks.measure in `tp` processes of one thread each."""
    request = case | {
        "variant": variant,
        "cuda": cuda,
        "dtype": "bf16" if cuda else "fp32",
        "threads": 1,
        "repetitions": repetitions,
    }
    start = [sys.executable, "-m", "benchmarks.measure"]
    if case["tp"] > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case['tp']}"]
        start += ["-m", "benchmarks.measure"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, json.dumps(request)], env=environment, capture_output=True, text=True)
    if done.returncode:
        # A variant that does not fit is a result too.
        return request | {"failed": done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else "killed"}
    return request | json.loads(done.stdout.strip().splitlines()[-1])


def machine(cuda: bool) -> str:
    """What the figures were taken on."""
    if cuda:
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, one thread a process"


def describe(case: dict[str, Any]) -> str:
    """The size of a case for people."""
    return f"T {case['T']:,}, V {case['V']:,}, H {case['H']:,}, TP {case['tp']}"


def markdown(report: dict[str, Any]) -> str:
    """A table of every measurement, with ratios to the composed version of the same case."""
    lines = [
        "# The loss: fused, composed, and the authors' formulas",
        "",
        f"Loss and gradient of one micro-batch (adaptive teacher, r 10) on {report['machine']}.",
        "Time: median of the repetitions after a warm-up. Memory: peak beyond the inputs, gradients included.",
        "Collectives: calls and bytes that one rank sends in one repetition.",
        "",
        "| size | variant | seconds | of composed | peak MiB | of composed | collectives | MiB sent | loss |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    composed = {describe(r): r for r in report["results"] if r["variant"] == "composed" and "failed" not in r}
    for result in report["results"]:
        if "failed" in result:
            lines.append(f"| {describe(result)} | {result['variant']} | failed: {result['failed']} | | | | | | |")
            continue
        seconds, peak = statistics.median(result["seconds"]), result["peak_bytes"]
        base = composed.get(describe(result))
        ratios = ("–", "–")
        if base is not None:
            ratios = (f"{seconds / statistics.median(base['seconds']):.2f}", f"{peak / base['peak_bytes']:.2f}")
        calls, sent = result["collectives"]["calls"], result["collectives"]["bytes"] / 2**20
        lines.append(
            f"| {describe(result)} | {result['variant']} | {seconds:.3f} | {ratios[0]} | {peak / 2**20:,.0f} | "
            f"{ratios[1]} | {calls} | {sent:.2f} | {result['loss']:.6f} |"
        )
    return "\n".join([*lines, "", "![Time and memory](loss.png)", ""])


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of time and peak memory by case, one colour a variant."""
    measured = [result for result in results if "failed" not in result]
    cases = list(dict.fromkeys(describe(result) for result in measured))
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.6 * len(cases) + 1.6), sharey=True)
    colours = dict(zip(VARIANTS, ("#0072B2", "#E69F00", "#999999"), strict=True))
    values = {
        "seconds": lambda result: statistics.median(result["seconds"]),
        "peak MiB beyond inputs": lambda result: result["peak_bytes"] / 2**20,
    }
    for axis, (label, value) in zip(axes, values.items(), strict=True):
        for index, variant in enumerate(VARIANTS):
            mine = [result for result in measured if result["variant"] == variant]
            heights = [cases.index(describe(result)) + 0.27 * (index - 1) for result in mine]
            axis.barh(heights, [value(result) for result in mine], 0.25, label=variant, color=colours[variant])
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(cases)), cases)
    axes[0].invert_yaxis()
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
