"""Servers that speak OpenAI's chat route over real HTTP: answers that are a known function of what was asked.

Run as a script it serves a deterministic model and judge until it is ended, one line a request to a file:
``python tests/suites/servers.py PORT_FILE LOG_FILE [SECONDS]``.
"""

from __future__ import annotations

import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Body = dict[str, Any]
Respond = Callable[["Handler", Body], None]


class Handler(BaseHTTPRequestHandler):
    """Hands each request to the server's `respond`, and lists the server's models."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.send(200, json.dumps({"object": "list", "data": [{"id": name} for name in self.server.models]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.times.append(time.monotonic())
        self.server.respond(self, body)

    def send(self, status: int, text: str, **headers: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def reply(self, text: str, logprobs: dict[str, float] | None = None, finish: str = "stop") -> None:
        self.send(200, completion(text, logprobs, finish))


class Server(ThreadingHTTPServer):
    """A server in a thread of its own; `bodies` and `times` are the requests that it got."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, respond: Respond, models: tuple[str, ...] = ("model", "judge"), port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.respond, self.models = respond, models
        self.bodies: list[Body] = []
        self.times: list[float] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that went away

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def close(self) -> None:
        self.shutdown()
        self.server_close()


def completion(text: str | None, logprobs: dict[str, float] | None = None, finish: str = "stop") -> str:
    """The body of an answer."""
    choice: Body = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if logprobs is not None:
        alternatives = [{"token": token, "logprob": value} for token, value in logprobs.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": alternatives}]}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})


def answer_to(conversation: list[Body]) -> str:
    """The model's answer: its length, headers, lists and bold text depend on the question's length."""
    question = conversation[-1]["content"]
    size = len(question)
    lines = [f"# Answer {size}"] * (size % 2) + [f"- point {number}" for number in range(size % 4)]
    return "\n".join([*lines, *["**bold** word"] * (size % 3), "word " * (size % 40 + 1), f"turn {len(conversation)}"])


def strength(text: str) -> int:
    """What the pairwise judge goes by: words, once each."""
    return len(set(text.split()))


def label(first: str, second: str) -> str:
    """The verdict on two answers, with a leaning to the first: a draw in strength goes to it."""
    gap = strength(first) - strength(second)
    if gap > 20:
        return "A>>B"
    if gap >= 0:
        return "A>B"
    return "A=B" if gap >= -1 else "B>A" if gap >= -20 else "B>>A"


def rating(answer: str) -> int:
    """The grade of one answer."""
    return len(answer) % 10 + 1


def second_probability(first: str, second: str) -> float:
    """P(second is better) for the judge of letters."""
    return 1 / (1 + math.exp((strength(first) - strength(second)) / 10))


def pair_in(text: str) -> tuple[str, str]:
    """The two answers in a judge's prompt, ours, arena-hard-auto's or for letters."""
    for pattern in (
        r"\[Answer A\]\n(.*?)\n\[End of answer A\].*\[Answer B\]\n(.*?)\n\[End of answer B\]",
        r"Assistant A's Answer\|>\n(.*?)\n<\|The End.*Start of Assistant B's Answer\|>\n(.*?)\n<\|The End",
        r"\[Summary A\]\n(.*?)\n\n\[Summary B\]\n(.*)",
        r"<first>(.*?)</first>.*<second>(.*?)</second>",
    ):
        if found := re.search(pattern, text, re.DOTALL):
            return found.group(1), found.group(2)
    raise ValueError(text)


def graded(text: str) -> str:
    """The answer that an MT-Bench prompt wants graded: the last one shown."""
    single = re.findall(r"\[The Start of Assistant's Answer\]\n(.*?)\n\[The End", text, re.DOTALL)
    if single:
        return single[0]
    (shown,) = re.findall(r"### Assistant A:\n(.*?)\n\n<\|The End of Assistant", text, re.DOTALL)
    return shown.split("### Assistant A:\n")[-1]


def respond(handler: Handler, body: Body) -> None:
    """The deterministic model, and the deterministic judge of every suite."""
    text = body["messages"][-1]["content"]
    if body["model"] != "judge":
        handler.reply(answer_to(body["messages"]))
    elif "[rating" in text or "[rating" in body["messages"][0]["content"]:
        handler.reply(f"As asked.\n\nRating: [[{rating(graded(text))}]]")
    elif "logprobs" in body:
        share = second_probability(*pair_in(text))
        logprobs = {"m": math.log(1 - share), "M": math.log(share), "x": -9.0}
        handler.reply(max(logprobs, key=lambda token: logprobs[token]), logprobs)
    elif "[Summary A]" in text:
        verdict = label(*pair_in(text))
        handler.reply(f"So: [[{'C' if '=' in verdict else verdict[0]}]]")
    else:
        handler.reply(f"They differ.\n\nMy verdict: [[{label(*pair_in(text))}]]")


def serve(port_file: Path, log_file: Path, seconds: float) -> None:
    """Serve, slowly, in this process."""
    log = log_file.open("a")

    def logged(handler: Handler, body: Body) -> None:
        time.sleep(seconds)
        with handler.server.lock:
            log.write(json.dumps([body["model"], body["messages"]]) + "\n")
            log.flush()
        respond(handler, body)

    server = Server(logged)
    port_file.write_text(server.url)
    threading.Event().wait()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
