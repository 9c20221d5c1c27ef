"""Sharing out the examples of a global batch over ranks and micro-batches, by their tokens."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def share_out(lengths: Sequence[int], *, max_tokens: int, dp_size: int = 1, multiple: int = 1) -> list[list[list[int]]]:
    """Which examples each micro-batch of each data parallel rank holds: [rank][micro-batch] -> indices, ascending.

    Every rank gets equally many micro-batches, as few as hold all examples within `max_tokens` each; where there are
    fewer examples than micro-batches some are empty. Since all micro-batches of a step are padded to one length, that
    of the largest, they are not filled one after another but all together: each example, the longest first, goes into
    the micro-batch with the fewest tokens so far (LPT, Graham 1969). So no micro-batch has more tokens than another by
    more than one example, nor has any rank. A function of the arguments alone.

    Args:
        lengths: tokens of each example, all its rows together; none above `max_tokens`.
        max_tokens: of a micro-batch, its padding aside.
        multiple: what the number of micro-batches of a rank is a multiple of.
    """
    assert max(lengths, default=0) <= max_tokens, "the caller has seen to it"
    step = dp_size * multiple
    count = max(1, -(-sum(lengths) // (max_tokens * step))) * step
    while True:
        # With one micro-batch for each example they fit, so this ends.
        shares = _balance(lengths, count)
        sums = [sum(lengths[index] for index in share) for share in shares]
        if max(sums) <= max_tokens:
            break
        count += step
    # Dealt by falling size, there and back, so that no rank gets the larger one each time.
    order = sorted(range(count), key=lambda number: -sums[number])
    rounds = [order[first : first + dp_size] for first in range(0, count, dp_size)]
    dealt = [one[::-1] if number % 2 else one for number, one in enumerate(rounds)]
    return [[shares[one[rank]] for one in dealt] for rank in range(dp_size)]


def _balance(lengths: Sequence[int], count: int) -> list[list[int]]:
    shares: list[list[int]] = [[] for _ in range(count)]
    lightest = [(0, number) for number in range(count)]  # a heap
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        tokens, number = lightest[0]
        shares[number].append(index)
        heapq.heapreplace(lightest, (tokens + lengths[index], number))
    return [sorted(share) for share in shares]
