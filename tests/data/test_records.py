"""Reading files, folders and named datasets."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_aligndistil.data.records import load_records
from megatron_aligndistil.errors import DataError
from tests.data.tiny import write_jsonl

RECORDS = [{"prompt": "a", "completion": "b"}, {"prompt": "2024-01-01", "completion": "ä\u2028"}]


def values(source, max_records=None):
    return [record.values for record in load_records(str(source), max_records)]


@pytest.fixture
def quiet_datasets(tmp_path, monkeypatch):
    """The `datasets` library, writing its cache below tmp_path."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def test_every_kind_of_json_file_gives_the_same_records(tmp_path):
    lines = "\n".join(json.dumps(record) for record in RECORDS)
    (tmp_path / "a.jsonl").write_text("\ufeff\n" + lines + "\n\n", encoding="utf-8")
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "list.json").write_text(json.dumps(RECORDS, indent=2))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "lines.json", "list.json", "c.jsonl.gz"):
        assert values(tmp_path / name) == RECORDS, name
    assert values(tmp_path / "a.jsonl", max_records=1) == RECORDS[:1]


def test_a_record_knows_its_line_and_leaves_out_nulls(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "prompt": null}\n\n{"text": "b"}\n')
    first, second = load_records(str(tmp_path / "a.jsonl"))
    assert (first.values, first.where) == ({"text": "a"}, f"{tmp_path}/a.jsonl line 1")
    assert second.where == f"{tmp_path}/a.jsonl line 3"


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    for name in ("2.jsonl", "1.json", "3.jsonl"):
        write_jsonl(tmp_path / name, [{"text": name}])
    (tmp_path / "README.md").write_text("not data")
    assert [record["text"] for record in values(tmp_path)] == ["1.json", "2.jsonl", "3.jsonl"]
    assert len(values(tmp_path, max_records=2)) == 2


def test_parquet_and_saved_datasets(tmp_path, quiet_datasets):
    rows = quiet_datasets.Dataset.from_list([*RECORDS, {"prompt": "c"}])
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    quiet_datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    for name in ("a.parquet", "saved", "splits", "hub"):
        assert values(tmp_path / name) == [*RECORDS, {"prompt": "c"}], name
    assert [record.where for record in load_records(str(tmp_path / "a.parquet"))][2] == f"{tmp_path}/a.parquet record 3"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl line 2: not JSON: Expecting value at column"),
        ("a.json", '[{"text": "a"},\n{"text" "a"}]', "a.json line 2: not JSON: Expecting ':' delimiter at column 9"),
        ("a.jsonl", '{"text": "a"}\n3\n', "a.jsonl line 2: a record is a mapping of keys to values, not int"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}\n',
            "a.jsonl line 2: not UTF-8 text: invalid start byte at byte 11",
        ),
        ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', "a.json line 2: not UTF-8 text: invalid start byte; save"),
        ("a.jsonl", '{"text": "ä"}\n'.encode("utf-16"), "a.jsonl is UTF-16 text; save it as UTF-8"),
        ("a.jsonl", "[" * 100_000, "a.jsonl: not JSON that can be read: maximum recursion"),
        ("a.jsonl", '{"a":' * 100_000, "a.jsonl line 1: not JSON that can be read: "),
        ("a.jsonl.gz", b"no gzip", "cannot read .*a.jsonl.gz: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:-12], "cannot read .*a.jsonl.gz"),
        ("a.parquet", b"no parquet", "a.parquet cannot be read as Parquet: "),
        ("a.txt", "a", "a.txt is no data file by its name; known endings: .json, .jsonl"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        values(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    for source in (tmp_path / "none.jsonl", tmp_path / "none", "none.parquet"):
        with pytest.raises(DataError, match=f"there is no data file or folder {source}"):
            values(source)
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds files of several kinds \(json, parquet\)"):
        values(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither a file or folder of records nor a dataset") as caught:
        values(tmp_path / "empty")
    assert "\n" not in str(caught.value)


def test_reading_json_does_not_import_slow_libraries(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    program = (
        "import sys; from megatron_aligndistil.data import dataset, loader; from megatron_aligndistil.data.records "
        f"import load_records; assert len(list(load_records({source!r}))) == 2; "
        "sys.exit(bool({'datasets', 'transformers', 'jinja2', 'pyarrow'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60, check=False).returncode == 0
