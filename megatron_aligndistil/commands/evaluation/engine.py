"""What an evaluation asks of our own engine, on all processes: answers sampled in process, and measurements."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_aligndistil.commands import evaluate
from megatron_aligndistil.commands.evaluate import EvaluateConfig
from megatron_aligndistil.commands.evaluation.config import SuiteConfig
from megatron_aligndistil.commands.evaluation.stores import (
    MEASURED,
    answer_store,
    folder_of,
    missing_answers,
    to_measure,
)
from megatron_aligndistil.config import build
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.suites import results
from megatron_aligndistil.suites.asks import Ask, Reply, plain_text
from megatron_aligndistil.suites.base import Suite
from megatron_aligndistil.suites.statistics import Figure, Z
from megatron_aligndistil.suites.store import Store


def has_work(config: SuiteConfig, suites: Mapping[str, Suite]) -> bool:
    """Whether there is anything that the engine has to do, by what is stored."""
    out = folder_of(config)
    for name, suite in suites.items():
        store = answer_store(config, out / name)
        if not config.endpoint and missing_answers(suite, store):
            return True
        if to_measure(config, suite, out / name) is not None:
            return True
    return False


def work(config: SuiteConfig, suites: Mapping[str, Suite]) -> None:
    """On every process: sample the answers that are missing, then measure what is to be measured."""
    from megatron_aligndistil.engine.parallel import process_group

    out = folder_of(config)
    with process_group():
        if not config.endpoint:
            _answer(config, suites, out)
        for name, suite in suites.items():
            _measure(config, suite, out / name)


def _answer(config: SuiteConfig, suites: Mapping[str, Suite], out: Path) -> None:
    """Load the model once, and answer turn after turn."""
    import torch.distributed as dist

    from megatron_aligndistil.data.tokenizer import load_tokenizer
    from megatron_aligndistil.engine import checkpoint
    from megatron_aligndistil.engine.answering import Answerer
    from megatron_aligndistil.engine.frozen import load_frozen
    from megatron_aligndistil.engine.parallel import on_first_rank, parallel_session

    assert config.model is not None, "checked with the settings"
    if not any(on_first_rank(_missing, config, suite, out / name) for name, suite in suites.items()):
        return
    arch = checkpoint.read_architecture(config.model)
    with parallel_session(config.parallel) as parallel:
        if dist.get_rank() == 0:
            results.write_model(out, config.title, config.identity)
        model = load_frozen(config.model, arch, parallel, config.precision)
        tokenizer = load_tokenizer(checkpoint.description_folder(config.model))
        answerer = Answerer(model, tokenizer, parallel, config.batch_size)
        for name, suite in suites.items():
            while asks := on_first_rank(_missing, config, suite, out / name):
                store = answer_store(config, out / name, f"rank{parallel.dp_rank}")
                _answer_share(f"answers {name}", asks, store, answerer, parallel)
                store.close()
                dist.barrier()  # the first rank reads next what every rank has written


def _missing(config: SuiteConfig, suite: Suite, folder: Path) -> list[Ask]:
    return missing_answers(suite, answer_store(config, folder))


def _answer_share(title: str, asks: Sequence[Ask], store: Store, answerer: Any, parallel: Any) -> None:
    """Answer this data parallel rank's share of `asks`; one rank of the replica stores each answer as it comes."""
    from megatron_aligndistil.engine.answering import Question
    from megatron_aligndistil.engine.reporter import track

    mine = list(asks)[parallel.dp_rank :: parallel.dp]
    questions = [
        Question(
            list(ask.messages),
            plain_text(ask.messages),
            ask.max_tokens,
            ask.temperature,
            ask.top_p,
            ask.seed,
            _stream(ask.id),
        )
        for ask in mine
    ]
    done = itertools.count(1)
    with track(title, len(mine), parallel.is_reporter) as advance:

        def keep(place: int, answer: Any) -> None:
            advance(next(done))
            if parallel.is_last_stage and parallel.tp_rank == 0:
                tokens = answer.completion.tokens
                counts = (len(answer.prompt), len(tokens))
                whole = (answer.prompt, tokens)
                reply = Reply(answer.text, answer.completion.finish, *counts, None, whole, answer.prompt_cut)
                store.add(mine[place], reply)

        answerer.answer(questions, keep)


def _stream(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


def _measure(config: SuiteConfig, suite: Suite, folder: Path) -> None:
    """Measure, and write the figures from the rank that has them."""
    import torch.distributed as dist

    from megatron_aligndistil.engine.parallel import on_first_rank

    found = on_first_rank(to_measure, config, suite, folder)
    if found is None:
        return
    measurement, mark = found
    if measurement.data is None and not measurement.responses:
        raise ConfigError(f"{suite.name} has no answers to measure; every request for one failed")
    data = measurement.data or on_first_rank(_write_responses, folder, measurement.responses)
    models = {name: path for name, path in config.models.model_dump().items() if path and name in measurement.models}
    if measurement.kind == "kl":
        models["policy"] = config.policy
    settings = {
        "measure": measurement.kind,
        "data": data,
        "models": models,
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
        "micro_size": config.micro_size,
        "parallel": config.parallel,
        "precision": config.precision,
    }
    measuring = build(EvaluateConfig, settings)
    evaluate.check(measuring)
    measured = evaluate.measure(measuring)
    if measured is not None:
        report, estimates = measured
        print(f"{suite.name}: {measurement.kind} on {data}: {report}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        figures = {name: asdict(_figure(each)) for name, each in estimates.items()}
        results.write_json(folder / MEASURED, {"mark": mark, "figures": figures})
    dist.barrier()


def _write_responses(folder: Path, responses: Sequence[dict[str, Any]]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "responses.jsonl"
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in responses), encoding="utf-8")
    return str(path)


def _figure(estimate: Any) -> Figure:
    half = Z * estimate.stderr
    return Figure(estimate.mean, estimate.mean - half, estimate.mean + half, estimate.stderr, estimate.count)
