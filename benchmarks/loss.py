"""Time, memory and communication of AlignDistil's loss: fused, composed, and the authors' formulas, in one run.

    python -m benchmarks.loss --out docs/results/loss             # on this machine's CPU
    python -m benchmarks.loss --cuda --out docs/results/loss-gpu  # on its GPU

Writes loss.json (every measurement, as it is made), loss.md and loss.png. Variants take turns, each in processes of its
own. Given again, it goes on with what is not measured.
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

from benchmarks.variants import SINGLE_PROCESS, VARIANTS

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

_SMALL = 2**26  # logits of cases that take milliseconds, and are measured more often for it


def main() -> None:
    """Measure every case and variant, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for loss.json, loss.md and loss.png")
    parser.add_argument("--cuda", action="store_true", help="measure on the GPU, in bf16")
    parser.add_argument("--repetitions", type=int, default=3, help="of cases that take long; short ones get up to 50")
    parser.add_argument("--again", action="store_true", help="measure anew what loss.json in --out holds already")
    arguments = parser.parse_args()
    cases = GPU_CASES if arguments.cuda else CPU_CASES
    wanted = [
        (case, variant) for case in cases for variant in VARIANTS if variant not in SINGLE_PROCESS or case["tp"] == 1
    ]
    file = arguments.out / "loss.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(arguments.cuda), "cuda": arguments.cuda, "results": []}
    if file.is_file() and not arguments.again:
        known = json.loads(file.read_text())
        report["results"] = known["results"] if known["machine"] == report["machine"] else []
    measured = {(describe(result), result["variant"]) for result in report["results"]}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        for case, variant in progress.track(wanted, description="measuring"):
            progress.update(progress.task_ids[0], description=f"{variant} {describe(case)}")
            if (describe(case), variant) not in measured:
                report["results"].append(measure(case, variant, arguments.cuda, arguments.repetitions))
                file.write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "loss.md").write_text(markdown(report))
    plot(report["results"], arguments.out / "loss.png")
    print(f"wrote {arguments.out}/loss.md")


def measure(case: dict[str, int], variant: str, cuda: bool, repetitions: int) -> dict[str, Any]:
    """Run benchmarks.measure in `tp` processes of one thread each."""
    request = case | {
        "variant": variant,
        "cuda": cuda,
        "dtype": "bf16" if cuda else "fp32",
        "threads": 1,
        "repetitions": max(repetitions, min(50, _SMALL // (case["T"] * case["V"]))),
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
    """A table of every measurement, with ratios to the composed version and to the bare products of the same case."""
    lines = [
        "# The loss: fused, composed, the authors' formulas, and Liger's nearest",
        "",
        f"Loss and gradient of one micro-batch (adaptive teacher, r 10) on {report['machine']}.",
        "",
        "- **Time**: median of the repetitions after a warm-up. `products`: the five matrix products and nothing else.",
        "- **Memory**: peak beyond inputs and gradients. **Traffic**: bytes that operations read and write.",
        "- **Collectives**: calls, and what one rank sends, in one repetition.",
        "- **liger**: reverse KL from one teacher with two output layers, so less work, and another loss.",
        *(["- **Floor**: the products, and each of the three logits once through memory in bf16."] * report["cuda"]),
        "",
        "| size | variant | seconds | of composed | of products | peak MiB | of composed | traffic GiB | collectives | "
        "MiB sent | loss |" + " of floor |" * report["cuda"],
        "| --- | --- |" + " ---: |" * (9 + report["cuda"]),
    ]
    for case in dict.fromkeys(describe(result) for result in report["results"]):
        mine = {result["variant"]: result for result in report["results"] if describe(result) == case}
        lines += [_row(case, result, mine, report["cuda"]) for result in mine.values()]
    return "\n".join([*lines, "", "![Time and memory](loss.png)", ""])


def _row(case: str, result: dict[str, Any], of_case: dict[str, Any], cuda: bool) -> str:
    if "failed" in result:
        return f"| {case} | {result['variant']} | failed: {result['failed']} |" + " |" * (8 + cuda)
    composed, products = (of_case.get(name, {}) for name in ("composed", "products"))
    cells = [
        case,
        result["variant"],
        f"{seconds(result):.4f}",
        _ratio(seconds(result), seconds(composed)),
        _ratio(seconds(result), seconds(products)),
        f"{result['peak_bytes'] / 2**20:,.0f}",
        _ratio(result["peak_bytes"], composed.get("peak_bytes")),
        f"{result['traffic_bytes'] / 2**30:.2f}",
        str(result["collectives"]["calls"]),
        f"{result['collectives']['bytes'] / 2**20:.2f}",
        "–" if result["variant"] == "products" else f"{result['loss']:.6f}",
    ]
    if cuda:
        once = 3 * result["T"] * result["V"] * 2 / result["bandwidth"]
        floor = seconds(products)
        cells.append(_ratio(seconds(result), None if floor is None else floor + once))
    return f"| {' | '.join(cells)} |"


def seconds(result: dict[str, Any]) -> float | None:
    """The median time of a measurement, if it succeeded."""
    return statistics.median(result["seconds"]) if "seconds" in result else None


def _ratio(value: float | None, base: float | None) -> str:
    return "–" if value is None or not base else f"{value / base:.2f}"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of time and peak memory by case, one colour a variant."""
    measured = [result for result in results if "failed" not in result]
    cases = list(dict.fromkeys(describe(result) for result in measured))
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.8 * len(cases) + 1.6), sharey=True)
    colours = dict(zip(VARIANTS, ("#0072B2", "#E69F00", "#999999", "#009E73", "#DDDDDD"), strict=True))
    width = 0.8 / len(VARIANTS)
    values = {
        "seconds": seconds,
        "peak MiB beyond inputs and gradients": lambda result: result["peak_bytes"] / 2**20,
    }
    for axis, (label, value) in zip(axes, values.items(), strict=True):
        for index, variant in enumerate(VARIANTS):
            mine = [result for result in measured if result["variant"] == variant]
            heights = [cases.index(describe(result)) + width * (index - (len(VARIANTS) - 1) / 2) for result in mine]
            axis.barh(heights, [value(result) for result in mine], width, label=variant, color=colours[variant])
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(cases)), cases)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=len(VARIANTS), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
