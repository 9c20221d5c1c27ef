"""``aligndistil serve``: a checkpoint behind HTTP, by OpenAI's completions and chat routes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

from pydantic import Field

from megatron_aligndistil.commands.options import describe, parse, run_on_processes, take, wants_help
from megatron_aligndistil.config import ParallelConfig, PrecisionConfig, Section
from megatron_aligndistil.errors import ConfigError

_USAGE = """usage: aligndistil serve --model PATH [--port PORT] [--nproc N] [--KEY VALUE ...]

Answers OpenAI's POST /v1/completions and /v1/chat/completions, streamed or whole, many requests batched together, and
GET /v1/models and /health. With a seed, the same prompt and settings give the same text whatever else is answered.
Log-probabilities are those of the answer's tokens at temperature 1, in nats. Ctrl-C ends it.

  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"model": "PATH", "prompt": "Once upon a time", "max_tokens": 32, "temperature": 0}'

  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  messages = [{"role": "user", "content": "Hello!"}]
  print(client.chat.completions.create(model="PATH", messages=messages).choices[0].message.content)
"""
_DEFAULT_LENGTH = 4096


class ServeConfig(Section):
    model: str
    """Checkpoint to serve: a Hugging Face folder or a Megatron distributed checkpoint."""
    name: str | None = None
    """What clients call the model; as `model` says when not given."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in, and nothing asks them who they are."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen at; 0 takes a free one."""
    batch_size: int = Field(16, ge=1)
    """Answers in progress at a time. Each keeps room for `max_length` tokens in the key-value cache."""
    max_queue: int = Field(256, ge=0)
    """Answers that may wait for their turn; a request beyond that is refused and told to come again (429)."""
    max_length: int | None = Field(None, ge=2)
    """Longest prompt and answer together, in tokens; 4096, or the model's positions where those are fewer, when not
    given."""
    max_new_tokens: int = Field(512, ge=1)
    """Longest answer in tokens where the client does not say."""
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if wants_help(arguments):
        print(_USAGE + "\nkeys:\n" + describe(ServeConfig))
        return 0
    nproc, rest = take(arguments, "--nproc")
    config = parse(ServeConfig, rest)
    if missing := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        raise ConfigError(
            f"aligndistil serve needs {' and '.join(missing)}; install the extra `serve`: pip install -e '.[serve]'"
        )
    replica = config.parallel.tp * config.parallel.pp
    return run_on_processes("serve", rest, nproc, lambda: replica, lambda: serve(config))


def serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM. On the first rank HTTP lives in a thread; the main threads step the model."""
    import torch.distributed as dist

    from megatron_aligndistil.data.prompts import PromptEncoder
    from megatron_aligndistil.data.tokenizer import load_tokenizer, to_text
    from megatron_aligndistil.data.tokens import stop_ids
    from megatron_aligndistil.engine import checkpoint
    from megatron_aligndistil.engine.decoder import Decoder
    from megatron_aligndistil.engine.frozen import load_frozen
    from megatron_aligndistil.engine.parallel import on_first_rank, parallel_session
    from megatron_aligndistil.engine.serving import Serving

    arch = checkpoint.read_architecture(config.model)
    max_length = _max_length(config, arch.max_positions)
    tokenizer = load_tokenizer(checkpoint.description_folder(config.model))
    as_text = partial(to_text, tokenizer)
    with parallel_session(config.parallel) as parallel:
        _one_replica(config.parallel, parallel.dp)
        place: list[Any] = []  # on the first rank the socket, taken before the model is loaded, which may take minutes
        on_first_rank(_take_place, config.host, config.port, place)
        model = load_frozen(config.model, arch, parallel, config.precision)
        decoder = Decoder(model, parallel, num_rows=config.batch_size, max_length=max_length, to_text=as_text)
        serving = Serving(decoder, stop_ids(tokenizer))
        with _ended_by_signals(serving.end if dist.get_rank() == 0 else lambda: None):
            serving.meet()  # from here on no rank is ended by a signal alone
            if dist.get_rank() == 0:
                _answer(config, max_length, serving, PromptEncoder(tokenizer, arch.vocab_size), as_text, place[0])
            else:
                serving.run(lambda drawn: None)


def _max_length(config: ServeConfig, max_positions: int) -> int:
    if config.max_length is None:
        return min(_DEFAULT_LENGTH, max_positions)
    if config.max_length > max_positions:
        raise ConfigError(
            f"max_length {config.max_length} is more than the model's {max_positions} positions; lower it"
        )
    return config.max_length


def _one_replica(config: ParallelConfig, dp: int) -> None:
    """Raises ConfigError where processes are left over for more replicas of the model."""
    if dp > 1:
        replica = config.tp * config.pp
        raise ConfigError(
            f"{dp * replica} processes make {dp} replicas of the model (tp {config.tp} x pp {config.pp}), and a server "
            f"has one; start one server a replica, each with --nproc {replica} and a --port of its own"
        )


def _take_place(host: str, port: int, place: list[Any]) -> None:
    from megatron_aligndistil.commands.http.server import bind

    place.append(bind(host, port))


def _answer(config: ServeConfig, max_length: int, serving: Any, prompts: Any, as_text: Any, place: Any) -> None:
    """The first rank: HTTP from now until the end, whichever way the end comes."""
    from megatron_aligndistil.commands.http import server
    from megatron_aligndistil.commands.http.answers import Answers
    from megatron_aligndistil.commands.http.app import Served, make_app
    from megatron_aligndistil.commands.http.errors import ApiError

    answers = Answers(serving, config.batch_size + config.max_queue, as_text)
    served = Served(config.name or config.model, max_length, config.max_new_tokens, prompts, as_text)
    http = server.Server(make_app(served, answers), place)
    limits = f"{config.batch_size} rows, prompt and answer up to {max_length} tokens"
    print(f"serving {served.name} at {server.address(place)}: {limits}", flush=True)
    try:
        serving.run(answers.deliver)
        answers.fail(ApiError(503, "the server is ending", code="ending"))
    except Exception:
        answers.fail(ApiError(500, "the engine has failed, and the server ends; its log says more", code="failed"))
        raise
    finally:
        http.close()


@contextmanager
def _ended_by_signals(end: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `end`, and have no other effect on this process."""
    before = {number: signal.signal(number, lambda got, frame: end()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
