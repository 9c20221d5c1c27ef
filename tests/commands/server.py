"""A real server process, and what clients ask of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai

from megatron_aligndistil.commands.launch import JOB_VARIABLES

ROOT = Path(__file__).parents[2]
PROMPT = "w5 w9 w40"


class Server:
    """A server process; the first line that it prints says where it is."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
        self._log = (folder / f"log{time.monotonic_ns()}").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_aligndistil", "serve", "--port", "0", *arguments],
            env={**environment, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._ready = ""

    @property
    def ready(self) -> str:
        """The line that says that it is ready, once it is."""
        assert self.process.stdout is not None
        self._ready = self._ready or self.process.stdout.readline()
        assert self._ready, self.log()
        return self._ready

    @property
    def url(self) -> str:
        return re.findall(r"http://\S+/v1", self.ready)[0]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    def log(self) -> str:
        return Path(self._log.name).read_text()

    def post(self, route: str, body: bytes) -> tuple[int, dict[str, Any], Any]:
        """Status, JSON and headers of the answer to a body that no client would send."""
        request = urllib.request.Request(f"{self.url}/{route}", body)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, json.load(error), error.headers

    def num_running(self) -> int:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/health", timeout=60) as answer:
            return json.load(answer)["answers_in_progress"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


def complete(server: Server, prompt: Any = PROMPT, **settings: Any) -> Any:
    return server.client.completions.create(model="tiny", prompt=prompt, **settings)


def texts(answer: Any) -> list[str]:
    return [choice.text for choice in answer.choices]


def streamed(chunks: Any) -> tuple[dict[int, str], dict[int, str]]:
    """Texts and finish reasons of a stream, by the index of the choice."""
    found: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            text = choice.text if hasattr(choice, "text") else choice.delta.content or ""
            assert choice.index not in reasons, "nothing comes behind the end"
            found[choice.index] = found.get(choice.index, "") + text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return found, reasons
