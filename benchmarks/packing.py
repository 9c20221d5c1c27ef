"""Packed against padded micro-batches: how much of a step is padding, how even ranks are, and how long a step takes.

    python -m benchmarks.packing --data ../shared/data --out docs/results/packing

Reads preference pairs and instructions from the folder of real data with a Qwen tokenizer. Writes packing.json and
report.md. Steps are timed on the CPU, in one thread, with a small model drawn from scratch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any, Literal

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import torch
from transformers import AutoConfig, AutoTokenizer

from megatron_aligndistil.config import DataConfig, TrainConfig, build
from megatron_aligndistil.data.dataset import TokenDataset, load_dataset
from megatron_aligndistil.data.loader import GlobalBatches
from megatron_aligndistil.data.tokenizer import load_tokenizer
from megatron_aligndistil.engine.trainer import train

SOURCES: dict[str, tuple[str, Literal["pairs", "responses"]]] = {
    "UltraFeedback, pairs": ("ultrafeedback/train.jsonl", "pairs"),
    "UltraFeedback, chosen responses": ("ultrafeedback/train.jsonl", "responses"),
    "LLaMA-Factory, pairs": ("llama_factory/dpo_en_demo.json", "pairs"),
    "LLaMA-Factory, Alpaca": ("llama_factory/alpaca_en_demo.json", "responses"),
}
WAYS: list[dict[str, int]] = [{"micro_size": 1}, {"micro_size": 4}, {"micro_size": 8}]
WAYS += [{"max_tokens": 4096}, {"max_tokens": 8192}, {"max_tokens": 16384}]
GLOBAL_SIZE, DP = 128, 8
PAD = -1
TIMED: list[dict[str, int]] = [{"micro_size": 1}, {"micro_size": 4}, {"max_tokens": 1024}, {"max_tokens": 4096}]
TIMED_SIZE, TIMED_STEPS, TIMED_LENGTH = 16, 3, 1024
MODEL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "max_position_embeddings": TIMED_LENGTH}


def main() -> None:
    """Measure, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the real data and the Qwen tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder for packing.json and report.md")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.data / "qwen_tokenizer")
    tokenizer.chat_template = (arguments.data / "chat_templates" / "qwen2_5.jinja").read_text()
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"
    report: dict[str, Any] = {"machine": machine, "layouts": [], "steps": []}
    for name, (file, form) in SOURCES.items():
        source = str(arguments.data / file)
        dataset, _ = load_dataset(DataConfig(train=source), source, tokenizer, form)
        report["layouts"] += [{"source": name, **way, **layout(dataset, way)} for way in WAYS]
        if name == "UltraFeedback, chosen responses":
            report["steps"] = [{**way, **timed(dataset, way, arguments.data)} for way in TIMED]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "packing.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "report.md").write_text(markdown(report))
    print(f"wrote {arguments.out}/report.md")


def layout(dataset: TokenDataset, way: dict[str, int]) -> dict[str, Any]:
    """Padding and balance of an epoch of global batches over DP ranks; balance is the worst step's."""
    size = min(GLOBAL_SIZE, len(dataset) // DP * DP)
    ranks = [
        GlobalBatches(dataset, global_size=size, pad_id=PAD, dp_rank=rank, dp_size=DP, **way) for rank in range(DP)
    ]
    places, balance, counts, lengths = 0, [], [], []
    for step in range(ranks[0].steps_per_epoch):
        batches = [rank.at(step) for rank in ranks]
        tokens = [sum(int((batch.tokens_BS != PAD).sum()) for batch in rank) for rank in batches]
        places += sum(batch.tokens_BS.numel() for rank in batches for batch in rank)
        balance.append(max(tokens) / statistics.fmean(tokens))
        counts.append(len(batches[0]))
        lengths.append(batches[0][0].tokens_BS.numel())
    real = sum(ranks[0].num_tokens(step) for step in range(ranks[0].steps_per_epoch))
    return {
        "padding": 1 - real / places,
        "balance": max(balance),
        "micro_batches": statistics.fmean(counts),
        "places": statistics.fmean(lengths),
    }


def timed(dataset: TokenDataset, way: dict[str, int], data: Path) -> dict[str, Any]:
    """Seconds of training steps on the lengths of `dataset`, its tokens folded into a vocabulary of 512."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        AutoConfig.from_pretrained(data / "stories260K" / "hf", **MODEL).save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(data / "stories260K" / "hf").save_pretrained(folder / "model")
        with (folder / "rows.jsonl").open("w") as file:
            for (row,) in dataset:
                tokens, start = (row.tokens % 512).tolist(), row.prompt_length
                file.write(json.dumps({"prompt_tokens": tokens[:start], "response_tokens": tokens[start:]}) + "\n")
        values = {
            "algorithm": {"name": "sft"},
            "models": {"policy": str(folder / "model"), "init": "scratch"},
            "data": {"train": str(folder / "rows.jsonl"), "max_length": TIMED_LENGTH},
            "batch": {"global_size": TIMED_SIZE, **way},
            "run": {"dir": str(folder / "run"), "steps": TIMED_STEPS + 1},
            "precision": {"dtype": "fp32"},
        }
        train(build(TrainConfig, values))
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    _, *steps = lines  # the first one warms up
    return {
        "seconds": min(line["seconds/total"] for line in steps),
        "padding": statistics.fmean(line["padding"] for line in steps),
        "losses": [line["train/policy/loss"] for line in lines],
    }


def describe(measured: dict[str, Any]) -> str:
    """A way of making micro-batches, for people."""
    if "max_tokens" in measured:
        return f"packed, {measured['max_tokens']:,} tokens"
    return f"padded, {measured['micro_size']} a micro-batch"


def markdown(report: dict[str, Any]) -> str:
    """Two tables, and how to read them."""
    first = report["steps"][0]
    lines = [
        "# Packed and padded micro-batches",
        "",
        f"Qwen tokens of real data, rows of at most 2,048 tokens, global batches of {GLOBAL_SIZE} examples over {DP}",
        "data parallel ranks, one epoch. **Padding**: places that hold no token of the data, of all places that a",
        "step's micro-batches have. **Balance**: tokens of the fullest rank over the mean rank, in the worst step. All",
        "micro-batches of a step have one length, so without packing the share of padding is the same whatever",
        "`batch.micro_size` is.",
        "",
        "| data | micro-batches | padding | balance | micro-batches a rank | places in each |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {each['source']} | {describe(each)} | {100 * each['padding']:.1f} % | {each['balance']:.3f} | "
        f"{each['micro_batches']:.1f} | {each['places']:,.0f} |"
        for each in report["layouts"]
    ]
    lines += [
        "",
        f"The fastest of {TIMED_STEPS} SFT steps of {TIMED_SIZE} chosen UltraFeedback responses, cut at",
        f"{TIMED_LENGTH:,} tokens, on {report['machine']}, one thread,",
        f"fp32, a model of {MODEL['num_hidden_layers']} layers and hidden size {MODEL['hidden_size']}.",
        "",
        "| micro-batches | padding | seconds | of the first | loss of the last step |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {describe(each)} | {100 * each['padding']:.1f} % | {each['seconds']:.2f} | "
        f"{each['seconds'] / first['seconds']:.2f} | {each['losses'][-1]:.6f} |"
        for each in report["steps"]
    ]
    return "\n".join([*lines, "", "Not measured: anything on a GPU.", ""])


if __name__ == "__main__":
    main()
