"""The page of ``aligndistil inspect``: its template, style and script in one file with the data, and no network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any


def write_page(path: Path, data: Mapping[str, Any]) -> None:
    """Write the page, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(data), encoding="utf-8")


def render(data: Mapping[str, Any]) -> str:
    """The page as text. Texts of the data are shown as texts, whatever they hold."""
    style, script = _part("inspect.css"), _part("inspect.js")
    parts = {
        "title": html.escape(f"Token by token: {data['source']}"),
        # The browser runs this script and no other, and fetches nothing, whatever a text may ask for.
        "policy": f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'",
        "style": style,
        "script": script,
        "data": _embedded(data),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _part("inspect.html"))


def _part(name: str) -> str:
    return (resources.files(__package__) / "pages" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """What a content security policy calls an inline part by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON without a character that could end the element that it is in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
