"""Reading and writing JSON lines, with errors that name file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_jsonl(path: str | Path, needs: Iterable[str] = ()) -> list[Record]:
    """The objects of a JSON lines file, each of which must have the keys `needs`. Ends the script where not."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise SystemExit(f"{path}, line {number}: not JSON ({error.msg})") from error
        missing = [key for key in needs if not isinstance(record, dict) or key not in record]
        if missing:
            raise SystemExit(f"{path}, line {number}: needs an object with {', '.join(missing)}")
        records.append(record)
    return records


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Ends the script where it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path}: not JSON ({error.msg}, line {error.lineno})") from error


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one object a line, making the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, making the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def as_json(content: Any) -> str:
    """Indented JSON with six significant digits and a list of numbers on one line."""
    text = json.dumps(_rounded(content), indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def _rounded(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_rounded(value) for value in content]
    return float(f"{content:.6g}") if isinstance(content, float) else content
