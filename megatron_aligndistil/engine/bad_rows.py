"""The rows of a step whose loss or gradient was not finite, in a file for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_aligndistil.data.batch import MicroBatch
from megatron_aligndistil.data.tokenizer import Tokenizer, to_text
from megatron_aligndistil.engine.parallel import Parallel


def write(
    path: Path,
    batches: Sequence[MicroBatch],
    losses: Mapping[str, Sequence[float]],
    tokenizer: Tokenizer,
    parallel: Parallel,
    shifted_mask: bool = False,
) -> None:
    """Write the rows of every micro-batch whose loss was not finite, one JSON object a line.

    Each has `dp_rank`, `micro_batch` (counted from 0 on that rank), `row` (within the micro-batch), `tokens`, `prompt`
    and `response` as text with special tokens, and `loss`: for each model whose update was skipped, the loss sum of the
    row's micro-batch, as text where it is not finite. A loss is known for a micro-batch as a whole; with
    `batch.micro_size` 1 that is one example. Where every loss was finite, and only a gradient was not, all rows of the
    step are written: which of them it came from cannot be told.

    Arguments:
        batches: this data parallel rank's micro-batches.
        losses: for each model whose update was skipped, the loss sum of each of them; the last stage's alone are read.
        shifted_mask: whether response positions are marked one state late, see `Algorithm.shifted_mask`.

    Called on all ranks; those of the last pipeline stage take part. Collectives: one gather of objects over the data
    parallel group.
    """
    if not parallel.is_last_stage:
        return
    mine = [
        {"dp_rank": parallel.dp_rank, "micro_batch": index, "row": row, "loss": sums, "tokens": tokens, "split": split}
        for index, batch in enumerate(batches)
        for sums in [{name: sums[index] for name, sums in losses.items()}]
        for row, tokens, split in _rows(batch, 0 if shifted_mask else 1)
    ]
    gathered: list[Any] | None = [None] * parallel.dp if parallel.dp_rank == 0 else None
    dist.gather_object(mine, gathered, dist.get_global_rank(parallel.dp_group, 0), group=parallel.dp_group)
    if not parallel.is_reporter or gathered is None:
        return
    rows = [row for part in gathered for row in part]
    bad = [row for row in rows if not all(map(math.isfinite, row["loss"].values()))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in bad or rows:
            file.write(json.dumps(_described(row, tokenizer), ensure_ascii=False) + "\n")


def _rows(batch: MicroBatch, ahead: int) -> list[tuple[int, list[int], int]]:
    """Number, tokens and prompt length of each row that counts; a state predicts the token `ahead` of its place."""
    places, columns = batch.tokens_BS.flatten().tolist(), batch.columns_BS.flatten().tolist()
    rows: dict[int, list[int]] = {}
    for row, position in zip(batch.responses.rows_T.tolist(), batch.positions_T.tolist(), strict=True):
        rows.setdefault(row, []).append(position)
    found = []
    for row, positions in rows.items():
        start = positions[0] - columns[positions[0]]
        tokens = places[start : positions[-1] + ahead + 1]
        found.append((row, tokens, positions[0] + ahead - start))
    return found


def _described(row: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    tokens, split = row["tokens"], row.pop("split")
    texts = {
        "prompt": to_text(tokenizer, tokens[:split], skip_special_tokens=False),
        "response": to_text(tokenizer, tokens[split:], skip_special_tokens=False),
    }
    # JSON knows no NaN and no infinity.
    loss = {name: number if math.isfinite(number) else str(number) for name, number in row["loss"].items()}
    return {**row, "loss": loss, **texts}
