"""What clients may ask for: the bodies of OpenAI's completions and chat routes, checked parameter by parameter.

A parameter that would change the answer and is not offered is an error unless its value asks for nothing; those that
only serve OpenAI's own book-keeping are accepted and have no effect. null is the same as leaving a parameter out.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from megatron_aligndistil.commands.http.errors import ApiError, bad_request

_WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "parallel_tool_calls",
}
_NOT_OFFERED: dict[str, list[Any]] = {  # with the values that ask for nothing
    "presence_penalty": [0],
    "frequency_penalty": [0],
    "repetition_penalty": [1],
    "min_p": [0],
    "logit_bias": [{}],
    "best_of": [1],
    "suffix": [""],
    "response_format": [{"type": "text"}],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "modalities": [["text"]],
    "audio": [],
    "prediction": [],
    "reasoning_effort": ["none"],
    "verbosity": [],
    "web_search_options": [],
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class GenerationRequest(_Body):
    """What both routes take."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def new_tokens(self) -> int | None:
        """How many tokens an answer may have, if the client says so."""
        return self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        raise NotImplementedError


def _prompts(value: Any) -> list[str | list[int]]:
    """A prompt or several, each a text or tokens, as a list."""
    prompts = [value] if isinstance(value, str) or _is_tokens(value) else value
    if (
        not isinstance(prompts, list)
        or not prompts
        or not all(isinstance(each, str) or _is_tokens(each) for each in prompts)
    ):
        raise ValueError("a prompt is a text, a list of texts, a list of token ids, or a list of such lists")
    return prompts


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(type(token) is int for token in value)


def _only_chosen(value: int) -> int:
    if value not in (0, 1):
        raise ValueError("log-probabilities are given for the tokens of the answer, not for others; ask for 0 or 1")
    return value


def _no_others(value: int) -> int:
    if value:
        raise ValueError("log-probabilities are given for the tokens of the answer, not for others; ask for 0")
    return value


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    echo: bool = False
    logprobs: Annotated[int, AfterValidator(_only_chosen)] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


def _text_of(content: Any) -> Any:
    """The text of a message that is given in parts."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise ValueError("this model reads text only; every part of a message's content is of type text")
    return "".join(str(part.get("text", "")) for part in content)


class Message(BaseModel):
    """One message; what else it holds is for the chat template."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    role: str
    content: Annotated[str | None, BeforeValidator(_text_of)] = None


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: Annotated[int, AfterValidator(_no_others)] = 0

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs


RequestT = TypeVar("RequestT", bound=GenerationRequest)


def parse(schema: type[RequestT], body: bytes, served: str) -> RequestT:
    """The request in `body`, for the model that is `served`. Raises ApiError naming the parameter that is wrong."""
    try:
        values = json.loads(body)
    except ValueError as error:  # no JSON, or no UTF-8
        raise bad_request(f"the request's body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise bad_request("the request's body is not a JSON object")
    try:
        request = schema.model_validate(_understood(values))
    except ValidationError as error:
        raise _explain(error) from None
    if request.model != served:
        message = f"there is no model '{request.model}' here; this server has '{served}'"
        raise ApiError(404, message, param="model", code="model_not_found")
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options has a meaning only together with stream", "stream_options")
    return request


def _understood(values: dict[str, Any]) -> dict[str, Any]:
    """Without what asks for nothing. Raises ApiError for what is known and not offered."""
    kept = {}
    for name, value in values.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name not in _NOT_OFFERED:
            kept[name] = value
        elif value not in _NOT_OFFERED[name]:
            raise bad_request(f"{name} is not offered by this server; leave it out", name, "unsupported_parameter")
    return kept


def _explain(error: ValidationError) -> ApiError:
    """The first thing that is wrong."""
    problem = error.errors()[0]
    param = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return bad_request(f"the request needs {param}", param, "missing_required_parameter")
    if problem["type"] == "extra_forbidden":
        return bad_request(f"{param} is not a parameter that this server knows", param, "unknown_parameter")
    cause = problem.get("ctx", {}).get("error")
    message = str(cause) if cause else str(problem["msg"])
    given = "" if cause else f" (given: {json.dumps(problem['input'], default=str)[:60]})"
    return bad_request(f"{param}: {message[0].lower()}{message[1:]}{given}", param, "invalid_value")
