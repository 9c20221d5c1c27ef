"""Which forms a record may have, and how each is read."""

from __future__ import annotations

import pytest

from megatron_aligndistil.data.forms import TokenTurn, Turn, read_turns
from megatron_aligndistil.data.records import Record
from megatron_aligndistil.errors import DataError
from tests.data.tiny import assistant, user

SYSTEM = {"role": "system", "content": "d"}


def read(values, wanted):
    return read_turns(Record(values, "file.jsonl line 7"), wanted)


TEXT_PAIR = (Turn("a", "b"), Turn("a", "c"))
CHAT_PAIR = (Turn([user("a")], assistant("b")), Turn([user("a")], assistant("c")))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score": 1}, TEXT_PAIR),
        # UltraFeedback-binarized: the prompt again inside whole conversations.
        (
            {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            CHAT_PAIR,
        ),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}, CHAT_PAIR),
        ({"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}, CHAT_PAIR),
        ({"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]}, CHAT_PAIR),
        (
            {"prompt": [user("a")], "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            CHAT_PAIR,
        ),
        ({"prompt": [user("a")], "chosen": "b", "rejected": "c"}, (Turn([user("a")], "b"), Turn([user("a")], "c"))),
        (
            {"prompt_tokens": [1], "chosen_tokens": [2, 3], "rejected_tokens": [], "prompt": "a"},
            (TokenTurn([1], [2, 3]), TokenTurn([1], [])),
        ),
    ],
)
def test_pairs(values, expected):
    assert read(values, "pairs") == expected
    assert read(values, "responses") == expected
    (prompt,) = read(values, "prompts")
    assert (prompt.prompt, prompt.response) == (expected[0].prompt, None)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"messages": [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d")], "label": True},
            Turn([SYSTEM, user("a"), assistant("b"), user("c")], assistant("d")),
        ),
        # A columnar file adds keys without values to messages.
        ({"messages": [user("a"), assistant("b") | {"tool_calls": None}]}, Turn([user("a")], assistant("b"))),
        ({"prompt": "a", "completion": "b"}, Turn("a", "b")),
        ({"prompt": "a", "response": "b"}, Turn("a", "b")),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, Turn([user("a")], assistant("b"))),
        ({"prompt": "a", "response": "b", "prompt_tokens": [5], "response_tokens": [6]}, TokenTurn([5], [6])),
        ({"text": "a b"}, Turn(None, "a b")),
    ],
)
def test_responses(values, expected):
    assert read(values, "responses") == (expected,)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, [Turn("a", "b", 1.0)]),
        ({"prompt": [user("a")], "completion": [assistant("b")], "label": 0}, [Turn([user("a")], assistant("b"), 0.0)]),
        ({"prompt": "a", "response": "b", "label": False}, [Turn("a", "b", 0.0)]),
        ({"prompt_tokens": [1], "response_tokens": [2], "label": 1}, [TokenTurn([1], [2], 1.0)]),
        ({"messages": [user("a"), assistant("b")], "label": False}, [Turn([user("a")], assistant("b"), 0.0)]),
        # The two responses of a pair, the chosen one's first; a label would say nothing about either.
        ({"prompt": "a", "chosen": "b", "rejected": "c", "label": 0}, [Turn("a", "b", 1.0), Turn("a", "c", 0.0)]),
        (
            {"prompt_tokens": [1], "chosen_tokens": [2, 3], "rejected_tokens": [4]},
            [TokenTurn([1], [2, 3], 1.0), TokenTurn([1], [4], 0.0)],
        ),
    ],
)
def test_unpaired(values, expected):
    assert list(read(values, "unpaired")) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "a"}, Turn("a", None)),
        ({"prompt": [user("a")]}, Turn([user("a")], None)),
        ({"messages": [user("a")]}, Turn([user("a")], None)),
        ({"messages": [user("a"), assistant("b")]}, Turn([user("a")], None)),
        ({"prompt_tokens": [1, 2]}, TokenTurn([1, 2], None)),
        ({"prompt": "a", "completion": "b"}, Turn("a", None)),
    ],
)
def test_prompts(values, expected):
    assert read(values, "prompts") == (expected,)


@pytest.mark.parametrize(
    ("values", "wanted", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            "responses",
            r"file.jsonl line 7: a record with the keys question, answer cannot be read as responses; known forms: "
            r".*\{prompt, chosen, rejected\}.*\{text\}",
        ),
        ({"prompt": "a", "response": "b"}, "pairs", "keys prompt, response cannot be read as pairs; known forms: "),
        ({"text": "a"}, "prompts", "cannot be read as prompts"),
        ({}, "responses", r"the keys \(none\)"),
        ({"text": 3}, "responses", r"line 7, read as \{text\}: 'text' is int, not text"),
        ({"chosen": "a", "rejected": "b"}, "pairs", "'chosen' is text, and no 'prompt' says what it answers"),
        ({"messages": [user("a")]}, "responses", "the last message of 'messages' is by 'user'"),
        ({"messages": [assistant("a")]}, "responses", "holds only a response and no prompt"),
        ({"messages": [{"from": "human", "value": "a"}]}, "responses", "a message without a 'role'"),
        ({"messages": [{"role": "user"}]}, "responses", "message by 'user' without 'content'"),
        ({"messages": []}, "prompts", "'messages' is neither text nor a list of messages"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]},
            "pairs",
            "chosen and rejected answer different prompts",
        ),
        ({"prompt_tokens": [1], "response_tokens": "2"}, "responses", "'response_tokens' is not a list of token ids"),
        ({"prompt_tokens": [1.0], "response_tokens": [2]}, "responses", "'prompt_tokens' is not a list of token ids"),
        (
            {"prompt": "a", "response": "b", "label": "good"},
            "unpaired",
            r"line 7, read as \{prompt, response, label\}: 'label' is 'good' and must be true \(desirable\) or false",
        ),
        ({"prompt": "a", "response": "b", "label": None}, "unpaired", "'label' is None"),
        ({"prompt": "a", "response": "b", "label": 0.5}, "unpaired", "'label' is 0.5"),
        ({"prompt": "a", "response": "b"}, "unpaired", r"be read as unpaired; .*\{prompt, completion, label\}"),
    ],
)
def test_bad_records_are_named(values, wanted, message):
    with pytest.raises(DataError, match=message) as caught:
        read(values, wanted)
    assert str(caught.value).startswith("file.jsonl line 7")
