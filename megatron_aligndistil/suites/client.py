"""Asking an OpenAI-compatible endpoint: many requests at a time, and none given up because the other side stumbled."""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.suites.asks import Ask, Failure, Reply, plain_text

_LONGEST_WAIT = 60.0  # seconds between attempts where the other side does not say
_RATE_LIMITED_MORE = 10  # so many times as often as other failures is a rate limit waited for
_GIVEN_UP_AFTER = 4  # failed requests in a row, or as many as are under way at a time
_TO_TRY_AGAIN = {408, 409, 425, 429}
_HOPELESS = {401, 403, 404}  # what every other request would be told as well


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and how patiently.

    Attributes:
        url: base, as in http://host:8000/v1.
        model: the name of the model there.
        route: "chat", or "completions" with the conversation as bare text, for models without a chat template.
        concurrency: requests under way at a time.
        timeout: seconds one attempt may take.
        retries: attempts after the first, for each request.
        backoff: seconds before the second attempt, doubled for each one after.
    """

    url: str
    model: str
    api_key: str = "none"
    route: Literal["chat", "completions"] = "chat"
    concurrency: int = 16
    timeout: float = 600.0
    retries: int = 6
    backoff: float = 0.5


class _Again(Exception):
    """An attempt that may succeed another time; `wait` is what the other side asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None, limited: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.limited = wait, limited


class _Refused(Exception):
    """This request will not be answered, whatever becomes of others."""


def check(endpoint: Endpoint) -> None:
    """Raise ConfigError where nothing answers at the endpoint, or its list of models lacks the model.

    Endpoints without a list of models pass.
    """
    openai = import_openai()
    client = openai.OpenAI(
        base_url=endpoint.url, api_key=endpoint.api_key, max_retries=1, timeout=min(endpoint.timeout, 30)
    )
    try:
        body = json.loads(client.models.with_raw_response.list().http_response.text)
        known = [str(entry["id"]) for entry in body["data"]]
    except openai.APITimeoutError as error:
        raise ConfigError(f"{endpoint.url} does not answer in time; is this the address of the server?") from error
    except openai.APIConnectionError as error:
        reason = error.__cause__ or error
        raise ConfigError(
            f"nothing answers at {endpoint.url} ({reason}); is the server running, and this its address?"
        ) from error
    except openai.APIStatusError as error:
        if error.status_code in (401, 403):
            raise ConfigError(f"{endpoint.url} refuses the API key ({_said(error)})") from error
        return
    except (ValueError, KeyError, TypeError):
        return  # no such list; the first request will tell
    finally:
        client.close()
    if endpoint.model not in known:
        raise ConfigError(f"{endpoint.url} has no model {endpoint.model}; it has {', '.join(known) or 'none'}")


def import_openai() -> Any:
    """The `openai` package. Raises ConfigError where it is not installed."""
    try:
        import openai
    except ImportError as error:
        raise ConfigError(
            "asking an endpoint needs the package openai; install the extra `eval`: pip install -e '.[eval]'"
        ) from error
    return openai


def ask_all(endpoint: Endpoint, asks: Sequence[Ask], on_reply: Callable[[Ask, Reply], None]) -> list[Failure]:
    """Ask everything; `on_reply` gets each reply as it comes. Returns what got none.

    Rate limits (429) hold up all requests for as long as Retry-After says. Server errors, time-outs, broken connections
    and bodies that are no reply are tried again, after waits that double each time. A request that is refused (400, as
    too long, say) is a failure at once.

    Raises ConfigError where no request can succeed (wrong key, wrong route, a model that is not there), and where the
    endpoint has stopped answering; replies that came before have been handed over.
    """
    return asyncio.run(_Run(endpoint, asks, on_reply).all())


class _Run:
    def __init__(self, endpoint: Endpoint, asks: Sequence[Ask], on_reply: Callable[[Ask, Reply], None]) -> None:
        self._openai = import_openai()
        self._endpoint, self._on_reply = endpoint, on_reply
        self._waiting = deque(asks)
        self._failures: list[Failure] = []
        self._failed_in_a_row = 0
        self._held_until = 0.0  # on time.monotonic's clock

    async def all(self) -> list[Failure]:
        endpoint = self._endpoint
        self._client = self._openai.AsyncOpenAI(
            base_url=endpoint.url, api_key=endpoint.api_key, max_retries=0, timeout=endpoint.timeout
        )
        async with self._client:
            workers = [asyncio.create_task(self._work()) for _ in range(min(endpoint.concurrency, len(self._waiting)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return self._failures

    async def _work(self) -> None:
        while self._waiting:
            ask = self._waiting.popleft()
            try:
                reply = await self._patiently(ask)
            except _Refused as error:
                self._failures.append(Failure(ask.id, str(error)))
            except _Again as error:
                self._failures.append(Failure(ask.id, str(error)))
                self._failed_in_a_row += 1
                if self._failed_in_a_row >= max(self._endpoint.concurrency, _GIVEN_UP_AFTER):
                    raise ConfigError(
                        f"{self._endpoint.url} has stopped answering ({error}); what it said before is kept: run the "
                        "same command again when it is back"
                    ) from None
            else:
                self._failed_in_a_row = 0
                self._on_reply(ask, reply)

    async def _patiently(self, ask: Ask) -> Reply:
        failed = limited = 0
        while True:
            while (wait := self._held_until - time.monotonic()) > 0:
                await asyncio.sleep(wait + random.uniform(0, 0.05))
            try:
                async with asyncio.timeout(self._endpoint.timeout):
                    return read_reply(await self._post(ask), self._endpoint.route)
            except TimeoutError:
                error = _Again(f"no answer within {self._endpoint.timeout:g} s")
            except _Again as again:
                error = again
            limited += error.limited
            failed += not error.limited
            if failed > self._endpoint.retries or limited > max(self._endpoint.retries, 1) * _RATE_LIMITED_MORE:
                raise error
            backoff = min(self._endpoint.backoff * 2 ** min(failed + limited - 1, 16), _LONGEST_WAIT)
            wait = max(error.wait or 0.0, backoff * random.uniform(0.5, 1.0))
            if error.limited:
                self._held_until = max(self._held_until, time.monotonic() + wait)
            else:
                await asyncio.sleep(wait)

    async def _post(self, ask: Ask) -> str:
        """One attempt: the body of the answer. Raises `_Again`, `_Refused` or, for what is hopeless, ConfigError."""
        openai = self._openai
        try:
            if self._endpoint.route == "chat":
                logprobs = {"logprobs": True, "top_logprobs": ask.top_logprobs} if ask.top_logprobs else {}
                call = self._client.chat.completions.with_raw_response.create(
                    messages=list(ask.messages), **logprobs, **self._settings(ask)
                )
            else:
                logprobs = {"logprobs": ask.top_logprobs} if ask.top_logprobs else {}
                call = self._client.completions.with_raw_response.create(
                    prompt=plain_text(ask.messages), **logprobs, **self._settings(ask)
                )
            return (await call).http_response.text
        except openai.APIStatusError as error:
            status = error.status_code
            if status in _HOPELESS or error.code == "insufficient_quota":
                raise ConfigError(
                    f"{self._endpoint.url} refuses requests to {self._endpoint.model}: {_said(error)}"
                ) from error
            if status in _TO_TRY_AGAIN or status >= 500:
                raise _Again(
                    _said(error), retry_after(error.response.headers.get("retry-after")), status == 429
                ) from error
            raise _Refused(_said(error)) from error
        except openai.APIConnectionError as error:
            raise _Again(f"{error.__cause__ or error}" or type(error.__cause__).__name__) from error
        except ValueError as error:  # a body that is no text in its own encoding
            raise _Again(f"the answer cannot be read: {error}") from error

    def _settings(self, ask: Ask) -> dict[str, Any]:
        return {
            "model": self._endpoint.model,
            "temperature": ask.temperature,
            "max_tokens": ask.max_tokens,
            "top_p": ask.top_p,
            "seed": ask.seed,
        }


def read_reply(body: str, route: str) -> Reply:
    """The reply in the body of an answer. Raises `_Again` where the body is none: not JSON, cut off, no choices."""
    try:
        values = json.loads(body)
        choice = values["choices"][0]
        text = choice["message"]["content"] if route == "chat" else choice["text"]
        usage = values.get("usage") or {}
        return Reply(
            text=text or "",
            finish=choice.get("finish_reason"),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
            first_token=_first_token(choice.get("logprobs"), route),
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Again(f"the answer is no reply: {body[:80]!r}") from error


def _first_token(logprobs: Any, route: str) -> dict[str, float] | None:
    if not logprobs:
        return None
    if route == "completions":
        alternatives = logprobs.get("top_logprobs") or [None]
        return dict(alternatives[0]) if alternatives[0] else None
    content = logprobs.get("content") or []
    return {each["token"]: float(each["logprob"]) for each in content[0].get("top_logprobs", [])} if content else None


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks to wait, given as a number or as a date; None where it says nothing."""
    if not header:
        return None
    try:
        return max(float(header), 0.0)
    except ValueError:
        parsed = email.utils.parsedate_tz(header)
        return max(email.utils.mktime_tz(parsed) - time.time(), 0.0) if parsed else None


def _said(error: Any) -> str:
    """Status and message of an error that the other side sent, in one line."""
    body = error.body if isinstance(error.body, dict) else {}
    message = body.get("message") or (body.get("error") if isinstance(body.get("error"), str) else None)
    message = message or error.response.reason_phrase
    return f"{error.status_code} {' '.join(str(message).split())[:200]}"
