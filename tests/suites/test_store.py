"""Replies on disk: found again, told apart, and safe from a process that died in the middle of a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_aligndistil.errors import DataError
from megatron_aligndistil.suites.asks import Ask, Reply, user
from megatron_aligndistil.suites.store import Store

ASKS = [Ask(str(number), (user(f"question {number}\u2028é"),), 0.0, 10) for number in range(3)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with two replies."""
    store = Store(tmp_path / "new" / "answers.jsonl", "model")
    store.add(ASKS[0], Reply("a\u2028\nb", "stop", 1, 2, {"m": -0.5}))
    store.add(ASKS[1], Reply("", tokens=([1, 2], [3])))
    store.close()
    return store.path


def test_replies_are_found_again_whole(path: Path) -> None:
    known = Store(path, "model").known(ASKS)
    assert known == {"0": Reply("a\u2028\nb", "stop", 1, 2, {"m": -0.5}), "1": Reply("", tokens=([1, 2], [3]))}


def test_another_request_or_model_has_no_reply(path: Path) -> None:
    store = Store(path, "model")
    for other in ({"messages": (user("another"),)}, {"temperature": 0.5}, {"max_tokens": 11}, {"seed": 1}):
        assert store.get(Ask(**{**vars(ASKS[0]), **other})) is None
    assert Store(path, "another").known(ASKS) == {}


def test_a_torn_line_is_cut_off_and_asked_again(path: Path) -> None:
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:-9])
    store = Store(path, "model")
    assert list(store.known(ASKS)) == ["0"]
    assert path.read_bytes() == lines[0] + lines[1][:-9]  # reading changes nothing
    store.add(ASKS[1], Reply("again"))
    store.add(ASKS[2], Reply("third"))
    store.close()
    assert [reply.text for reply in Store(path, "model").known(ASKS).values()] == ["a\u2028\nb", "again", "third"]


def test_several_processes_write_side_by_side(path: Path) -> None:
    for part in ("rank0", "rank1"):
        store = Store(path, "model", part)
        store.add(ASKS[2] if part == "rank1" else ASKS[1], Reply(part))
        store.close()
    assert sorted(each.name for each in path.parent.iterdir()) == [
        f"answers{x}.jsonl" for x in ("", ".rank0", ".rank1")
    ]
    assert {name: reply.text for name, reply in Store(path, "model").known(ASKS).items()}["2"] == "rank1"


def test_a_damaged_line_is_named(path: Path) -> None:
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(DataError, match=r"answers.jsonl line 1 is no stored reply"):
        Store(path, "model")
