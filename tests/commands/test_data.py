"""`aligndistil data inspect`, and training on records that are not as they should be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_aligndistil.config import TrainConfig, build
from megatron_aligndistil.engine.trainer import train
from megatron_aligndistil.errors import ConfigError, DataError
from tests.commands.test_cli import PROGRAM, refused, succeeds
from tests.data.tiny import TEMPLATE, make_tokenizer
from tests.engine.tiny import make_checkpoint, make_pairs

MALFORMED = [b'{"prompt": "a", "chosen": ', b'{"prompt": "\xe4", "chosen": "a", "rejected": "b"}', b'{"prompt": 3}']
SFT = ["train", "--algorithm.name", "sft", "--models.policy", "policy", "--batch.global_size", "8", "--run.steps", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a tokenizer with a chat template, records of which three are malformed, and one response empty."""
    folder = tmp_path_factory.mktemp("data")
    make_checkpoint("qwen2-tied", folder / "policy")
    make_tokenizer(template=TEMPLATE).save_pretrained(folder / "tokenizer")
    make_pairs(folder / "good.jsonl", count=16, vocab_size=300)
    lines = (folder / "good.jsonl").read_bytes().splitlines()
    (folder / "bad.jsonl").write_bytes(b"\n".join([*lines[:4], *MALFORMED, *lines[4:]]))
    records = [
        {"prompt": "a a a b", "chosen": "c c\nc c c", "rejected": "d", "score": 1},
        {"prompt": "a", "chosen": "", "rejected": "d"},
        {"prompt": "a", "chosen": "b"},
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_inspect_shows_rows_and_counts(folder: Path) -> None:
    limits = ["--data.max_prompt_length", "7", "--data.max_length", "11"]
    arguments = ["data", "inspect", "--data", "pairs.jsonl", "--model", "tokenizer", *limits, "--html", "rows.html"]
    lines = [line.rstrip() for line in succeeds(folder, *PROGRAM, *arguments).stdout.splitlines()]
    assert lines[0] == "pairs.jsonl, read as pairs"
    assert lines[3:11] == [  # this tokenizer puts a space before every word
        "chosen: prompt 7 + response 4 tokens, 4 of them learned on; cut off: 3 before, 3 behind",
        "  cut off   ·<turn>|·user|·a",
        "  prompt    ·a|·a|·b|·<end>|·↵",
        "            |·<turn>|·assistant",
        "  response  ·c|·c|·↵",
        "            |·c",
        "  cut off   ·c|·c|·<end>",
        "rejected: prompt 7 + response 2 tokens, 2 of them learned on; cut off: 3 before",
    ]
    assert "  padding   ·</s> x 2" in lines
    assert "left out: a response is empty" in lines
    assert any(
        "left out as malformed: pairs.jsonl line 3: a record with the keys prompt, chosen" in line for line in lines
    )
    text = "\n".join(lines)
    assert "1 examples with 20 tokens in all, from 3 records; 1 left out as empty; 1 with the prompt" in text
    assert "1 malformed records left out" in text and "over max_length" in text
    page = (folder / "rows.html").read_text()
    assert "color: #008000" in page and "padding" in page


def test_inspect_reads_the_configuration_of_a_run(folder: Path) -> None:
    (folder / "run.yaml").write_text(
        "algorithm: {name: kto}\nmodels: {policy: policy}\ndata: {train: good.jsonl, max_length: 64}\nrun: {dir: x}\n"
    )
    shown = succeeds(folder, *PROGRAM, "data", "inspect", "--config", "run.yaml", "--index", "15", "--rows", "1").stdout
    assert "good.jsonl, read as unpaired" in shown and "good.jsonl line 16" in shown
    assert shown.count("\ndesirable: prompt ") == shown.count("undesirable: prompt ") == 1
    assert "32 examples with" in shown and "from 16 records" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "show"], "data has one command: aligndistil data inspect"),
        (["data", "inspect", "--data", "good.jsonl"], "the configuration needs model; set each"),
        (
            ["data", "inspect", "--data", "good.jsonl", "--model", "policy", "--index", "16"],
            "good.jsonl has no record 16; --index counts from 0",
        ),
        (["data", "inspect", "--data", "good.jsonl", "--model", "policy", "--row", "1"], "row; did you mean rows?"),
    ],
)
def test_inspect_tells_what_is_wrong(folder: Path, arguments: list[str], message: str) -> None:
    assert message in refused(folder, *PROGRAM, *arguments)


def test_malformed_records_in_a_real_run(folder: Path) -> None:
    """Named, with the remedy; or left out, by two processes of which one tokenises."""
    expected = (
        "aligndistil: bad.jsonl line 5: not JSON: Expecting value at column 27 (data.on_error: skip leaves such "
        "records out)"
    )
    run = [*SFT, "--data.train", "bad.jsonl", "--data.cache", "kept", "--run.dir"]
    assert refused(folder, *PROGRAM, *run, "runs/fail", "--nproc", "2") == expected
    result = succeeds(folder, *PROGRAM, *run, "runs/skip", "--data.on_error", "skip", "--nproc", "2")
    assert "from 19 records; 3 malformed records left out:\n  bad.jsonl line 5: not JSON" in result.stdout
    assert "\n  bad.jsonl line 6: not UTF-8 text: invalid continuation byte" in result.stdout
    assert "\n  bad.jsonl line 7: a record with the keys prompt cannot be read as responses" in result.stdout
    assert len([path for path in (folder / "kept" / "tokens").iterdir() if path.is_dir()]) == 1


def attempt(folder: str, changes: dict[str, str | int]) -> None:
    """`aligndistil train` of one process, in `folder`."""
    os.chdir(folder)
    values: dict[str, dict[str, object]] = {
        "algorithm": {"name": "sft"},
        "models": {"policy": "policy"},
        "batch": {"global_size": 1},
        "data": {"train": "case.jsonl", **changes},
        "run": {"dir": "runs/case", "steps": 1},
    }
    train(build(TrainConfig, values))


@pytest.mark.parametrize(
    ("record", "changes", "kind", "message"),
    [
        (
            {"prompt_tokens": [3], "response_tokens": [310]},
            {},
            ConfigError,
            "case.jsonl has a token numbered 310, and the model knows 300 tokens; put the tokenizer that the model was "
            "trained with into policy",
        ),
        (
            {"prompt_tokens": [3] * 300, "response_tokens": [4]},
            {},
            ConfigError,
            "case.jsonl has rows of .* positions; set data.max_length to",
        ),
        (
            {"prompt_tokens": [3, 4, 5], "response_tokens": [6]},
            {"max_length": 3},
            DataError,
            "gives no example to work on: 0 examples .* from 1 records; 1 left out because the prompt fills max_length",
        ),
        (
            {"prompt_tokens": [3], "response_tokens": []},
            {},
            DataError,
            "gives no example to work on: 0 examples .* 1 left out as empty",
        ),
        (
            {"prompt_tokens": [3], "response_tokens": [5000]},
            {},
            DataError,
            "case.jsonl line 1: token id 5000 is outside the tokenizer's vocabulary of 32",
        ),
    ],
)
def test_what_no_run_can_learn_on_is_told(workers, tmp_path, record, changes, kind, message) -> None:
    """The tokenizer knows more words than the model."""
    make_checkpoint("qwen2-tied", tmp_path / "policy")
    make_checkpoint("qwen2-tied", tmp_path / "larger", vocab_size=320)
    for path in (tmp_path / "larger").glob("tokenizer*"):
        path.rename(tmp_path / "policy" / path.name)
    (tmp_path / "case.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(kind, match=message):
        workers.run(1, attempt, str(tmp_path), changes)
    assert not (tmp_path / "runs").exists()


def load_here(folder: str) -> None:
    """A run whose processes find different records under one name, as on machines with disks of their own."""
    os.chdir(Path(folder) / os.environ["RANK"])
    os.environ["ALIGNDISTIL_CACHE"] = "cache"
    try:
        attempt(".", {"train": "good.jsonl"})
    finally:
        del os.environ["ALIGNDISTIL_CACHE"]


def test_other_records_on_another_machine_are_told(workers, tmp_path: Path) -> None:
    for rank in (0, 1):
        make_checkpoint("qwen2-tied", tmp_path / str(rank) / "policy")
        make_pairs(tmp_path / str(rank) / "good.jsonl", count=4, vocab_size=300, seed=rank)
    with pytest.raises(
        DataError, match="good.jsonl holds other records for process 1 than for process 0; copy the same"
    ):
        workers.run(2, load_here, str(tmp_path))
