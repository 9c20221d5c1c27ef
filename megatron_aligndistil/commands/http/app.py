"""The routes: GET /health, GET /v1/models, POST /v1/completions, POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from megatron_aligndistil.commands.http.answers import Answers, Choice, Running, ToText
from megatron_aligndistil.commands.http.errors import ApiError, bad_request
from megatron_aligndistil.commands.http.requests import ChatRequest, CompletionRequest, GenerationRequest, parse
from megatron_aligndistil.commands.http.responses import ChatShape, CompletionShape, Shape, joined, usage
from megatron_aligndistil.errors import DataError

Result = TypeVar("Result")


class Prompts(Protocol):
    """Prompts -> tokens; raises DataError for what cannot be one."""

    def text(self, text: str) -> list[int]: ...

    def tokens(self, tokens: list[int]) -> list[int]: ...

    def messages(self, messages: list[dict[str, Any]]) -> list[int]: ...


@dataclass(frozen=True)
class Served:
    """The model that is served.

    Attributes:
        name: by which clients ask for it.
        max_length: longest prompt and answer together, in tokens.
        max_new_tokens: longest answer where the client does not say.
    """

    name: str
    max_length: int
    max_new_tokens: int
    prompts: Prompts
    to_text: ToText


def make_app(served: Served, answers: Answers) -> FastAPI:
    """The application; every error that it answers with is in OpenAI's form."""
    app = FastAPI(title="aligndistil", openapi_url=None)
    began = int(time.time())

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        told = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(told.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        told = ApiError(500, f"the server has a fault: {type(error).__name__}; its log says more")
        return JSONResponse(told.body(), told.status)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "answers_in_progress": answers.num_running}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": served.name, "object": "model", "created": began, "owned_by": "aligndistil"}
        return {"object": "list", "data": [{**model, "max_model_len": served.max_length}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        wanted = parse(CompletionRequest, await request.body(), served.name)
        if wanted.echo and wanted.logprobs is not None:
            raise bad_request(
                "echo with logprobs asks for log-probabilities of the prompt, which are not offered; leave one out",
                "echo",
                "unsupported_parameter",
            )
        choices: list[Choice] = []
        for prompt in wanted.prompt:
            with _refused("prompt"):
                tokens, text = _read(served, prompt)
            choices += _choices(served, wanted, tokens, text if wanted.echo else "")
        return await _respond(request, wanted, choices, answers, CompletionShape(served.name, wanted.wants_logprobs))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        wanted = parse(ChatRequest, await request.body(), served.name)
        messages = [message.model_dump(exclude_none=True) for message in wanted.messages]
        with _refused("messages"):
            tokens = served.prompts.messages(messages)
        choices = _choices(served, wanted, tokens, "")
        return await _respond(request, wanted, choices, answers, ChatShape(served.name, wanted.wants_logprobs))

    return app


@contextmanager
def _refused(param: str) -> Iterator[None]:
    """An ApiError about `param` for the DataError of a prompt that cannot be used."""
    try:
        yield
    except DataError as error:
        raise bad_request(str(error), param) from None


def _read(served: Served, prompt: str | list[int]) -> tuple[list[int], str]:
    """The tokens and the text of a prompt that is given as one of them."""
    if isinstance(prompt, str):
        return served.prompts.text(prompt), prompt
    return served.prompts.tokens(prompt), served.to_text(prompt)


def _choices(served: Served, wanted: GenerationRequest, prompt: list[int], opening: str) -> list[Choice]:
    """The answers that are asked for to one prompt. Raises ApiError where they do not fit."""
    room = served.max_length - len(prompt)
    length = wanted.new_tokens or max(min(served.max_new_tokens, room), 1)
    if length > room:
        raise bad_request(
            f"a prompt of {len(prompt)} tokens and an answer of up to {length} make {len(prompt) + length}, and this "
            f"server takes {served.max_length}; shorten the prompt or lower max_tokens",
            "max_tokens",
            "context_length_exceeded",
        )
    seed = secrets.randbits(32) if wanted.seed is None else wanted.seed
    return [
        Choice(
            prompt,
            opening,
            length,
            seed,
            stream,
            wanted.temperature,
            max(wanted.top_k, 0),
            wanted.top_p,
            tuple(wanted.stop),
        )
        for stream in range(wanted.n)
    ]


async def _respond(
    request: Request, wanted: GenerationRequest, choices: list[Choice], answers: Answers, shape: Shape
) -> Response:
    """The answer to a request that has been understood."""
    num_prompt = sum(len(choice.prompt) for choice in choices if choice.stream == 0)
    running = answers.start(choices)
    if wanted.stream:
        with_usage = wanted.stream_options is not None and wanted.stream_options.include_usage
        return _Stream(_events(running, shape, num_prompt, with_usage), running)
    try:
        body = await _unless_gone(request, _whole(running, shape, num_prompt))
    finally:
        running.close()
    return Response(status_code=499) if body is None else JSONResponse(body)  # 499: nobody is there to read it


async def _whole(running: Running, shape: Shape, num_prompt: int) -> dict[str, Any]:
    parts = [part async for part in running.parts()]
    return shape.whole(joined(parts), usage(num_prompt, running.num_tokens))


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What `work` gives; None where the client leaves first, and the work with it."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def _events(running: Running, shape: Shape, num_prompt: int, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: chunks, the counts where they are wanted, and the end."""
    try:
        if opening := shape.opening(len(running.keys)):
            yield _event(shape.chunk(opening))
        async for part in running.parts():
            yield _event(shape.chunk([shape.chunk_choice(part)]))
        if with_usage:
            yield _event(shape.chunk([], usage(num_prompt, running.num_tokens)))
    except ApiError as error:  # too late for a status of its own
        yield _event(error.body())
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _Stream(StreamingResponse):
    """A stream of answers, which are given up when it ends early: when the client has left."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], running: Running) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.close()
