"""Tokens and their boundary: by hand with a tiny tokenizer, and against transformers with real ones."""

from __future__ import annotations

import shutil
from itertools import islice

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_aligndistil.data.forms import TokenTurn, Turn, read_turns
from megatron_aligndistil.data.records import load_records
from megatron_aligndistil.data.tokenizer import load_tokenizer, pad_id, vocab_size
from megatron_aligndistil.data.tokens import Encoder, Row, make_row, stop_ids, truncate
from megatron_aligndistil.errors import CheckpointError, DataError
from tests.data.tiny import (
    BOS,
    END,
    EOS,
    IDS,
    NEWLINE,
    TEMPLATE,
    TURN,
    WORDS,
    A,
    B,
    C,
    D,
    assistant,
    make_tokenizer,
    user,
)

# How Llama-3 splits text into words, which decides where a token may reach over a boundary.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
USER, ASSISTANT = IDS["user"], IDS["assistant"]


def encode(tokenizer, *turns):
    return [parts(row) for row in Encoder(tokenizer).encode(turns, ["here"] * len(turns))]


def parts(row: Row):
    return row.tokens[: row.prompt_length].tolist(), row.tokens[row.prompt_length :].tolist()


def test_without_a_chat_template():
    tokenizer = make_tokenizer()
    assert encode(tokenizer, Turn("a b", "c"), Turn("a b", "d d"), Turn("a", None)) == [
        ([BOS, A, B], [C, EOS]),
        ([BOS, A, B], [D, D, EOS]),
        ([BOS, A], []),
    ]
    assert encode(tokenizer, Turn(None, "a b"), Turn("", None)) == [([BOS], [A, B, EOS]), ([BOS], [])]
    assert encode(make_tokenizer(adds_bos=False), Turn("a", "b"), Turn(None, "a")) == [
        ([A], [B, EOS]),
        ([BOS], [A, EOS]),
    ]
    assert encode(make_tokenizer(adds_bos=False, bos=False), Turn(None, "a b")) == [([], [A, B, EOS])]


@pytest.mark.parametrize("response", ["", " \n"])
def test_an_empty_response_stays_empty(response):
    for tokenizer in (make_tokenizer(), make_tokenizer(template=TEMPLATE)):
        ((_, tokens),) = encode(tokenizer, Turn("a", response))
        assert tokens == []


def test_with_a_chat_template():
    tokenizer = make_tokenizer(template=TEMPLATE)
    prompt = [TURN, USER, A, B, END, NEWLINE, TURN, ASSISTANT]
    expected = (prompt, [C, END])
    assert (
        encode(tokenizer, Turn("a b", "c"), Turn([user("a b")], "c"), Turn([user("a b")], assistant("c")))
        == [expected] * 3
    )
    assert encode(tokenizer, Turn("a b", None)) == [(prompt, [])]
    longer = [user("a"), assistant("b"), user("c")]
    ((tokens, response),) = encode(tokenizer, Turn(longer, assistant("d <end>  d \n")))
    assert tokens == [
        TURN,
        USER,
        A,
        END,
        NEWLINE,
        TURN,
        ASSISTANT,
        B,
        END,
        NEWLINE,
        TURN,
        USER,
        C,
        END,
        NEWLINE,
        TURN,
        ASSISTANT,
    ]
    assert response == [D, END, D, NEWLINE, END]


def test_bare_text_is_no_conversation_even_with_a_chat_template():
    assert encode(make_tokenizer(template=TEMPLATE), Turn(None, "a b")) == [([BOS], [A, B, EOS])]


def test_what_follows_the_end_of_turn_is_left_out():
    template = TEMPLATE.replace("<turn> assistant {% endif %}", "<turn> assistant {% else %}</s>{% endif %}")
    tokenizer = make_tokenizer(template=template)
    assert encode(tokenizer, Turn("a", "b"))[0][1] == [B, END]
    # Special tokens at the end of the text itself, and unknown words, are part of the response.
    assert encode(tokenizer, Turn("a", "b <turn>"))[0][1] == [B, TURN, END]
    assert encode(tokenizer, Turn("a", "b what"))[0][1] == [B, IDS["<unk>"], END]


def test_a_tool_call_may_end_otherwise():
    template = TEMPLATE.replace(
        "{{ m.content }} <end>", "{{ m.content or 'd' }} {{ '</s>' if m.tool_calls else '<end>' }}"
    )
    call = {"role": "assistant", "tool_calls": [{"name": "a"}]}
    assert encode(make_tokenizer(template=template), Turn([user("a")], call))[0][1] == [D, EOS]


def test_tokens_are_used_as_they_are():
    tokenizer = make_tokenizer(template=TEMPLATE)
    assert encode(tokenizer, TokenTurn([A], [B, C]), TokenTurn([], [B]), TokenTurn([A], None)) == [
        ([A], [B, C]),
        ([], [B]),
        ([A], []),
    ]
    with pytest.raises(
        DataError, match=f"here: token id {len(WORDS)} is outside the tokenizer's vocabulary of {len(WORDS)}"
    ):
        encode(tokenizer, TokenTurn([A], [len(WORDS)]))


@pytest.mark.parametrize(
    ("tokenizer", "turn", "message"),
    [
        (
            make_tokenizer(),
            Turn([user("a")], assistant("b")),
            "here holds messages, and the tokenizer has no chat template",
        ),
        (make_tokenizer(eos=False), Turn("a", "b"), "here: the tokenizer has no eos_token"),
        (
            make_tokenizer(template="{{ raise_exception('roles must alternate') }}"),
            Turn("a", "b"),
            "here: the chat template refuses this conversation: roles must alternate",
        ),
        (
            make_tokenizer(template=TEMPLATE.replace(" <end>", "")),
            Turn("a", "b"),
            "the chat template puts no special token behind a response",
        ),
        (
            make_tokenizer(template=TEMPLATE.replace("<turn> assistant {% endif %}", "<turn> assistant b {% endif %}")),
            Turn("a", "c"),
            "here: the chat template renders the prompt in another way",
        ),
    ],
)
def test_what_cannot_be_tokenised(tokenizer, turn, message):
    with pytest.raises(DataError, match=message):
        encode(tokenizer, turn)


def test_truncation_worked_by_hand():
    row = make_row([1, 2, 3], [4, 5, 6])
    limits = [((3, 6), ([1, 2, 3], [4, 5, 6])), ((2, 6), ([2, 3], [4, 5, 6])), ((2, 4), ([2, 3], [4, 5]))]
    limits += [((9, 4), ([1, 2, 3], [4])), ((9, 2), ([1, 2], [])), ((1, 2), ([3], [4]))]
    for (max_prompt_length, max_length), expected in limits:
        assert parts(truncate(row, max_prompt_length=max_prompt_length, max_length=max_length)) == expected
    rated = Row(row.tokens, 3, rating=0.0, logprobs=np.array([-1, -2, -3], np.float32))
    cut = truncate(rated, max_prompt_length=2, max_length=4)
    assert cut.rating == 0.0 and cut.logprobs.tolist() == [-1, -2]


def test_targets_of_a_row():
    counts = [
        make_row(*lists).num_targets for lists in (([1, 2], [3, 4]), ([], [3, 4]), ([1], []), ([], [3]), ([], []))
    ]
    assert counts == [2, 1, 0, 0, 0]


def test_tokenizer_folder(tmp_path):
    make_tokenizer(template=TEMPLATE).save_pretrained(tmp_path / "tiny")
    tokenizer = load_tokenizer(tmp_path / "tiny")
    assert encode(tokenizer, Turn("a", "b"))[0][1] == [B, END]
    assert (pad_id(tokenizer), vocab_size(tokenizer), stop_ids(tokenizer)) == (EOS, len(WORDS), {EOS, END})
    assert stop_ids(make_tokenizer()) == {EOS}
    with pytest.raises(DataError, match="no eos_token and no chat template"):
        stop_ids(make_tokenizer(eos=False))
    (tmp_path / "none").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text("{")
    for name, message in (("none", "holds no tokenizer"), ("nowhere", "is no folder"), ("bad", "cannot be read")):
        with pytest.raises(CheckpointError, match=message) as caught:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def qwen(shared_data):
    tokenizer = load_tokenizer(shared_data / "qwen_tokenizer")
    tokenizer.chat_template = (shared_data / "chat_templates" / "qwen2_5.jinja").read_text()
    return tokenizer


@pytest.fixture(scope="module")
def llama3(shared_data):
    """Llama-3's template and word splitting over a vocabulary of bytes (its own is not at hand)."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ")]
    vocab = {token: index for index, token in enumerate([*letters, *map("".join, merges)])}
    inner = Tokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (shared_data / "chat_templates" / "llama3.jinja").read_text()
    return tokenizer


CONVERSATIONS = [
    [user("Hello there"), assistant("General Kenobi! Ünïcödé 🙂")],
    [{"role": "system", "content": "Be brief."}, user("1+1?"), assistant("2"), user(" and\n2+2? "), assistant("4")],
]


@pytest.mark.parametrize(("name", "end", "behind"), [("qwen", "<|im_end|>", "\n"), ("llama3", "<|eot_id|>", "")])
def test_real_templates_give_the_tokens_of_transformers(request, name, end, behind):
    tokenizer = request.getfixturevalue(name)
    for *prompt, answer in CONVERSATIONS:
        ((head, response),) = encode(tokenizer, Turn(prompt, answer))
        whole = tokenizer.apply_chat_template([*prompt, answer], return_dict=False)
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        after = tokenizer(behind, add_special_tokens=False)["input_ids"]
        assert head == start
        assert head + response + after == whole
        assert tokenizer.decode(response) == answer["content"] + end
    assert tokenizer.convert_tokens_to_ids(end) in stop_ids(tokenizer)


def test_a_token_across_the_boundary_is_split(qwen):
    """Qwen's vocabulary has a token for two new lines: one ends the prompt here, and one begins the response."""
    prompt, answer = [user("a")], assistant("\nb")
    start = qwen.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert qwen.apply_chat_template([*prompt, answer], return_dict=False)[: len(start)] != start
    ((head, response),) = encode(qwen, Turn(prompt, answer))
    assert head == start
    assert qwen.decode(response) == "\nb<|im_end|>"


def test_a_response_that_ends_in_white_space_keeps_it(qwen):
    ((_, response),) = encode(qwen, Turn("a", "b \n\n"))
    assert qwen.decode(response) == "b \n\n<|im_end|>"


def test_ultrafeedback_agrees_with_transformers_row_by_row(shared_data, qwen):
    turns = [turn for record in ultrafeedback(shared_data) for turn in read_turns(record, "pairs")]
    newline = qwen("\n", add_special_tokens=False)["input_ids"]
    split_apart = 0
    for turn, (prompt, response) in zip(turns, encode(qwen, *turns), strict=True):
        whole = qwen.apply_chat_template([user(turn.prompt), assistant(turn.response)], return_dict=False)
        split_apart += prompt + response + newline != whole
        assert qwen.decode(response) == turn.response + "<|im_end|>"
    assert split_apart <= sum(turn.response.startswith("\n") for turn in turns)


def test_conversations_of_several_turns_agree_with_transformers(shared_data, request):
    """Real ones, with and without a system turn, token by token on both templates."""
    records = list(load_records(str(shared_data / "llama_factory" / "dpo_en_demo.json")))
    turns = [turn for record in records for turn in read_turns(record, "pairs")][:160]
    roles = {tuple(message["role"] for message in turn.prompt) for turn in turns}
    assert ("system", "user") in roles and ("user", "assistant", "user", "assistant", "user") in roles
    for name, behind in (("qwen", "\n"), ("llama3", "")):
        tokenizer = request.getfixturevalue(name)
        after = tokenizer(behind, add_special_tokens=False)["input_ids"]
        split_apart = 0
        for turn, (prompt, response) in zip(turns, encode(tokenizer, *turns), strict=True):
            assert prompt == tokenizer.apply_chat_template(turn.prompt, add_generation_prompt=True, return_dict=False)
            whole = tokenizer.apply_chat_template([*turn.prompt, turn.response], return_dict=False)
            split_apart += prompt + response + after != whole
        assert split_apart <= sum(turn.response["content"][:1].isspace() for turn in turns)


def test_a_sentencepiece_model_alone_gives_the_tokens_of_sentencepiece(shared_data, tmp_path):
    shutil.copy(shared_data / "stories260K" / "tok512.model", tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer, given = load_tokenizer(tmp_path), load_tokenizer(shared_data / "stories260K" / "hf")
    model = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    texts = [
        "Once upon a time",
        "  two  spaces\nünï 🙂 ",
        *(record.values["prompt"] for record in ultrafeedback(shared_data)),
    ]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == model.encode(text) == given(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == model.decode(ids)
    assert encode(tokenizer, Turn("Once upon", "a time")) == encode(given, Turn("Once upon", "a time"))
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")(texts[1])["input_ids"] == tokenizer(texts[1])["input_ids"]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert load_tokenizer(tmp_path)("a")["input_ids"] == model.encode("a")


def ultrafeedback(shared_data):
    return islice(load_records(str(shared_data / "ultrafeedback" / "train.jsonl")), 40)


def test_tokens_of_a_sentencepiece_model(shared_data):
    tokenizer = load_tokenizer(shared_data / "stories260K" / "hf")
    ((prompt, response),) = encode(tokenizer, Turn("Once upon", "a time"))
    assert prompt == tokenizer("Once upon")["input_ids"] and prompt[0] == tokenizer.bos_token_id
    assert response == tokenizer("a time", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
