"""From a file of records to examples: what is kept, dropped and cut."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aligndistil.config import DataConfig
from megatron_aligndistil.data.dataset import load_dataset
from megatron_aligndistil.data.examples import DatasetReport, ExampleMaker
from megatron_aligndistil.data.files import Raw
from megatron_aligndistil.data.tokenizer import load_tokenizer
from megatron_aligndistil.errors import DataError
from tests.data.tiny import BOS, EOS, TEMPLATE, A, B, C, D, make_tokenizer, write_jsonl

TOKENIZER = make_tokenizer(template=TEMPLATE)

PAIRS = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "a", "chosen": "", "rejected": "d"},
    {"prompt": "a a a a", "chosen": "b", "rejected": "c c c c c"},
]


def load(tmp_path, records, form, **settings):
    source = write_jsonl(tmp_path / "records.jsonl", records)
    dataset, report = load_dataset(DataConfig(train=source, **settings), source, make_tokenizer(), form)
    examples = [tuple((row.prompt_length, row.tokens.tolist()) for row in example) for example in dataset]
    assert len(dataset) == report.examples == len(examples)
    assert report.tokens == sum(len(tokens) for example in examples for _, tokens in example)
    return examples, report


def test_pairs_are_dropped_and_cut_as_reported(tmp_path):
    examples, report = load(tmp_path, PAIRS, "pairs", max_prompt_length=3, max_length=6)
    assert examples == [
        ((2, [BOS, A, B, EOS]), (2, [BOS, A, C, EOS])),
        ((3, [A, A, A, B, EOS]), (3, [A, A, A, C, C, C])),
    ]
    assert report == DatasetReport(records=3, examples=2, empty=1, no_room=0, cut_prompts=1, cut_responses=1, tokens=19)
    assert str(report) == (
        "2 examples with 19 tokens in all, from 3 records; 1 left out as empty; 1 with the prompt's beginning cut to "
        "max_prompt_length; 1 with a response's end cut to max_length"
    )


@pytest.mark.parametrize(
    ("responses", "expected"),
    [
        ("chosen", [[BOS, A, B, EOS], [BOS, A, A, A, A, B, EOS]]),
        ("rejected", [[BOS, A, C, EOS], [BOS, A, D, EOS], [BOS, A, A, A, A, C, C, C, C, C, EOS]]),
        (
            "both",
            [
                [BOS, A, B, EOS],
                [BOS, A, C, EOS],
                [BOS, A, D, EOS],
                [BOS, A, A, A, A, B, EOS],
                [BOS, A, A, A, A, C, C, C, C, C, EOS],
            ],
        ),
    ],
)
def test_pairs_read_as_responses(tmp_path, responses, expected):
    examples, _ = load(tmp_path, PAIRS, "responses", responses=responses)
    assert [tokens for ((_, tokens),) in examples] == expected


def test_a_prompt_that_leaves_no_room(tmp_path):
    examples, report = load(tmp_path, PAIRS, "responses", max_length=4)
    assert [tokens for ((_, tokens),) in examples] == [[BOS, A, B, EOS]]
    assert (report.empty, report.no_room) == (1, 1)


def test_prompts_alone_keep_their_end_and_leave_max_length_to_generation(tmp_path):
    records = [{"prompt": "a b c d"}, *PAIRS[:1]]
    examples, report = load(tmp_path, records, "prompts", max_prompt_length=3, max_length=2)
    assert examples == [((3, [B, C, D]),), ((2, [BOS, A]),)]
    assert report.cut_prompts == 1


def test_unpaired_rows_are_rated_and_dropped_one_by_one(tmp_path):
    records = [*PAIRS, {"prompt": "b", "completion": "d", "label": False}, {"prompt": "b", "response": "a", "label": 1}]
    source = write_jsonl(tmp_path / "records.jsonl", records)
    config = DataConfig(train=source, max_prompt_length=3, max_length=6)
    dataset, report = load_dataset(config, source, make_tokenizer(), "unpaired")
    assert [(row.tokens.tolist(), row.rating) for (row,) in dataset] == [
        ([BOS, A, B, EOS], 1.0),
        ([BOS, A, C, EOS], 0.0),
        ([BOS, A, D, EOS], 0.0),  # the chosen response is empty
        ([A, A, A, B, EOS], 1.0),
        ([A, A, A, C, C, C], 0.0),
        ([BOS, B, D, EOS], 0.0),
        ([BOS, B, A, EOS], 1.0),
    ]
    assert report == DatasetReport(records=5, examples=7, empty=1, cut_prompts=2, cut_responses=1, tokens=31)


def test_a_label_that_is_none_names_file_and_line(tmp_path):
    records = [*PAIRS[:1], {"prompt": "a", "completion": "b", "label": "yes"}]
    with pytest.raises(DataError, match=r"records.jsonl line 2, .*'label' is 'yes' and must be true"):
        load(tmp_path, records, "unpaired")


def test_first_records_only(tmp_path):
    assert load(tmp_path, PAIRS, "pairs", max_records=1)[1].records == 1


def test_errors_name_file_and_line(tmp_path):
    for bad in ({"prompt": "a"}, {"prompt_tokens": [A], "response_tokens": [99]}):
        with pytest.raises(DataError, match=r"records.jsonl line 3: "):
            load(tmp_path, [*PAIRS[:2], bad], "responses")
    with pytest.raises(DataError, match="records.jsonl gives no example to work on: 0 examples .* 1 left out as empty"):
        load(tmp_path, PAIRS[1:2], "pairs")
    with pytest.raises(DataError, match="0 records"):
        load(tmp_path, [], "pairs")


MALFORMED = {
    '{"prompt": "a", "chosen": ': r"line 4: not JSON: Expecting value at column 27",
    '{"prompt": "a", "chosen": "\xe4", "rejected": "b"}': r"line 5: not UTF-8 text: invalid continuation byte",
    '["a", "b", "c"]': r"line 6: a record is a mapping of keys to values, not list",
    '{"prompt": "a", "chosen": 3, "rejected": "b"}': r"line 7, read as {prompt, chosen, rejected}: 'chosen' is neither",
    '{"prompt_tokens": [5], "chosen_tokens": [99], "rejected_tokens": [5]}': r"line 8: token id 99 is outside",
    '{"prompt": "a \\ud83d", "chosen": "b", "rejected": "c"}': r"line 9: the text holds '\\ud83d', half of a character",
    '{"prompt": "d d", "chosen": "b", "rejected": "c"}': r"line 10: the chat template refuses .*: no d",
}


def test_malformed_records_end_the_run_or_are_left_out_and_named(tmp_path):
    template = TEMPLATE.replace(
        "<turn>", "{% if m.content == 'd d' %}{{ raise_exception('no d') }}{% endif %}<turn>", 1
    )
    tokenizer = make_tokenizer(template=template)
    good = "".join(json.dumps(record) + "\n" for record in PAIRS)
    source = tmp_path / "records.jsonl"
    for line, message in MALFORMED.items():
        number = int(message.partition(":")[0].partition(",")[0].split()[1])
        source.write_bytes((good + "\n" * (number - 4) + line + "\n" + good).encode("latin-1"))
        config = DataConfig(train=str(source))
        with pytest.raises(
            DataError, match=rf"records.jsonl {message}.* \(data.on_error: skip leaves such records out\)$"
        ):
            load_dataset(config, str(source), tokenizer, "pairs")
    source.write_bytes((good + "\n".join(MALFORMED) + "\n" + good).encode("latin-1"))
    config = DataConfig(train=str(source), on_error="skip")
    for _ in range(2):  # made, then read again
        dataset, report = load_dataset(config, str(source), tokenizer, "pairs")
        assert (len(dataset), report.records, report.malformed, report.empty) == (4, 13, 7, 2)
        assert len(report.problems) == 5
        for problem, message in zip(report.problems, MALFORMED.values(), strict=False):
            assert re.search(message, problem)
        assert "; 7 malformed records left out, the first of which are:\n  " in str(report)
    with pytest.raises(DataError, match="line 4: not JSON"):  # though the tokens are there
        load_dataset(DataConfig(train=str(source)), str(source), tokenizer, "pairs")


def test_what_is_wrong_with_the_tokenizer_is_never_skipped(tmp_path):
    source = write_jsonl(tmp_path / "records.jsonl", PAIRS)
    with pytest.raises(DataError, match="line 1: the tokenizer has no eos_token"):
        load_dataset(DataConfig(train=source, on_error="skip"), source, make_tokenizer(eos=False), "pairs")


KEYS = ["prompt", "chosen", "rejected", "messages", "conversations", "from", "value", "role", "content", "label"]
KEYS += ["instruction", "input", "system", "history", "text", "completion", "prompt_tokens", "response_tokens"]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["a", "user", "gpt"])
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES), st.sampled_from(["pairs", "responses", "prompts", "unpaired"]))
def test_whatever_a_record_holds_it_is_read_or_told(record, form):
    maker = ExampleMaker(TOKENIZER, DataConfig(train="", on_error="skip"), form)
    _, report = maker.make([Raw(json.dumps(record).encode(), "line 1"), Raw(record, "row 1")])
    assert report.records == 2


def test_ultrafeedback(shared_data):
    source = str(shared_data / "ultrafeedback" / "train.jsonl")
    tokenizer = load_tokenizer(shared_data / "stories260K" / "hf")
    config = DataConfig(train=source, max_length=512, max_prompt_length=256)
    dataset, report = load_dataset(config, source, tokenizer, "pairs")
    # One chosen and one rejected response of the 1,000 pairs are empty.
    assert (report.records, report.examples, report.empty, report.no_room) == (1000, 998, 2, 0)
    assert all(len(chosen.tokens) <= 512 and chosen.prompt_length <= 256 for chosen, _ in dataset)
    for chosen, rejected in dataset:
        assert chosen.tokens[: chosen.prompt_length].tolist() == rejected.tokens[: rejected.prompt_length].tolist()
