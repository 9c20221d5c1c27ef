"""Sampled responses in a file for people."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from megatron_aligndistil.data.tokenizer import Tokenizer, to_text
from megatron_aligndistil.engine.completions import Completion
from megatron_aligndistil.engine.rollout import Answer

_MOST = 64


def write_samples(path: Path, answers: Iterable[Answer], tokenizer: Tokenizer) -> None:
    """Write the first 64 prompts with their sampled responses as plain text, in the order of the prompts.

    Where they cannot be written (a full disk), a line on stderr says so: no run should end for it.
    """
    parts = [_part(number, *answer, tokenizer) for number, answer in enumerate(islice(answers, _MOST), start=1)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(parts), encoding="utf-8")
    except OSError as error:
        print(f"{path} could not be written: {error.strerror}", file=sys.stderr, flush=True)


def _part(number: int, prompt: Sequence[int], completion: Completion, tokenizer: Tokenizer) -> str:
    ending = "ended by itself" if completion.finish == "stop" else "cut at the limit"
    head = f"=== {number} · {len(completion.tokens)} tokens, {ending}, log π {math.fsum(completion.logprobs):.1f} nats"
    if completion.rating is not None:
        head += f", reward {completion.rating:.3g}"
    return f"{head}\n--- prompt\n{to_text(tokenizer, prompt)}\n--- response\n{to_text(tokenizer, completion.tokens)}\n"
