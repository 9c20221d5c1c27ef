"""`aligndistil serve` as clients meet it: real processes, and the `openai` package on the other end."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_aligndistil.commands.http.server import bind
from megatron_aligndistil.commands.serve import ServeConfig, _max_length, _one_replica, run
from megatron_aligndistil.config import ParallelConfig
from megatron_aligndistil.errors import ConfigError
from tests.commands.server import PROMPT, ROOT, Server, complete, streamed, texts
from tests.engine.tiny import make_checkpoint

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
LIMITS = ["--batch_size", "4", "--max_queue", "8", "--max_new_tokens", "12"]
LENGTH = 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with room for long answers and a chat template."""
    folder = tmp_path_factory.mktemp("serve")
    make_checkpoint("llama-tied", folder / "tiny", max_position_embeddings=LENGTH)
    path = folder / "tiny" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def stories(folder: Path) -> Path:
    """A model that has learned to write, where it is at hand."""
    found = Path(os.environ.get("ALIGNDISTIL_DATA", ROOT.parent / "shared" / "data")) / "stories260K" / "hf"
    return found if found.is_dir() else folder / "tiny"


@pytest.fixture(scope="module")
def servers(folder: Path, stories: Path) -> Iterator[Callable[[str], Server]]:
    """Two servers of two processes each, by name; one that a test has ended is started again."""
    commands = {
        "tiny": ["--model", str(folder / "tiny"), "--name", "tiny", "--parallel.pp", "2", *LIMITS],
        "stories": ["--model", str(stories), "--name", "stories", "--parallel.tp", "2", *LIMITS],
    }
    started: dict[str, Server] = {name: Server(folder, *command) for name, command in commands.items()}

    def get(name: str) -> Server:
        if started[name].process.poll() is not None:
            started[name] = Server(folder, *commands[name])
        return started[name]

    yield get
    for server in started.values():
        server.close()


@pytest.fixture
def tiny(servers: Callable[[str], Server]) -> Server:
    return servers("tiny")


@pytest.fixture
def story(servers: Callable[[str], Server]) -> Server:
    return servers("stories")


def test_it_says_what_it_serves(tiny: Server) -> None:
    assert re.fullmatch(r"serving tiny at http://127\.0\.0\.1:\d+/v1: 4 rows, .* 4096 tokens\n", tiny.ready)
    assert [model.id for model in tiny.client.models.list()] == ["tiny"]
    assert tiny.num_running() == 0


def test_greedy_answers_are_those_of_transformers(story: Server, stories: Path) -> None:
    """Text, log-probabilities and counts, whole and streamed."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    model = AutoModelForCausalLM.from_pretrained(stories).eval()
    prompt = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        row = model.generate(prompt, do_sample=False, max_new_tokens=40, pad_token_id=0)[0]
        logprobs = model(row[None]).logits[0].double().log_softmax(-1)[:-1].gather(1, row[1:, None])[:, 0]
    before = tokenizer.decode(prompt[0], skip_special_tokens=True)
    expected = tokenizer.decode(row, skip_special_tokens=True).removeprefix(before)

    ask = {"model": "stories", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 40}
    answer = story.client.completions.create(**ask, logprobs=0)
    (choice,) = answer.choices
    count = len(row) - prompt.shape[1]
    assert choice.text == expected
    assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens"}) == {
        "prompt_tokens": prompt.shape[1],
        "completion_tokens": count,
    }
    found = torch.tensor(choice.logprobs.token_logprobs, dtype=torch.float64)
    torch.testing.assert_close(found, logprobs[-count:], rtol=0, atol=1e-4)
    assert "".join(choice.logprobs.tokens) == expected
    assert all(
        expected[offset:].startswith(token)
        for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
    )

    chunks = list(
        story.client.completions.create(**ask, logprobs=0, stream=True, stream_options={"include_usage": True})
    )
    assert streamed(chunks) == ({0: expected}, {0: choice.finish_reason})
    assert len(chunks) > 5 and chunks[-1].usage == answer.usage
    pieces = [each.logprobs.tokens for chunk in chunks for each in chunk.choices]
    assert sum(pieces, []) == choice.logprobs.tokens


def test_text_ends_where_a_stop_string_begins(story: Server, stories: Path) -> None:
    """At a boundary of tokens or not; what only begins like one is not lost."""
    ask = {"model": "stories", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 20}
    whole = story.client.completions.create(**ask).choices[0].text
    middle = whole[len(whole) // 2 - 2 : len(whole) // 2 + 3]
    for stop, expected, reason in (
        ([middle], whole[: whole.find(middle)], "stop"),
        ([middle + "never", "nor this"], whole, "length"),
        ([whole[-1:] + "never", middle], whole[: whole.find(middle)], "stop"),
    ):
        choice = story.client.completions.create(**ask, stop=stop).choices[0]
        assert (choice.text, choice.finish_reason) == (expected, reason)
        found = streamed(story.client.completions.create(**ask, stop=stop, stream=True))
        assert found == ({0: expected}, {0: reason})
    assert story.client.completions.create(**ask, stop=middle).choices[0].text == whole[: whole.find(middle)]


def test_hot_answers_stream_as_they_are_whole(story: Server) -> None:
    """At a high temperature the model writes bytes that make no characters, and some that do."""
    ask = {"model": "stories", "prompt": "One day", "temperature": 2, "max_tokens": 16, "n": 4, "seed": 3}
    whole = story.client.completions.create(**ask)
    found, reasons = streamed(story.client.completions.create(**ask, stream=True))
    assert [found[index] for index in range(4)] == texts(whole)
    assert [reasons[index] for index in range(4)] == [choice.finish_reason for choice in whole.choices]


def test_a_prompt_may_be_text_or_tokens_one_or_many(tiny: Server) -> None:
    ids = [5, 9, 40]
    (expected,) = texts(complete(tiny, temperature=0))
    assert expected
    for prompt in (PROMPT, [PROMPT], ids, [ids]):
        answer = complete(tiny, prompt, temperature=0)
        assert texts(answer) == [expected] and answer.usage.prompt_tokens == 3
    answer = complete(tiny, [ids, [7], ids], temperature=0)
    assert texts(answer) == [expected, *texts(complete(tiny, [7], temperature=0)), expected]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and answer.usage.prompt_tokens == 7
    assert texts(complete(tiny, ids, temperature=0, echo=True)) == [PROMPT + expected]
    # Another client's null, and what has no effect here.
    assert texts(complete(tiny, temperature=0, stop=None, user="me", presence_penalty=0.0)) == [expected]


def test_chat_is_the_template_and_then_a_completion(tiny: Server, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    messages = [{"role": "system", "content": "w3"}, {"role": "user", "content": PROMPT}]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))["input_ids"]
    expected = complete(tiny, ids, seed=2, logprobs=1)
    chat = tiny.client.chat.completions.create
    answer = chat(model="tiny", messages=messages, seed=2, logprobs=True)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == texts(expected)[0]
    assert (answer.usage, choice.finish_reason) == (expected.usage, expected.choices[0].finish_reason)
    logprobs = expected.choices[0].logprobs
    assert [token.logprob for token in choice.logprobs.content] == logprobs.token_logprobs
    assert answer.usage.completion_tokens == len(choice.logprobs.content) <= 12  # max_new_tokens of the server

    parts = [{"role": "system", "content": "w3"}, {"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    chunks = list(chat(model="tiny", messages=parts, seed=2, n=2, max_completion_tokens=12, stream=True))
    found, reasons = streamed(chunks)
    assert found[0] == choice.message.content and reasons[0] == choice.finish_reason and len(found) == 2
    assert all(choice.delta.role == "assistant" for choice in chunks[0].choices)


def test_a_seed_gives_the_same_choices_and_none_gives_others(tiny: Server) -> None:
    three = texts(complete(tiny, n=3, seed=11))
    assert len(set(three)) == 3
    assert texts(complete(tiny, n=2, seed=11)) == three[:2]
    assert texts(complete(tiny, [[7], [5, 9, 40]], n=2, seed=11))[2:] == three[:2]
    assert texts(complete(tiny, n=3, seed=-11)) != three
    assert len(set(texts(complete(tiny, [PROMPT, PROMPT]))) | set(texts(complete(tiny)))) == 3


def test_requests_in_one_batch_do_not_touch_each_other(tiny: Server) -> None:
    """More than the rows take, of different prompts, lengths and settings: each as if it were alone."""
    settings: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 2, "temperature": 0.7, "max_tokens": 3},
        {"seed": 3, "top_p": 0.5},
        {"seed": 4, "extra_body": {"top_k": 5}},
        {"seed": 5, "prompt": [8] * 60, "max_tokens": 5},
        {"seed": 6, "prompt": [[9], [10, 11]], "max_tokens": 7},
        {"seed": 7, "stop": ["w1", "w2"]},
        {"seed": 8, "n": 2},
    ]
    alone = [texts(complete(tiny, **each)) for each in settings]
    with ThreadPoolExecutor(len(settings)) as pool:
        together = list(pool.map(lambda each: texts(complete(tiny, **each)), settings))
    assert together == alone
    assert tiny.num_running() == 0


COMPLETION = {"model": "tiny", "prompt": PROMPT}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "w5"}]}
WRONG: list[tuple[dict[str, Any], dict[str, Any], int, str, str]] = [
    (COMPLETION, {"model": "other"}, 404, "model", "this server has 'tiny'"),
    (CHAT, {"model": "other"}, 404, "model", "this server has 'tiny'"),
    (COMPLETION, {"prompt": None}, 400, "prompt", "needs prompt"),
    (COMPLETION, {"prompt": []}, 400, "prompt", "a list of texts"),
    (COMPLETION, {"prompt": [1, "a"]}, 400, "prompt", "a list of texts"),
    (COMPLETION, {"prompt": [600]}, 400, "prompt", "600 is outside the model's vocabulary of 515"),
    (COMPLETION, {"max_tokens": 4094}, 400, "max_tokens", "3 tokens and an answer of up to 4094 make 4097"),
    (COMPLETION, {"prompt": [5] * 4096}, 400, "max_tokens", "this server takes 4096"),
    (COMPLETION, {"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    (COMPLETION, {"temperature": -0.5}, 400, "temperature", "greater than or equal to 0 (given: -0.5)"),
    (COMPLETION, {"temperature": "hot"}, 400, "temperature", "hot"),
    (COMPLETION, {"top_p": 0}, 400, "top_p", "greater than 0"),
    (COMPLETION, {"n": 13}, 400, "n", "13 answers are asked for at once, and this server takes 12"),
    (COMPLETION, {"stop": ""}, 400, "stop.0", "at least 1 character"),
    (COMPLETION, {"logprobs": 5}, 400, "logprobs", "not for others"),
    (COMPLETION, {"logprobs": 1, "echo": True}, 400, "echo", "log-probabilities of the prompt"),
    (COMPLETION, {"best_of": 3}, 400, "best_of", "not offered"),
    (COMPLETION, {"logit_bias": {"5": 1}}, 400, "logit_bias", "not offered"),
    (COMPLETION, {"frequency_penalty": 0.5}, 400, "frequency_penalty", "not offered"),
    (COMPLETION, {"max_token": 5}, 400, "max_token", "not a parameter that this server knows"),
    (COMPLETION, {"stream_options": {"include_usage": True}}, 400, "stream_options", "together with stream"),
    (CHAT, {"messages": []}, 400, "messages", "at least 1 item"),
    (CHAT, {"messages": [{"content": "w5"}]}, 400, "messages.0.role", "needs messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content", "text"),
    (CHAT, {"top_logprobs": 2, "logprobs": True}, 400, "top_logprobs", "not for others"),
    (CHAT, {"tools": [{"type": "function"}]}, 400, "tools", "not offered"),
    (CHAT, {"response_format": {"type": "json_object"}}, 400, "response_format", "not offered"),
]


def test_a_wrong_request_is_told_what_is_wrong(tiny: Server) -> None:
    for body, change, status, param, message in WRONG:
        route = "chat/completions" if body is CHAT else "completions"
        found, answer, _ = tiny.post(route, json.dumps(body | change).encode())
        error = answer["error"]
        assert (found, error["param"]) == (status, param), answer
        assert message in error["message"] and error["type"] == "invalid_request_error", answer
    for body in (b"{", b"\xff", b"[1]", b""):
        found, answer, _ = tiny.post("completions", body)
        assert found == 400 and "JSON" in answer["error"]["message"]
    assert tiny.post("embeddings", b"{}")[0] == 404
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        tiny.client.completions.create(model="other", prompt="w5")
    assert tiny.num_running() == 0


def test_a_model_without_a_chat_template_takes_no_messages(story: Server, stories: Path) -> None:
    if stories.name == "tiny":
        pytest.skip("stories260K is not at hand, and the tiny model has a template")
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        story.client.chat.completions.create(model="stories", messages=[{"role": "user", "content": "a"}])


def wait_until_idle(server: Server) -> None:
    end = time.monotonic() + 20
    while server.num_running():
        assert time.monotonic() < end, "the answers go on without their client"
        time.sleep(0.05)


def test_a_full_queue_sends_clients_away_until_others_have_left(tiny: Server) -> None:
    long: dict[str, Any] = {"temperature": 0, "max_tokens": LENGTH - 10}
    stream = complete(tiny, n=8, stream=True, **long)
    next(iter(stream))
    assert tiny.num_running() == 8
    status, answer, headers = tiny.post("completions", json.dumps(COMPLETION | {"n": 5}).encode())
    assert (
        status == 429 and int(headers["Retry-After"]) > 0 and "8 answers are in progress" in answer["error"]["message"]
    )
    stream.close()
    wait_until_idle(tiny)

    with pytest.raises(openai.APITimeoutError):  # a client that does not wait for the whole answer
        complete(tiny, n=8, timeout=1, **long)
    wait_until_idle(tiny)
    assert texts(complete(tiny, seed=1)) == texts(complete(tiny, seed=1))


def test_a_signal_ends_all_processes_cleanly(story: Server) -> None:
    stream = iter(story.client.completions.create(model="stories", prompt="One", max_tokens=500, stream=True, seed=0))
    next(stream)
    story.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="the server is ending"):
        list(stream)
    assert story.process.wait(30) == 0, story.log()  # after a second or two where the machine is not busy
    assert story.log() == ""


def test_a_failure_of_one_process_ends_the_server_and_is_told(tiny: Server) -> None:
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(complete, tiny, temperature=0, max_tokens=LENGTH - 10)
        while not tiny.num_running():
            time.sleep(0.02)
        os.kill(process_of_rank(1, tiny), signal.SIGKILL)
        with pytest.raises(openai.InternalServerError, match="the engine has failed"):
            waiting.result()
    assert tiny.process.wait(30) == 128 + signal.SIGKILL
    assert "the process of rank 1 was ended by SIGKILL" in tiny.log()


def process_of_rank(rank: int, server: Server) -> int:
    pid = server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    wanted = f"RANK={rank}".encode()
    return next(int(child) for child in children if wanted in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"))


def test_what_cannot_be_served_is_said() -> None:
    config = ServeConfig(model="anything", max_length=5000)
    with pytest.raises(ConfigError, match="max_length 5000 is more than the model.s 4096 positions"):
        _max_length(config, 4096)
    assert _max_length(config, 8192) == 5000 and _max_length(ServeConfig(model="anything"), 512) == 512
    with pytest.raises(ConfigError, match="4 processes make 2 replicas of the model .* start one server a replica"):
        _one_replica(ParallelConfig(tp=2), dp=2)
    with bind("127.0.0.1", 0) as place:
        place.listen()
        port = place.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot serve at 127.0.0.1:{port}: .* give another --host or --port"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="cannot serve at no-such-host.invalid:0"):
        bind("no-such-host.invalid", 0)


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ConfigError, match="needs fastapi; install the extra `serve`"):
        run(["--model", "anything"])
