"""Split preference pairs of your own into pairs to train on and pairs held out.

    python examples/demo/split.py --data mine.jsonl --out runs/mine/pairs --held-out 100

reads JSON lines or a JSON list, and writes train.jsonl and held_out.jsonl (the records unchanged) and
prompts_eval.jsonl ({"prompt": ...}, the prompts of the held-out pairs as they are: a string or a list of messages).
Pairs of the same prompt stay on the same side, so no held-out prompt is trained on. A record without a prompt whose two
answers are lists of messages, or transcripts ("Human: ... Assistant: ..."), has as its prompt what the answers share.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from itertools import takewhile
from pathlib import Path
from typing import Any

from records import Record, read_json, read_jsonl, write_jsonl

TURN = "\n\nAssistant:"


def prompt_of(record: Record, where: str) -> Any:
    """The prompt of a pair, kept as it is. Ends the script where there is none."""
    for key in ("prompt", "conversations", "messages"):
        if key in record:
            return record[key]
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        same = takewhile(lambda turns: turns[0] == turns[1], zip(chosen[:-1], rejected[:-1], strict=False))
        messages = [turn for turn, _ in same]
        if messages:
            return messages
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = os.path.commonprefix([chosen, rejected])
        if TURN in shared:
            return shared[: shared.rindex(TURN) + len(TURN)]
    raise SystemExit(
        f"{where}: no prompt; its keys are {', '.join(record)}. Give each pair prompt, chosen and rejected"
    )


def split(records: list[Record], prompts: list[Any], num_held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the records to train on and of those held out, each in the order of the file.

    Whole prompts are held out, drawn at random, until `num_held_out` records are reached; the last may bring more.
    """
    by_prompt: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_prompt.setdefault(json.dumps(prompt, sort_keys=True), []).append(number)
    groups = list(by_prompt.values())
    random.Random(seed).shuffle(groups)
    held_out: set[int] = set()
    for group in groups:
        if len(held_out) >= num_held_out:
            break
        held_out.update(group)
    train = [number for number in range(len(records)) if number not in held_out]
    return train, sorted(held_out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="preference pairs: JSON lines (.jsonl) or a list (.json)"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for train.jsonl, held_out.jsonl, prompts_eval.jsonl"
    )
    parser.add_argument("--held-out", type=int, default=100, help="pairs kept from training (default: %(default)s)")
    parser.add_argument("--eval-prompts", type=int, help="at most so many evaluation prompts (default: all held out)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.data.suffix == ".json":
        records = read_json(args.data)
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise SystemExit(f"{args.data} must hold a list of objects, one a preference pair")
    else:
        records = read_jsonl(args.data)
    for number, record in enumerate(records, start=1):
        missing = [key for key in ("chosen", "rejected") if key not in record]
        if missing:
            raise SystemExit(f"{args.data}, record {number}: a preference pair needs {' and '.join(missing)}")
    prompts = [prompt_of(record, f"{args.data}, record {number}") for number, record in enumerate(records, start=1)]
    train, held_out = split(records, prompts, args.held_out, args.seed)
    if not train or not held_out:
        raise SystemExit(
            f"{args.data}: --held-out {args.held_out} leaves {len(train)} pairs to train on and {len(held_out)} "
            f"held out; it must be above 0 and below the {len(records)} pairs there are"
        )
    eval_prompts = {json.dumps(prompts[number], sort_keys=True): prompts[number] for number in held_out}
    write_jsonl(args.out / "train.jsonl", (records[number] for number in train))
    write_jsonl(args.out / "held_out.jsonl", (records[number] for number in held_out))
    chosen_prompts = list(eval_prompts.values())[: args.eval_prompts]
    write_jsonl(args.out / "prompts_eval.jsonl", ({"prompt": prompt} for prompt in chosen_prompts))
    print(f"{len(train)} pairs to train on, {len(held_out)} held out, {len(chosen_prompts)} evaluation prompts")


if __name__ == "__main__":
    main()
