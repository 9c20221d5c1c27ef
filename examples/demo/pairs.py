"""Turn two samples a prompt into preference pairs, labelled by the known reward with noise.

    python examples/demo/pairs.py --samples runs/demo/samples.jsonl --out runs/demo/pairs --held-out 512

People disagree with any fixed measure of quality, and most where the difference is small. So the label is drawn:
response a is preferred with probability sigma((R_a - R_b) / tau), the Bradley-Terry model with noise temperature tau.
Unless it is given, tau is solved for so that the expected share of labels that agree with R is --agreement.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import Any

from records import Record, read_jsonl, write_json, write_jsonl
from reward import reward

SAMPLE_KEYS = ("index", "sample", "prompt", "response", "prompt_tokens", "response_tokens")


def preference(difference: float, temperature: float) -> float:
    """sigma(difference / temperature), without overflow."""
    z = difference / temperature
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def expected_agreement(differences: list[float], temperature: float) -> float:
    """Expected share of labels that prefer the response of higher reward, ties left out."""
    untied = [abs(difference) for difference in differences if difference != 0]
    return sum(preference(difference, temperature) for difference in untied) / len(untied)


def solve_temperature(differences: list[float], agreement: float) -> float:
    """The noise temperature of an expected agreement in (0.5, 1), by bisection; agreement falls as it rises."""
    if not 0.5 < agreement < 1:
        raise SystemExit(f"--agreement {agreement} must lie between 0.5 (labels are noise) and 1 (no noise)")
    if not any(differences):
        raise SystemExit(
            "every pair has two responses of equal reward, so labels cannot agree with it; sample other prompts"
        )
    low, high = 1e-4, 1e4
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if expected_agreement(differences, middle) > agreement else (low, middle)
    return math.sqrt(low * high)


def pair_up(samples: list[Record], source: str) -> list[tuple[Record, Record]]:
    """The two samples of every prompt, by prompt number; identical responses are dropped."""
    by_prompt: dict[Any, list[Record]] = {}
    for sample in samples:
        by_prompt.setdefault(sample["index"], []).append(sample)
    pairs = []
    for index, group in by_prompt.items():
        if len(group) != 2:
            raise SystemExit(f"{source}: prompt {index} has {len(group)} samples; pairs need 2 of each prompt")
        a, b = sorted(group, key=lambda sample: sample["sample"])
        if a["response_tokens"] != b["response_tokens"]:
            pairs.append((a, b))
    return pairs


def label(pairs: list[tuple[Record, Record]], temperature: float, rng: random.Random) -> list[Record]:
    """Draw the label of every pair. A tie is a coin flip, as sigma(0) = 1/2."""
    records = []
    for a, b in pairs:
        reward_a, reward_b = reward(a["response"]), reward(b["response"])
        chosen, rejected = (a, b) if rng.random() < preference(reward_a - reward_b, temperature) else (b, a)
        records.append(
            {
                "prompt": a["prompt"],
                "chosen": chosen["response"],
                "rejected": rejected["response"],
                "prompt_tokens": a["prompt_tokens"],
                "chosen_tokens": chosen["response_tokens"],
                "rejected_tokens": rejected["response_tokens"],
                "reward_chosen": reward(chosen["response"]),
                "reward_rejected": reward(rejected["response"]),
            }
        )
    return records


def figures(records: list[Record]) -> dict[str, float]:
    """What was drawn: the number of pairs and ties, agreement of labels with R (ties left out), mean rewards."""
    differences = [record["reward_chosen"] - record["reward_rejected"] for record in records]
    untied = [difference for difference in differences if difference != 0]
    return {
        "pairs": len(records),
        "ties": len(records) - len(untied),
        "agreement": sum(difference > 0 for difference in untied) / max(len(untied), 1),
        "mean_reward_chosen": sum(record["reward_chosen"] for record in records) / max(len(records), 1),
        "mean_reward_rejected": sum(record["reward_rejected"] for record in records) / max(len(records), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--samples", type=Path, required=True, help="JSONL with two samples of every prompt")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl, held_out.jsonl, pairs.json")
    parser.add_argument("--held-out", type=int, default=512, help="pairs kept from training (default: %(default)s)")
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument("--agreement", type=float, default=0.72, help="expected agreement with R (default: %(default)s)")
    noise.add_argument("--noise-temperature", type=float, help="tau itself, instead of solving for an agreement")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pairs = pair_up(read_jsonl(args.samples, SAMPLE_KEYS), str(args.samples))
    if len(pairs) <= args.held_out:
        raise SystemExit(f"{args.samples} gives {len(pairs)} pairs; --held-out {args.held_out} leaves none to train on")
    if args.noise_temperature is not None and args.noise_temperature <= 0:
        raise SystemExit(f"--noise-temperature {args.noise_temperature} must be above 0")
    differences = [reward(a["response"]) - reward(b["response"]) for a, b in pairs]
    temperature = args.noise_temperature or solve_temperature(differences, args.agreement)
    rng = random.Random(args.seed)
    rng.shuffle(pairs)
    records = label(pairs, temperature, rng)
    held_out, train = records[: args.held_out], records[args.held_out :]
    write_jsonl(args.out / "train.jsonl", train)
    write_jsonl(args.out / "held_out.jsonl", held_out)
    drawn = figures(records)
    summary = {"noise_temperature": temperature, "seed": args.seed, "all": drawn}
    write_json(args.out / "pairs.json", summary | {"train": figures(train), "held_out": figures(held_out)})
    print(
        f"{len(train)} + {len(held_out)} pairs, {drawn['ties']} of them ties; noise temperature {temperature:.3f}; "
        f"{drawn['agreement']:.1%} of labels agree with the reward; mean reward {drawn['mean_reward_chosen']:.3f} "
        f"chosen, {drawn['mean_reward_rejected']:.3f} rejected"
    )


if __name__ == "__main__":
    main()
