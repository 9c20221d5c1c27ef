"""What an evaluation has stored: answers by the model, and what the engine measured."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from megatron_aligndistil.commands.evaluation.config import SuiteConfig
from megatron_aligndistil.suites import results
from megatron_aligndistil.suites.asks import Ask, Reply
from megatron_aligndistil.suites.base import Measurement, Suite
from megatron_aligndistil.suites.statistics import Figure
from megatron_aligndistil.suites.store import Store

MEASURED = "measured.json"


def folder_of(config: SuiteConfig) -> Path:
    """The folder of the model; each suite has its own in it."""
    return results.folder_of(Path(config.out), config.title)


def answers_of(suite: Suite, store: Store) -> dict[str, Reply]:
    """The stored answers, turn after turn."""
    answers: dict[str, Reply] = {}
    while True:
        known = store.known(ask for ask in suite.asks(answers) if ask.id not in answers)
        if not known:
            return answers
        answers |= known


def missing_answers(suite: Suite, store: Store) -> list[Ask]:
    """What can be asked now and is not in the store."""
    return [ask for ask in suite.asks(answers_of(suite, store)) if store.get(ask) is None]


def answer_store(config: SuiteConfig, folder: Path, part: str = "") -> Store:
    """The answers of the model in a suite's folder; `part` names the file of one of several writers."""
    model = config.identity if config.endpoint else stamped(config.model or "")
    return Store(folder / "answers.jsonl", model, part)


def stamped(path: str) -> str:
    """A checkpoint with a mark that changes when its files do: answers of other weights are not taken for its own."""
    folder = Path(path).expanduser()
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    latest = max((file.stat().st_mtime_ns for file in files), default=0)
    return f"{path} ({len(files)} files, {sum(file.stat().st_size for file in files)} bytes, {latest})"


def to_measure(config: SuiteConfig, suite: Suite, folder: Path) -> tuple[Measurement, str] | None:
    """What the engine is to measure, and a mark of all that it depends on; None where nothing, or that was measured."""
    measurement = suite.measurement(answers_of(suite, answer_store(config, folder)))
    if measurement is None:
        return None
    paths = dict.fromkeys(path for path in (config.policy, *config.models.model_dump().values()) if path)
    stamps = [stamped(path) for path in paths]
    source = Path(measurement.data) if measurement.data else None
    stamps.append(str(source.stat().st_mtime_ns) if source and source.exists() else "")
    limits = [config.max_length, config.max_prompt_length]
    mark = hashlib.sha256(json.dumps([asdict(measurement), stamps, limits]).encode()).hexdigest()[:20]
    path = folder / MEASURED
    if path.exists() and json.loads(path.read_text())["mark"] == mark:
        return None
    return measurement, mark


def read_measured(folder: Path) -> dict[str, Figure]:
    """What was measured for a suite; empty where nothing was."""
    path = folder / MEASURED
    if not path.exists():
        return {}
    return {name: results.read_figure(values) for name, values in json.loads(path.read_text())["figures"].items()}
