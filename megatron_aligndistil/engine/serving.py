"""One decoder that answers requests as they come, stepped by all ranks of a job together; no HTTP in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from queue import Empty, SimpleQueue
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_aligndistil.engine.completions import Finish, Sampling
from megatron_aligndistil.engine.decoder import Decoder, Request

# How long the first rank waits for a request before it tells the others that there is none: often enough that no
# collective times out, seldom enough that an idle server costs nothing.
_HEARTBEAT_SECONDS = 1.0


class Drawn(NamedTuple):
    """A token drawn for a request, its log-probability in nats at temperature 1, and why the answer ends with it."""

    key: int
    token: int
    logprob: float
    finish: Finish | None


@dataclass
class _Orders:
    """What changes before the next step: requests that join, keys of those that leave, whether to end."""

    joining: list[Request] = field(default_factory=list)
    leaving: list[int] = field(default_factory=list)
    end: bool = False


class Serving:
    """Steps a decoder for as long as the server lives. Made by all ranks of the job together.

    Requests enter at the first rank, from any thread; before each step it tells the others what joins and what leaves,
    over a gloo group of its own, so that the devices' collectives are left to the model. What is drawn depends on
    weights, prompt and settings alone, not on what else is answered at the time.

    Args:
        stop_tokens: tokens that end an answer.
    """

    def __init__(self, decoder: Decoder, stop_tokens: frozenset[int]) -> None:
        self._decoder, self._stop_tokens = decoder, stop_tokens
        self._control = dist.new_group(backend="gloo")
        # Of a kind that may be filled from a signal handler while the same thread takes from it. None ends the server.
        self._inbox: SimpleQueue[Request | int | None] = SimpleQueue()
        self._keys = count()

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        seed: int,
        stream: int,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> int:
        """Ask for an answer to prompt tokens that fit (see `Decoder.add`); returns the key that it will have.

        Settings are those of :class:`Sampling`; `stream` is the number of the random stream under the seed.
        """
        key = next(self._keys)
        sampling = Sampling(max_new_tokens, seed, self._stop_tokens, temperature, top_k, top_p)
        self._inbox.put(Request(key, prompt, sampling, stream))
        return key

    def cancel(self, key: int) -> None:
        """Give up on an answer; tokens of it may still be delivered for a step or two."""
        self._inbox.put(key)

    def end(self) -> None:
        """Let :meth:`run` return on all ranks, with whatever is unfinished. Safe in a signal handler."""
        self._inbox.put(None)

    def meet(self) -> None:
        """Wait until all ranks are here. Collectives: a barrier over the control group."""
        dist.barrier(group=self._control)

    def run(self, deliver: Callable[[list[Drawn]], None]) -> None:
        """Answer until the end; `deliver` gets, on the first rank, what each step has drawn.

        Collectives: before each step a broadcast of one number from the first rank over the control group, and two
        more where something joins or leaves; those of the decoder. Raises what the decoder raises, and RuntimeError
        where another rank is gone.
        """
        decoder, is_first = self._decoder, dist.get_rank() == 0
        with decoder.cache.attached():
            while not (orders := self._agree()).end:
                for request in orders.joining:
                    decoder.add(request)
                for key in orders.leaving:
                    decoder.cancel(key)
                if decoder.is_idle:
                    continue
                drawn = decoder.step()
                if is_first:
                    deliver([Drawn(each.key, each.tokens[-1], each.logprobs[-1], each.finish) for each in drawn])

    def _agree(self) -> _Orders:
        """The first rank's orders, on every rank."""
        orders = self._collect() if dist.get_rank() == 0 else _Orders()
        any_1 = torch.tensor([orders != _Orders()], dtype=torch.int32, device="cpu")
        dist.broadcast(any_1, src=0, group=self._control)
        if any_1.item():
            told = [orders]
            dist.broadcast_object_list(told, src=0, group=self._control)
            (orders,) = told
        return orders

    def _collect(self) -> _Orders:
        """All that has come in; where there is nothing else to do, waits a moment for something to come."""
        orders = _Orders()
        wait = self._decoder.is_idle
        while not orders.end:
            try:
                order = self._inbox.get(wait, _HEARTBEAT_SECONDS)
            except Empty:
                break
            wait = False
            if order is None:
                orders.end = True
            elif isinstance(order, int):
                orders.leaving.append(order)
            else:
                orders.joining.append(order)
        return orders
