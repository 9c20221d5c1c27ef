"""The client against servers that misbehave, over real HTTP: everything is survived, or counted."""

from __future__ import annotations

import email.utils
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.suites.asks import Ask, Reply, user
from megatron_aligndistil.suites.client import Endpoint, ask_all, check, retry_after
from tests.suites.servers import Body, Handler, Respond, Server, completion


def asks(count: int) -> list[Ask]:
    return [Ask(str(number), (user(f"question {number}"),), 0.0, 10) for number in range(count)]


@pytest.fixture
def serve() -> Iterator[Callable[[Respond], Server]]:
    """Starts servers, and ends them after the test."""
    servers: list[Server] = []

    def start(respond: Respond) -> Server:
        servers.append(Server(respond))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def endpoint(server: Server, **settings: Any) -> Endpoint:
    return Endpoint(server.url, "model", **{"backoff": 0.02, "timeout": 5.0, "concurrency": 4, **settings})


def collect(where: Endpoint, wanted: list[Ask]) -> tuple[dict[str, Reply], list]:
    replies: dict[str, Reply] = {}
    failures = ask_all(where, wanted, lambda ask, reply: replies.update({ask.id: reply}))
    return replies, failures


def cut_off(handler: Handler) -> None:
    """The first half of a body, and then nothing."""
    body = completion("never whole").encode()
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


FAULTS: dict[str, Callable[[Handler], None]] = {
    "500": lambda handler: handler.send(500, "boom"),
    "429": lambda handler: handler.send(429, json.dumps({"error": {"message": "slower"}}), Retry_After="0.2"),
    "slow": lambda handler: time.sleep(1.0),
    "cut off": cut_off,
    "half a body": lambda handler: handler.send(200, completion("never whole")[:30]),
    "not JSON": lambda handler: handler.send(200, "<html>busy</html>"),
    "empty": lambda handler: handler.send(200, ""),
    "no choices": lambda handler: handler.send(200, '{"choices": []}'),
    "another form": lambda handler: handler.send(200, '{"choices": [{"message": "text"}]}'),
}


def test_every_fault_is_survived(serve: Callable[[Respond], Server]) -> None:
    """Each question meets every fault once, in an order of its own, before it is answered."""
    met: Counter[str] = Counter()

    def respond(handler: Handler, body: Body) -> None:
        question = body["messages"][0]["content"]
        with handler.server.lock:
            met[question] += 1
            attempt = met[question] - 1 + 2 * int(question.split()[1])
        if met[question] > len(FAULTS):
            handler.reply(f"answer to {question}")
        else:
            list(FAULTS.values())[attempt % len(FAULTS)](handler)

    server = serve(respond)
    replies, failures = collect(endpoint(server, timeout=0.6, retries=len(FAULTS), backoff=0.002), asks(3))
    assert failures == []
    assert {name: reply.text for name, reply in replies.items()} == {
        str(n): f"answer to question {n}" for n in range(3)
    }
    assert replies["0"] == Reply("answer to question 0", "stop", 7, 3)
    assert set(met.values()) == {len(FAULTS) + 1}


@pytest.mark.parametrize("fault", [name for name in FAULTS if name not in ("slow", "429")])
def test_a_fault_that_stays_is_counted(serve: Callable[[Respond], Server], fault: str) -> None:
    def respond(handler: Handler, body: Body) -> None:
        if body["messages"][0]["content"] == "question 1":
            FAULTS[fault](handler)
        else:
            handler.reply("fine")

    replies, failures = collect(endpoint(serve(respond), retries=1), asks(4))
    assert sorted(replies) == ["0", "2", "3"] and [failure.id for failure in failures] == ["1"]
    assert failures[0].reason


def test_retry_after_holds_up_every_request(serve: Callable[[Respond], Server]) -> None:
    limited = threading.Event()

    def respond(handler: Handler, body: Body) -> None:
        if not limited.is_set():
            limited.set()
            handler.send(429, "{}", Retry_After="1")
        else:
            handler.reply("fine")

    server = serve(respond)
    replies, failures = collect(endpoint(server, concurrency=1, retries=0), asks(3))
    assert len(replies) == 3 and failures == []  # a rate limit is no failed attempt
    assert len(server.times) == 4 and server.times[1] - server.times[0] >= 1.0


def test_retry_after() -> None:
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert retry_after("2.5") == 2.5 and retry_after(soon) == pytest.approx(30, abs=2)
    assert [retry_after(text) for text in (None, "", "soon", "-3")] == [None, None, None, 0.0]


def test_an_empty_answer_is_an_answer(serve: Callable[[Respond], Server]) -> None:
    server = serve(lambda handler, body: handler.send(200, completion("" if "0" in str(body["messages"]) else None)))
    replies, failures = collect(endpoint(server), asks(2))
    assert [reply.text for reply in replies.values()] == ["", ""] and failures == [] and len(server.bodies) == 2


def test_a_refused_request_is_not_repeated(serve: Callable[[Respond], Server]) -> None:
    def respond(handler: Handler, body: Body) -> None:
        if "question 2" in str(body):
            handler.send(400, json.dumps({"error": {"message": "the prompt is too long"}}))
        else:
            handler.reply("fine")

    server = serve(respond)
    replies, failures = collect(endpoint(server), asks(3))
    assert sorted(replies) == ["0", "1"] and len(server.bodies) == 3
    assert failures[0].id == "2" and "the prompt is too long" in failures[0].reason


@pytest.mark.parametrize(
    ("status", "error"), [(401, {}), (404, {}), (429, {"code": "insufficient_quota"})], ids=["key", "route", "quota"]
)
def test_what_is_hopeless_ends_at_once(serve: Callable[[Respond], Server], status: int, error: dict) -> None:
    body = json.dumps({"error": {"message": "not with us", **error}})
    server = serve(lambda handler, _: handler.send(status, body))
    with pytest.raises(ConfigError, match=f"refuses requests to model: {status} not with us"):
        collect(endpoint(server, concurrency=2), asks(50))
    assert len(server.bodies) <= 2


def test_a_server_that_goes_away_is_given_up(serve: Callable[[Respond], Server]) -> None:
    def respond(handler: Handler, body: Body) -> None:
        if len(handler.server.bodies) <= 2:
            handler.reply("fine")
        else:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)

    server = serve(respond)
    replies: dict[str, Reply] = {}
    with pytest.raises(ConfigError, match="has stopped answering .* run the same command again"):
        ask_all(endpoint(server, retries=1), asks(50), lambda ask, reply: replies.update({ask.id: reply}))
    assert len(replies) == 2 and len(server.bodies) < 30


def test_so_many_requests_at_a_time_and_what_they_say(serve: Callable[[Respond], Server]) -> None:
    under_way, most = [0], [0]

    def respond(handler: Handler, body: Body) -> None:
        with handler.server.lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.05)
        with handler.server.lock:
            under_way[0] -= 1
        handler.reply("M", {"m": -2.0, "M": -0.2})

    server = serve(respond)
    wanted = [Ask(str(number), (user("hello"),), 0.5, 9, top_logprobs=2, top_p=0.9, seed=4) for number in range(12)]
    replies, _ = collect(endpoint(server, concurrency=3), wanted)
    assert len(replies) == 12 and most[0] == 3
    assert replies["0"].first_token == {"m": -2.0, "M": -0.2}
    settings = {"model": "model", "temperature": 0.5, "max_tokens": 9, "top_p": 0.9, "seed": 4}
    assert server.bodies[0] == settings | {"messages": [user("hello")], "logprobs": True, "top_logprobs": 2}


def test_check(serve: Callable[[Respond], Server]) -> None:
    server = serve(lambda handler, body: handler.reply("fine"))
    check(endpoint(server))
    with pytest.raises(ConfigError, match="has no model other; it has model, judge"):
        check(Endpoint(server.url, "other"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ConfigError, match=f"nothing answers at {url} .*is the server running"):
        check(Endpoint(url, "model"))
    with pytest.raises(ConfigError, match="nothing answers at http://no.such.host.invalid/v1"):
        check(Endpoint("http://no.such.host.invalid/v1", "model"))
    with pytest.raises(ConfigError, match="nothing answers at nonsense"):
        check(Endpoint("nonsense", "model"))
