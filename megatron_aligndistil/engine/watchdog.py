"""Notices when a process of the job is gone, or none gets on any more, says so once, and ends all of them.

gloo notices a closed connection; nccl does not, and neither notices a machine that has vanished. So a thread of every
process writes a heartbeat into the job's store, through a connection of its own that no collective blocks. Rank 0 reads
them all, the others read rank 0's and a verdict, and end when there is one. What that costs the store in one interval:
two requests a process (`set`, and a `multi_get` of two keys), and one `multi_get` of all heartbeats, about 200 bytes
each: with 4,096 processes and 3 seconds, some 2,700 small requests a second, and 800 KB in one answer, besides one more
connection a process (the open files of the process that holds the store are limited by `ulimit -n`).

Clocks are not compared: rank 0 counts how long a heartbeat has not changed. A thread needs Python's lock to write one,
which torch gives up in its operations and collectives; `patience` is longer than anything else here keeps it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta

import torch.distributed as dist

from megatron_aligndistil.engine import standing
from megatron_aligndistil.engine.standing import Standing

REPORTED = "aligndistil/errors"  # key of the job's store that counts the failures that have been told
_VERDICT, _OVER = "aligndistil/verdict", "aligndistil/over"
_TELL_WHERE = "tell where you stand"
_GO_ON = "the same command goes on from the last checkpoint"
_LOST_SECONDS = 10.0  # how long whoever started the processes has, once the store is gone, to say why and end them
_STACKS_SECONDS = 15.0


class Watchdog:
    """Watches the job from a thread of this process, and is watched.

    Arguments:
        store: the job's store; cloned, so that there is a connection for this alone.
        interval: seconds between heartbeats.
        patience: seconds of silence after which a process, or the store, is taken to be gone.
        end: ends this process, whatever its other threads are doing.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        *,
        interval: float = 3.0,
        patience: float = 30.0,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]  # missing in torch's stubs
        self._store.set_timeout(timedelta(seconds=patience))
        self._rank, self._world_size = rank, world_size
        self._interval, self._patience, self._end = interval, patience, end
        self._mark = (0, 0, "set-up")  # marks so far, step, place
        self._beat = self._ticks = 0
        self._left = self._closing = self._urgent = self._ending = False
        self._hang_timeout = 0.0
        self._known: dict[int, Standing] = {}
        self._silent: dict[int, float] = {}
        self._idle = 0.0
        self._lost: str | None = None
        self._wake, self._done = threading.Event(), threading.Event()
        if rank == 0:
            self._store.set(_VERDICT, "")
        self._say()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._watch, self._guard)]
        for thread in self._threads:
            thread.start()

    def at(self, step: int, place: str) -> None:
        """This process begins something: `place` of a step counted from 1. Costs no more than an assignment."""
        self._mark = (self._mark[0] + 1, step, place)

    @contextmanager
    def expect_progress(self, seconds: float) -> Iterator[None]:
        """Inside, all processes stand still together for `seconds` at most; 0 waits for ever."""
        self._idle, self._hang_timeout = 0.0, seconds
        try:
            yield
        finally:
            self._hang_timeout = 0.0

    def failed(self) -> None:
        """This process ends with an error that has been told; the others are to end too."""
        with suppress(RuntimeError):  # without the store, they find out by themselves
            self._store.compare_set(_VERDICT, "", "another process has failed")

    def explain(self) -> None:
        """A peer has closed its connection: wait until it is known which, and why; ends this process then.

        Returns where nothing is found out.
        """
        self._urgent = True
        self._wake.set()
        time.sleep(self._patience + _LOST_SECONDS)

    @property
    def whereabouts(self) -> str:
        """Which process this is, and what it is doing."""
        marks, step, place = self._mark
        mine = Standing.here(self._beat, marks, step, place, self._left)
        return f"rank {self._rank} on {mine.host} at {mine.where}"

    def num_reported(self) -> int:
        """How many failures have been told, or would have been, had they been the first. Raises without the store."""
        return self._store.add(REPORTED, 0)

    def closing(self) -> None:
        """From now on the process that holds the store may end at any time."""
        self._closing = True

    def leave(self) -> None:
        """This process has done its work and is watched no longer."""
        self._left = self._closing = True
        self._wake.set()
        self._done.set()
        for thread in self._threads:
            thread.join(1.0)

    def _pause(self) -> float:
        """Until the next heartbeat; returns how long that was, not counting time in which this process itself slept."""
        seconds = min(self._interval, 0.5) if self._urgent else self._interval
        began = time.monotonic()
        self._wake.wait(seconds)
        self._wake.clear()
        return min(time.monotonic() - began, 2 * seconds)

    def _watch(self) -> None:
        """The thread that talks to the store."""
        try:
            while not self._left:
                passed = self._pause()
                self._say()
                self._look(passed)
                self._ticks += 1
            self._say()
        except RuntimeError as error:  # torch's errors of the store are
            if self._ending:
                self._end(1)
            self._lost = str(error)

    def _guard(self) -> None:
        """The thread that does not: a store that is gone without a word may keep a call for many minutes."""
        quiet, seen = 0.0, -1
        while not self._done.wait(0.2):
            quiet = quiet + 0.2 if self._ticks == seen else 0.0
            seen = self._ticks
            if self._ending:
                return
            if self._lost is not None and quiet > min(_LOST_SECONDS, self._patience):
                self._store_is_gone(f"is gone ({self._lost.splitlines()[0]})")
            elif quiet > self._patience + self._interval:
                self._store_is_gone(f"has not answered for {quiet:.0f} s")

    def _say(self) -> None:
        self._beat += 1
        marks, step, place = self._mark
        mine = Standing.here(self._beat, marks, step, place, self._left)
        self._store.set(_beat_of(self._rank), json.dumps(mine.state()))

    def _look(self, passed: float) -> None:
        """Read what others say and judge it; `passed` is the time since the last look."""
        watched = range(self._world_size) if self._rank == 0 else range(1)
        keys = {_VERDICT: -1} | {_beat_of(rank): rank for rank in watched}
        if len(self._known) < len(watched) and not self._store.check(list(keys)):
            # Not all have begun, and a `multi_get` would wait for them.
            keys = {key: rank for key, rank in keys.items() if self._store.check([key])}
        said = dict(zip(keys.values(), self._store.multi_get(list(keys)) if keys else [], strict=True))
        if verdict := said.pop(-1, b"").decode():
            self._obey(verdict)
        moved = [self._take_in(rank, Standing(**json.loads(text))) for rank, text in said.items()]
        self._idle = 0.0 if any(moved) else self._idle + passed
        for rank in watched:
            self._judge(rank, passed)
        if self._rank == 0 and self._hang_timeout and self._idle > self._hang_timeout:
            self._condemn(_TELL_WHERE)
            self._show_standings()

    def _take_in(self, rank: int, now: Standing) -> bool:
        """Note what a process says; returns whether it has got on since the last look."""
        before = self._known.get(rank)
        self._known[rank] = now
        if before is None or before.beat != now.beat:
            self._silent[rank] = 0.0
        return before is None or before.marks != now.marks

    def _judge(self, rank: int, passed: float) -> None:
        known = self._known.get(rank)
        if rank == self._rank or (known is not None and known.left):
            return
        silence = self._silent[rank] = self._silent.get(rank, 0.0) + passed
        suspicious = self._urgent or silence > 2.5 * self._interval
        if suspicious and known is not None and known.has_ended:
            self._condemn(f"{_seen(rank, known, silence)} has ended without a word; {_GO_ON}")
        elif silence > self._patience:
            self._condemn(f"{_seen(rank, known, silence)} says nothing: its process or machine is gone; {_GO_ON}")

    def _condemn(self, text: str) -> None:
        """End the job for this reason, unless there is another already."""
        self._ending = True
        verdict = self._store.compare_set(_VERDICT, "", text).decode()
        if verdict != text:
            self._obey(verdict)
        if text != _TELL_WHERE:
            self._tell(text)
            time.sleep(2 * self._interval)  # for the others to read it, while this process may hold the store
            self._end(1)

    def _obey(self, verdict: str) -> None:
        self._ending = True
        if verdict == _TELL_WHERE:
            self._store.set(_stack_of(self._rank), standing.stack_here())
            deadline = time.monotonic() + 2 * _STACKS_SECONDS
            while time.monotonic() < deadline and not self._store.check([_OVER]):
                time.sleep(0.5)
        self._end(1)

    def _show_standings(self) -> None:
        stacks = {0: standing.stack_here()}
        keys = {_stack_of(rank): rank for rank, known in self._known.items() if rank and not known.left}
        deadline = time.monotonic() + max(_STACKS_SECONDS, 2 * self._interval)
        while keys and not self._store.check(list(keys)) and time.monotonic() < deadline:
            time.sleep(0.5)
        for key, rank in keys.items():
            if self._store.check([key]):
                stacks[rank] = self._store.get(key).decode()
        self._tell(
            f"no process has got on for {self._idle:.0f} s (run.hang_timeout), so the run ends; {_GO_ON}; where each "
            f"stands:\n{standing.table(self._known, stacks)}"
        )
        self._store.set(_OVER, "1")
        time.sleep(1.0)
        self._end(1)

    def _store_is_gone(self, how: str) -> None:
        if self._closing:
            return
        # Nobody can say who tells it: the first of each machine does, and rank 1, where rank 0 may be what is gone.
        if os.environ.get("LOCAL_RANK", "0") == "0" or self._rank == 1:
            known = self._known.get(0)
            last = f", last seen at {known.where}" if known and self._rank else ""
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            _print(
                f"the store of the job at {place}, on the machine of rank 0{last}, {how}: that machine or process is "
                f"gone, or the network to it; {_GO_ON}"
            )
        self._end(1)

    def _tell(self, text: str) -> None:
        if self._store.add(REPORTED, 1) == 1:
            _print(text)


def _beat_of(rank: int) -> str:
    return f"aligndistil/beat/{rank}"


def _stack_of(rank: int) -> str:
    return f"aligndistil/stack/{rank}"


def _seen(rank: int, known: Standing | None, silence: float) -> str:
    if known is None:
        return f"rank {rank}, not seen in {silence:.0f} s,"
    return f"rank {rank} on {known.host}, last seen {silence:.0f} s ago at {known.where},"


def _print(text: str) -> None:
    print(f"aligndistil: {text}", file=sys.stderr, flush=True)


_current: Watchdog | None = None


@contextmanager
def watched(store: dist.Store, rank: int, world_size: int) -> Iterator[None]:
    """Watch the job inside. Collectives, at the end: one barrier over the world.

    After an error among several processes this goes on, until :meth:`Watchdog.failed` or the end of the process.
    """
    global _current
    _current = Watchdog(store, rank, world_size)
    try:
        yield
    except BaseException as error:
        if world_size == 1 or isinstance(error, SystemExit):  # the latter: an end that was asked for, of all processes
            _leave()
        raise
    # The process that holds the store ends when all have done their work.
    _current.closing()
    dist.barrier()
    _leave()


def _leave() -> None:
    global _current
    if _current is not None:
        _current.leave()
    _current = None


def current() -> Watchdog | None:
    """The watchdog of this process, if it has one."""
    return _current


def at(step: int, place: str) -> None:
    """See :meth:`Watchdog.at`; without one, nothing."""
    if _current is not None:
        _current.at(step, place)


@contextmanager
def expect_progress(seconds: float) -> Iterator[None]:
    """See :meth:`Watchdog.expect_progress`; without one, nothing."""
    with _current.expect_progress(seconds) if _current is not None else nullcontext():
        yield
