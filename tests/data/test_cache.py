"""Tokens on disk: made once, flat in memory, whole or absent, and made anew where they are damaged."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_aligndistil.config import DataConfig
from megatron_aligndistil.data import dataset as module
from megatron_aligndistil.data.dataset import TokenDataset, load_dataset
from megatron_aligndistil.data.tokenizer import load_tokenizer
from megatron_aligndistil.errors import DataError
from tests.data.tiny import TEMPLATE, A, make_tokenizer, write_jsonl

ROOT = Path(__file__).parents[2]
PAIRS = [
    {"prompt": " ".join("abcd"[: 1 + index % 4]), "chosen": "b " * (index % 7), "rejected": "c d"}
    for index in range(40)
]


def load(source: str, cache: Path, tokenizer=None, form="pairs", **settings):
    return load_dataset(
        DataConfig(train=source, cache=str(cache), **settings), source, tokenizer or make_tokenizer(), form
    )


def same(left: TokenDataset, right: TokenDataset) -> bool:
    return len(left) == len(right) and all(
        (a.tokens == b.tokens).all() and (a.prompt_length, a.rating) == (b.prompt_length, b.rating)
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "tokens").iterdir() if path.is_dir())


def test_what_is_opened_is_what_was_made(tmp_path):
    source = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    made, report = load(source, tmp_path)
    tokens = folders(tmp_path)[0] / "tokens.bin"
    before = tokens.stat().st_mtime_ns, tokens.stat().st_ino
    opened, again = load(source, tmp_path)
    assert (tokens.stat().st_mtime_ns, tokens.stat().st_ino) == before
    assert same(made, opened) and again == report and made.fingerprint == opened.fingerprint
    in_memory = TokenDataset(list(opened))
    assert same(in_memory, opened)
    for dataset in (opened, in_memory):
        assert (dataset.largest_token, dataset.longest_row, dataset.longest_prompt) == (8, 12, 5)
        assert dataset.row_lengths.dtype == np.int32 and dataset.row_lengths.shape == (len(made), 2)
        assert dataset.row_lengths.tolist() == [[len(row.tokens) for row in example] for example in made]
    with pytest.raises(ValueError, match="read-only"):
        opened[0][0].tokens[0] = 0
    with pytest.raises(IndexError):
        opened[len(opened)]


def test_other_data_settings_or_templates_are_other_tokens(tmp_path):
    source = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    load(source, tmp_path)
    load(source, tmp_path, max_length=5)
    load(source, tmp_path, form="unpaired")
    load(source, tmp_path, make_tokenizer(template=TEMPLATE))
    load(source, tmp_path, make_tokenizer(adds_bos=False))
    load(source, tmp_path, workers=1, on_error="skip")  # the same as the first
    assert len(folders(tmp_path)) == 5
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS[:-1])
    assert load(source, tmp_path)[1].records == len(PAIRS) - 1


@pytest.mark.parametrize("name", ["tokens.bin", "starts.bin", "ratings.bin", "meta.json"])
def test_a_damaged_cache_is_made_anew(tmp_path, name):
    source = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    made = TokenDataset(list(load(source, tmp_path)[0]))
    (folder,) = folders(tmp_path)
    whole = (folder / name).read_bytes()
    for damage in (whole[:-1], whole[:9] + bytes([whole[9] ^ 64]) + whole[10:], None):
        if damage is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(damage)
        assert same(load(source, tmp_path)[0], made)
        assert (folder / name).read_bytes() == whole and folders(tmp_path) == [folder]


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    source = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot keep tokens in .*file/tokens: Not a directory; make room there, or"):
        load(source, tmp_path / "file")
    with pytest.raises(DataError, match="gives no example"):
        load(write_jsonl(tmp_path / "empty.jsonl", []), tmp_path)
    assert folders(tmp_path) == []


def counted(source: str, cache: str) -> tuple[int, str | None]:
    """What this process gets; it leaves a file if it was the one that tokenised."""
    write = module._write

    def noted(*args, **named):
        (Path(cache) / f"tokenised.{os.getpid()}").touch()
        return write(*args, **named)

    module._write = noted
    try:
        dataset, _ = load(source, Path(cache))
    finally:
        module._write = write
    return len(dataset), dataset.fingerprint


def test_of_several_processes_one_tokenises(workers, tmp_path):
    source = write_jsonl(tmp_path / "pairs.jsonl", PAIRS * 100)
    found = workers.run(3, counted, source, str(tmp_path))
    assert len(set(found)) == 1 and len(list(tmp_path.glob("tokenised.*"))) == 1
    assert len(folders(tmp_path)) == 1


def test_worker_processes_give_the_same_in_the_same_order(tmp_path, shared_data):
    source = str(shared_data / "ultrafeedback" / "train.jsonl")
    tokenizer = load_tokenizer(shared_data / "stories260K" / "hf")
    limits = {"max_length": 256, "max_prompt_length": 128, "max_records": 200}
    alone, report = load(source, tmp_path / "1", tokenizer, workers=1, **limits)
    shared, again = load(source, tmp_path / "2", tokenizer, workers=2, **limits)
    assert alone.fingerprint == shared.fingerprint and report == again
    broken = write_jsonl(tmp_path / "broken.jsonl", [*PAIRS * 20, {"prompt": "a"}, *PAIRS])
    with pytest.raises(
        DataError, match=r"broken.jsonl line 801: a record with the keys prompt cannot be read as pairs"
    ):
        load(broken, tmp_path, workers=2)


PROGRAM = """
import resource, sys
from pathlib import Path
from megatron_aligndistil.config import DataConfig
from megatron_aligndistil.data.dataset import load_dataset
from tests.data.tiny import make_tokenizer

for source in sys.argv[3:]:
    config = DataConfig(train=source, cache=sys.argv[1], workers=int(sys.argv[2]))
    dataset, _ = load_dataset(config, source, make_tokenizer(), "responses")
    print(len(dataset), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, flush=True)
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_many(path: Path, count: int) -> int:
    """Records of 400 tokens each; returns the bytes of the file."""
    draw = random.Random(0)
    line = {"prompt_tokens": [A] * 100, "response_tokens": [draw.randrange(5, 9) for _ in range(300)]}
    with path.open("w") as file:
        for _ in range(count):
            file.write(json.dumps(line) + "\n")
    return path.stat().st_size


def test_memory_stays_flat_as_a_file_grows(tmp_path):
    small, large = write_many(tmp_path / "small.jsonl", 2000), write_many(tmp_path / "large.jsonl", 20_000)
    process = start(tmp_path, 1, tmp_path / "small.jsonl", tmp_path / "large.jsonl")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    (count, low), (many, high) = [map(int, line.split()) for line in output.splitlines()]
    assert (count, many) == (2000, 20_000)
    assert high - low < 0.3 * (large - small) / 2**20, (low, high)


def test_a_killed_process_leaves_nothing_in_the_way(tmp_path):
    write_many(tmp_path / "records.jsonl", 6000)
    process = start(tmp_path, 2, tmp_path / "records.jsonl")
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in tmp_path.glob("tokens/*.unfinished/tokens.bin")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    helpers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert len(helpers) == 2 and psutil.wait_procs(helpers, timeout=60)[1] == []
    (left,) = folders(tmp_path)
    assert left.suffix == ".unfinished"
    yesterday = time.time() - 2 * 24 * 3600
    for path in (*left.iterdir(), left):
        os.utime(path, (yesterday, yesterday))
    dataset, _ = load(str(tmp_path / "records.jsonl"), tmp_path, form="responses")
    assert len(dataset) == 6000 and left not in folders(tmp_path)
