"""What an inspection found, as plain numbers and texts for a page to show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from megatron_aligndistil.algorithms.aligndistil import AlignDistil
from megatron_aligndistil.data.dataset import TokenDataset
from megatron_aligndistil.data.pieces import Pieces
from megatron_aligndistil.data.tokenizer import Tokenizer
from megatron_aligndistil.data.tokens import Row
from megatron_aligndistil.engine.inspection import Inspected
from megatron_aligndistil.ops.positions import Positions

_DIGITS = 6  # significant ones of every number
_COLOURED = 98  # percentile of the absolute values that gets the full colour: few tokens may be far beyond the rest
_LABELS = {"policy": "policy", "dpo": "DPO", "reverse": "reverse DPO", "reference": "reference", "teacher": "teacher"}


def page_data(
    source: str,
    paths: Mapping[str, str],
    algorithm: AlignDistil,
    tokenizer: Tokenizer,
    dataset: TokenDataset,
    found: Sequence[Inspected],
) -> dict[str, Any]:
    """Everything that the page shows, ready for JSON: numbers are rounded, and what is not finite is None.

    Args:
        source: what was looked at, for a title.
        paths: model -> its checkpoint, in the order of `Positions`.
        found: what was found for each example of `dataset`.

    `records` holds the prompts' and responses' token ids; of each response the `values` of every measure, its `totals`
    (sum and mean of each), the log-probability of each token under every one of `models` (`logprobs`), and for each
    model and token the likeliest tokens as [id, probability, id, probability, ...] (`top`). `tokens` has the text of
    every id, and whether it is a control token.
    """
    models = [*paths, "teacher"]
    records = [_record(example, each, models) for example, each in zip(dataset, found, strict=True)]
    pieces = Pieces(tokenizer)
    return {
        "source": source,
        "beta0": algorithm.config.beta0,
        "models": [{"key": name, "name": _LABELS[name], "path": paths.get(name)} for name in models],
        "teacher": _teacher(algorithm),
        "measures": _measures(algorithm, "policy" in paths, records),
        "tokens": {token: [pieces.text(token), int(pieces.is_special(token))] for token in sorted(_ids(records))},
        "records": records,
    }


def _record(example: Sequence[Row], found: Inspected, models: Sequence[str]) -> dict[str, Any]:
    names = ["chosen", "rejected"] if len(example) == 2 else ["response"]
    first = example[0]
    return {
        # A first token without a prompt is predicted by no state, and stands with the prompt.
        "prompt": first.tokens[: len(first.tokens) - first.num_targets].tolist(),
        "responses": [
            _response(name, row, each, models) for name, row, each in zip(names, example, found, strict=True)
        ],
    }


def _response(name: str, row: Row, found: Positions, models: Sequence[str]) -> dict[str, Any]:
    values = {"reward": found.reward_T, "tvd": found.tvd_T, "alpha": found.alpha_T, "kl": found.kl_T}
    given = {key: each for key, each in values.items() if each is not None}
    logprobs = dict(zip(models, found.logprobs_MT, strict=True))
    tops = zip(found.top_tokens_MTk.tolist(), found.top_logprobs_MTk.exp().tolist(), strict=True)
    return {
        "name": name,
        "tokens": row.tokens[len(row.tokens) - row.num_targets :].tolist(),
        "values": {key: _numbers(each.tolist()) for key, each in given.items()},
        "logprobs": [_numbers(each.tolist()) for each in logprobs.values()],
        "totals": {key: _total(each) for key, each in (given | logprobs).items()},
        "top": [
            [
                [part for pair in zip(ids, _numbers(shares), strict=True) for part in pair]
                for ids, shares in zip(*model, strict=True)
            ]
            for model in tops
        ],
    }


def _total(values_T: Tensor) -> list[float | None]:
    """Sum and mean."""
    total = float(values_T.double().sum())
    return _numbers([total, total / len(values_T)])


def _numbers(values: Iterable[float]) -> list[float | None]:
    """Rounded to few digits, for the page's size; JSON knows no infinity."""
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values]


def _ids(records: Sequence[Mapping[str, Any]]) -> set[int]:
    """Every token that the page shows."""
    found = {token for record in records for token in record["prompt"]}
    for record in records:
        for response in record["responses"]:
            found.update(response["tokens"])
            found.update(token for model in response["top"] for each in model for token in each[::2])
    return found


def _measures(algorithm: AlignDistil, with_policy: bool, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What tokens can be coloured by: name, meaning, and the value of the full colour."""
    other = "rev" if algorithm.negative == "reverse" else "ref"
    reward = ("contrastive reward", "12") if other == "rev" else ("DPO reward", "6")
    measures = [
        ("reward", reward[0], f"log π_dpo(y_t) − log π_{other}(y_t), in nats; β0 times it is eq. {reward[1]}"),
        ("tvd", "TVD", f"total variation distance of π_dpo and π_{other}, from 0 to 1 (eq. 16)"),
        ("alpha", "α_t", f"how far the teacher is extrapolated: {_coefficient(algorithm)}"),
    ]
    if with_policy:
        measures.append(("kl", "KL from teacher", "KL(π_θ ‖ π*) of the policy from the teacher, in nats"))
    found = []
    for key, name, meaning in measures:
        values = [value for record in records for r in record["responses"] for value in r["values"][key] if value]
        scale = float(np.percentile(np.abs(values), _COLOURED)) if values else 0.0
        signed = key == "reward"
        found.append({"key": key, "name": name, "meaning": meaning, "signed": signed, "scale": float(f"{scale:.3g}")})
    return found


def _teacher(algorithm: AlignDistil) -> str:
    """How the teacher is composed, in a line."""
    form, config = algorithm.form, algorithm.config
    other = "rev" if algorithm.negative == "reverse" else "ref"
    base = "dpo" if form.base == "dpo" else other
    temperature = "" if config.temperature == 1 else f"; all distributions at temperature {config.temperature:g}"
    return f"{config.teacher}: z* = z_{base} + α_t (z_dpo − z_{other}), {_coefficient(algorithm)}{temperature}"


def _coefficient(algorithm: AlignDistil) -> str:
    form, config = algorithm.form, algorithm.config
    if not form.rate:
        return f"α_t = β0/β = {form.offset:g}" if "adaptive" not in config.teacher else f"α_t = ε = {form.offset:g}"
    compat = ", TVD without its ½ as in the authors' code" if config.official_compat else ""
    return f"α_t = {config.r:g} TVD_t + {config.eps:g}{compat}"
