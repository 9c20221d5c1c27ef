"""Results on disk: one folder a model, one a suite within it, and what a report reads back."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.suites.base import Example, Result
from megatron_aligndistil.suites.statistics import Figure

_MODEL, _RESULT = "model.json", "result.json"


@dataclass(frozen=True)
class Evaluated:
    """A model and its results by suite."""

    name: str
    results: dict[str, Result]


def folder_of(out: Path, name: str) -> Path:
    """The folder of a model, by its name in the report."""
    return out / re.sub(r"[^\w.+-]+", "_", name).strip("_")


def require_same(folder: Path, name: str, model: str) -> None:
    """Raise ConfigError where the folder has the results of another model under the same name."""
    path = folder / _MODEL
    before = _read(path)["model"] if path.exists() else model
    if before != model:
        raise ConfigError(
            f"{folder} has the results of {before}; give {model} another --name than {name}, or another --out"
        )


def write_model(folder: Path, name: str, model: str) -> None:
    """Note which model the folder is about; the first time decides its place in the table."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _MODEL
    if not path.exists():
        write_json(path, {"name": name, "model": model, "first": time.time()})


def write_result(folder: Path, result: Result) -> None:
    """Write one suite's result."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _RESULT, asdict(result))


def read_all(out: Path) -> list[Evaluated]:
    """Every model evaluated into `out` that has a result, in the order in which they were first evaluated."""
    found = []
    for path in out.glob(f"*/{_MODEL}"):
        model = _read(path)
        results = [_result(_read(each)) for each in sorted(path.parent.glob(f"*/{_RESULT}"))]
        found.append((model["first"], Evaluated(model["name"], {result.suite: result for result in results})))
    return [evaluated for _, evaluated in sorted(found, key=lambda each: each[0]) if evaluated.results]


def write_json(path: Path, values: Any) -> None:
    """Write all of it or nothing."""
    unfinished = path.with_name(path.name + ".partial")
    text = json.dumps(_plain(values), indent=1, ensure_ascii=False, allow_nan=False)
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.rename(path)


def _plain(values: Any) -> Any:
    """`values` with null for NaN, which JSON does not have."""
    if isinstance(values, dict):
        return {key: _plain(each) for key, each in values.items()}
    if isinstance(values, list | tuple):
        return [_plain(each) for each in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def read_figure(values: dict[str, Any]) -> Figure:
    """The figure that ``asdict`` made `values` of; null stands for NaN."""
    return Figure(**{**values, "value": math.nan if values["value"] is None else values["value"]})


def _result(values: dict[str, Any]) -> Result:
    figures = {
        key: {name: read_figure(each) for name, each in values[key].items()} for key in ("figures", "categories")
    }
    return Result(**{**values, **figures, "examples": [Example(**each) for each in values["examples"]]})


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); delete it and run the same command again") from error
