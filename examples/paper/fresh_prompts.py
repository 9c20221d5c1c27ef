"""Write prompts that the demonstration has not used: to choose settings by, and to sample test pairs from.

    python examples/paper/fresh_prompts.py --known runs/demo/data --out runs/paper/data

writes prompts_validation.jsonl and prompts_pairs.jsonl ({"prompt": the opening of a story}); none is the beginning of a
story in the corpus, a prompt of the demonstration, or there twice.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

from records import read_jsonl, write_jsonl  # noqa: E402 (the demo's modules must be found first)
from stories import write_story  # noqa: E402


def fresh_prompts(count: int, texts: list[str], seed: int) -> list[str]:
    """Prompts that differ from each other and that none of `texts`, stories or prompts, begins with."""
    # A prompt ends with a full stop, and so do the parts of a story that it could be.
    known = {text[: end + 1] for text in texts for end, mark in enumerate(text) if mark == "."}
    rng, fresh = random.Random(seed), dict[str, None]()
    while len(fresh) < count:
        prompt = write_story(rng).prompt
        if prompt not in known:
            fresh.setdefault(prompt)
    return list(fresh)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--known", type=Path, required=True, help="folder that corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--validation", type=int, default=512, help="prompts to choose settings by")
    parser.add_argument("--pairs", type=int, default=2_048, help="prompts to sample test pairs from")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    texts = [record["text"] for record in read_jsonl(args.known / "corpus.jsonl", ["text"])]
    for name in ("prompts.jsonl", "prompts_eval.jsonl"):
        texts += [record["prompt"] for record in read_jsonl(args.known / name, ["prompt"])]
    prompts = fresh_prompts(args.validation + args.pairs, texts, args.seed)
    write_jsonl(args.out / "prompts_validation.jsonl", ({"prompt": prompt} for prompt in prompts[: args.validation]))
    write_jsonl(args.out / "prompts_pairs.jsonl", ({"prompt": prompt} for prompt in prompts[args.validation :]))
    print(f"{args.validation} prompts to choose settings by, {args.pairs} to sample test pairs from")


if __name__ == "__main__":
    main()
