"""Records as other tools write them: by hand, and the real files whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_aligndistil.config import DataConfig
from megatron_aligndistil.data.dataset import load_dataset
from megatron_aligndistil.data.forms import DataForm, Turn, read_turns
from megatron_aligndistil.data.records import Record, load_records
from megatron_aligndistil.errors import DataError
from tests.data.tiny import make_tokenizer

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}]}
SAID = {"chosen": {"from": "gpt", "value": "Yes"}, "rejected": {"from": "gpt", "value": "No"}}
TALK = "\n\nHuman: Hi\n\nAssistant: Hm\n\nHuman: So?\n\nAssistant:"
NO = {"role": "assistant", "content": "No"}


def read(values: dict, wanted: DataForm) -> tuple:
    return read_turns(Record(values, "here"), wanted)


def test_sharegpt() -> None:
    assert read(SHAREGPT | SAID, "pairs") == (Turn([USER], ANSWER), Turn([USER], NO))
    whole = {"conversations": [*SHAREGPT["conversations"], SAID["chosen"]], "system": "Be brief."}
    brief = {"role": "system", "content": "Be brief."}
    assert read(whole, "responses") == (Turn([brief, USER], ANSWER),)
    assert read(whole | {"label": False}, "unpaired") == (Turn([brief, USER], ANSWER, 0.0),)
    assert read(SHAREGPT, "prompts") == (Turn([USER], None),)


def test_llama_factory_rates_single_answers() -> None:
    """In the ShareGPT, OpenAI and Alpaca styles; the real file of the kind has `messages` and `label`."""
    whole = {"conversations": [*SHAREGPT["conversations"], SAID["rejected"]]}
    expected = (Turn([USER], NO, 0.0),)
    assert read(whole | {"kto_tag": False}, "unpaired") == expected
    assert read(whole | {"label": False}, "unpaired") == expected
    assert read({"messages": [USER, NO], "kto_tag": False}, "unpaired") == expected
    assert read({"instruction": "Hi", "output": "No", "kto_tag": True}, "unpaired") == (Turn("Hi", "No", 1.0),)


def test_messages_with_an_answer_chosen() -> None:
    values = {"messages": [USER], "chosen": ANSWER, "rejected": NO}
    assert read(values, "pairs") == (Turn([USER], ANSWER), Turn([USER], NO))


def test_alpaca_with_what_was_said_before() -> None:
    task = {"instruction": "So?", "system": "Be brief.", "history": [["Hi", "Hm"]]}
    said = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "Hm"},
        {"role": "user", "content": "So?"},
    ]
    assert read(task | {"output": "Yes"}, "responses") == (Turn(said, ANSWER),)
    assert read(task | {"chosen": "Yes", "rejected": "No"}, "pairs") == (Turn(said, ANSWER), Turn(said, NO))
    assert read({"instruction": "Hi", "system": "", "history": [], "output": "Yes"}, "responses") == (
        Turn("Hi", "Yes"),
    )


def test_alpaca() -> None:
    task = {"instruction": "Add.", "input": "1 1"}
    assert read(task | {"output": "2"}, "responses") == (Turn("Add.\n1 1", "2"),)
    assert read({"instruction": "Add.", "input": "", "output": "2"}, "responses") == (Turn("Add.", "2"),)
    pair = read(task | {"output": "2", "chosen": "2", "rejected": "3"}, "pairs")
    assert pair == (Turn("Add.\n1 1", "2"), Turn("Add.\n1 1", "3"))


def test_transcripts() -> None:
    """The shared beginning is the prompt; two turns by the assistant in a row are one response."""
    before = [USER, {"role": "assistant", "content": "Hm"}, {"role": "user", "content": "So?"}]
    pair = read({"chosen": TALK + " Yes", "rejected": TALK + " No\n\nAssistant: no"}, "pairs")
    assert pair == (Turn(before, ANSWER), Turn(before, {"role": "assistant", "content": "No\n\nno"}))


@pytest.mark.parametrize(
    ("values", "wanted", "message"),
    [
        (
            {"conversations": [{"from": "robot", "value": "x"}]},
            "prompts",
            "a turn from 'robot'; known: human, user, gpt",
        ),
        ({"conversations": []}, "prompts", "'conversations' is no list of turns"),
        (SHAREGPT | {"chosen": "Yes", "rejected": "No"}, "pairs", "'chosen' holds a turn that is not"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "prompts", r"a turn from \['gpt'\]; known: "),
        (SHAREGPT | {"chosen": SAID["chosen"]}, "pairs", "'rejected' holds a turn that is not"),
        ({"instruction": "Hi", "history": ["Hm"], "output": "2"}, "responses", "'history' no list of pairs of texts"),
        ({"instruction": 3, "output": "2"}, "responses", "'instruction' or 'input' is no text"),
        (
            {"chosen": TALK + " Yes", "rejected": "\n\nHuman: Else\n\nAssistant: No"},
            "pairs",
            "are transcripts that part before the last answer",
        ),
        (
            {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi"},
            "pairs",
            "does not end with an answer by 'Assistant:'",
        ),
    ],
)
def test_what_is_wrong_is_told(values: dict, wanted: DataForm, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(values, wanted)


@pytest.mark.parametrize(
    ("file", "wanted", "count"),
    [
        ("hh_rlhf/harmless-base.test.jsonl.gz", "pairs", 2312),
        ("llama_factory/dpo_en_demo.json", "pairs", 300),
        ("llama_factory/kto_en_demo.json", "unpaired", 300),
        ("llama_factory/alpaca_en_demo.json", "responses", 999),
        ("preference_style/instruction-data-with-preference.json", "pairs", 1100),
    ],
)
def test_real_files(shared_data: Path, file: str, wanted: DataForm, count: int) -> None:
    """Every record can be read, each response after a turn that it answers."""
    turns = [read_turns(record, wanted) for record in load_records(str(shared_data / file))]
    assert len(turns) == count
    for each in turns:
        for turn in each:
            assert isinstance(turn, Turn) and turn.prompt and turn.response is not None
            assert isinstance(turn.prompt, str) or turn.prompt[-1]["role"] in ("user", "tool", "assistant")


def test_columns_under_other_names(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a b", "good": "c", "bad": "d", "prompt": "not this"}\n')
    config = DataConfig(
        train=str(file), columns={"prompt": "question", "chosen": "good", "rejected": "bad"}, max_length=16
    )
    tokenizer = make_tokenizer()
    dataset, _ = load_dataset(config, config.train, tokenizer, "pairs")
    ((chosen, rejected),) = [dataset[0]]
    assert tokenizer.decode(chosen.tokens[: chosen.prompt_length], skip_special_tokens=True).strip() == "a b"
    assert not (chosen.tokens[-2:] == rejected.tokens[-2:]).all()
    missing = config.model_copy(update={"columns": {"prompt": "ask"}})
    with pytest.raises(DataError, match=r"rows.jsonl line 1 has no ask, which data.columns names; its keys are"):
        load_dataset(missing, config.train, tokenizer, "pairs")
