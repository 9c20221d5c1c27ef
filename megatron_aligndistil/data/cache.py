"""Tokens kept on disk: made once, by one process, and opened by all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from megatron_aligndistil.data.token_files import TokenArrays, open_arrays
from megatron_aligndistil.data.tokenizer import Tokenizer
from megatron_aligndistil.errors import DataError

_ABANDONED = 24 * 3600.0  # seconds after which an unfinished folder that nobody writes to is removed


def cache_folder(named: str | None) -> Path:
    """Where tokens are kept: `named`, else $ALIGNDISTIL_CACHE, else aligndistil in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(named or os.environ.get("ALIGNDISTIL_CACHE") or f"{user}/aligndistil").expanduser() / "tokens"


def cache_key(source: Any, tokenizer: Tokenizer, settings: dict[str, Any]) -> str:
    """A name for the tokens of some records, another one wherever the tokens may be others.

    That is: other records (`source`, see :class:`~megatron_aligndistil.data.records.Source`), another tokenizer or chat
    template, other `settings` of how they are read and cut, another version of transformers, or of this package's
    own reading.
    """
    import transformers

    parts = [source, settings, _describe(tokenizer), transformers.__version__, _own_code()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cached(root: Path, key: str, write: Callable[[Path], None]) -> tuple[TokenArrays, dict[str, Any]]:
    """The arrays kept under `key`, which `write` makes in a folder that it is given where there are none, or damaged.

    Of the processes that want the same arrays at a time, on one machine or on several with this file system in common,
    one makes them and the others wait; machines with file systems of their own make each their own. The folder gets
    its name when it is whole. Where a file system cannot lock files, more than one process may make the arrays, and
    the first to be ready is used.

    Raises DataError where the folder cannot be written to.
    """
    found = open_arrays(root / key)
    if found is not None:
        return found
    from filelock import FileLock

    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{key}.lock"):
            found = open_arrays(root / key)  # another process may have been first
            return _make(root, key, write) if found is None else found
    except OSError as error:
        raise DataError(
            f"cannot keep tokens in {root}: {error.strerror or error}; make room there, or name another folder with "
            f"data.cache or the environment variable ALIGNDISTIL_CACHE"
        ) from error


def _make(root: Path, key: str, write: Callable[[Path], None]) -> tuple[TokenArrays, dict[str, Any]]:
    _remove_abandoned(root)
    unfinished = root / f"{key}.{uuid4().hex}.unfinished"
    unfinished.mkdir()
    try:
        write(unfinished)
        shutil.rmtree(root / key, ignore_errors=True)  # damaged
        try:
            unfinished.rename(root / key)
        except OSError:
            if not (root / key).is_dir():  # else another process was faster
                raise
        found = open_arrays(root / key)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if found is None:
        raise DataError(f"what was written to {root / key} cannot be read back; look after that disk")
    return found


def _remove_abandoned(root: Path) -> None:
    """Remove what processes that were killed have left."""
    for folder in root.glob("*.unfinished"):
        try:
            last = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except OSError:  # it has just got its name
            continue
        if time.time() - last > _ABANDONED:
            shutil.rmtree(folder, ignore_errors=True)


def _describe(tokenizer: Any) -> str:
    """A checksum of all that decides which tokens a text becomes."""
    tokenizer("")  # some settings of the inner tokenizer are made at the first call
    inner = getattr(tokenizer, "backend_tokenizer", None)
    described = [
        type(tokenizer).__name__,
        tokenizer.chat_template,
        str(tokenizer.special_tokens_map),
        inner.to_str() if inner is not None else sorted(tokenizer.get_vocab().items()),
    ]
    model = getattr(tokenizer, "vocab_file", None)
    if inner is None and model and Path(model).is_file():
        described.append(hashlib.sha256(Path(model).read_bytes()).hexdigest())
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


@cache
def _own_code() -> str:
    """A checksum of the modules beside this one, so that what an earlier version made is not used."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
