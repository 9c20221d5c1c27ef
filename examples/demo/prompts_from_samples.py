"""Make prompts for a pretrained model that comes with none: beginnings of texts that it wrote itself.

    python examples/demo/prompts_from_samples.py --samples runs/x/free.jsonl --tokenizer MODEL --out runs/x/prompts

takes samples that were generated from the empty prompt (the beginning-of-sequence token alone), and writes
prompts.jsonl and prompts_eval.jsonl with {"prompt_tokens": what the sample began from and its first --tokens tokens,
"prompt": their text}.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from records import Record, read_jsonl, write_jsonl
from transformers import AutoTokenizer


def beginnings(samples: list[Record], num_tokens: int, special: set[int]) -> list[list[int]]:
    """Distinct beginnings, in order. Texts that end within them, or have a special token there, are left out."""
    found: dict[tuple[int, ...], None] = {}
    for sample in samples:
        start = sample["response_tokens"][:num_tokens]
        # The text must go on after the prompt, or there would be nothing left to continue.
        if len(sample["response_tokens"]) > num_tokens and not special.intersection(start):
            found[tuple([*sample["prompt_tokens"], *start])] = None
    return [list(tokens) for tokens in found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--samples", type=Path, required=True, help="JSONL of samples from the empty prompt")
    parser.add_argument("--tokenizer", required=True, help="the model's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for prompts.jsonl and prompts_eval.jsonl")
    parser.add_argument("--tokens", type=int, default=24, help="sampled tokens of a prompt (default: %(default)s)")
    parser.add_argument(
        "--eval-prompts", type=int, default=512, help="prompts of the evaluation (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    samples = read_jsonl(args.samples, ("prompt_tokens", "response_tokens"))
    prompts = beginnings(samples, args.tokens, set(tokenizer.all_special_ids))
    if len(prompts) <= args.eval_prompts:
        raise SystemExit(
            f"{args.samples}: {len(samples)} samples give {len(prompts)} different prompts of {args.tokens} tokens; "
            f"--eval-prompts {args.eval_prompts} leaves none to train on; sample more, or use fewer tokens"
        )
    random.Random(args.seed).shuffle(prompts)
    records = [
        {"prompt_tokens": tokens, "prompt": tokenizer.decode(tokens, skip_special_tokens=True)} for tokens in prompts
    ]
    write_jsonl(args.out / "prompts.jsonl", records[args.eval_prompts :])
    write_jsonl(args.out / "prompts_eval.jsonl", records[: args.eval_prompts])
    print(f"{len(records) - args.eval_prompts} + {args.eval_prompts} prompts of {args.tokens} sampled tokens")


if __name__ == "__main__":
    main()
