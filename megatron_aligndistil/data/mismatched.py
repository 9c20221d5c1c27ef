"""Prompts with the responses of other prompts, on which KTO estimates its KL."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_aligndistil.data.tokens import Row, make_row, truncate


def mismatch(rows: Sequence[Row], max_length: int) -> list[Row]:
    """The prompt of each row with the response of the row k places on, counted round over the rows with a response.

    k is 1, as in KTO (Ethayarajh et al. 2024), unless that gives some row a response to its own prompt, as for pairs in
    their order: then it is the smallest k that does so for the fewest rows. Where some are left (a prompt with most of
    the rows, for one) these become rows without tokens, which count for nothing.

    Args:
        rows: of one global batch, in its order.
        max_length: where a row that has become longer than this loses the end of its response; at least the longest of
            `rows`, so that every prompt leaves room for a response.
    """
    full = [index for index, row in enumerate(rows) if row.num_targets]
    numbers: dict[bytes, int] = {}
    prompts = [rows[index].tokens[: rows[index].prompt_length] for index in full]
    prompt_ids = np.array([numbers.setdefault(prompt.tobytes(), len(numbers)) for prompt in prompts])
    shift = min(range(1, len(full)), key=lambda k: np.count_nonzero(prompt_ids == np.roll(prompt_ids, -k)), default=0)
    mismatched = [make_row([], [])] * len(rows)
    for place, index in enumerate(full):
        other = (place + shift) % len(full)
        if prompt_ids[place] != prompt_ids[other]:
            answer = rows[full[other]]
            tokens = np.concatenate([prompts[place], answer.tokens[answer.prompt_length :]])
            row = Row(tokens, len(prompts[place]))
            mismatched[index] = truncate(row, max_prompt_length=row.prompt_length, max_length=max_length)
    return mismatched
