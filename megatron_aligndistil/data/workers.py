"""Processes that tokenise, for data that one process would be long about."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from megatron_aligndistil.data.examples import DatasetReport, ExampleMaker
from megatron_aligndistil.data.files import Raw
from megatron_aligndistil.data.token_files import TokenArrays
from megatron_aligndistil.errors import DataError

Made = tuple[TokenArrays, DatasetReport]
_PROGRAM = "from megatron_aligndistil.data.workers import serve; serve()"


class _Worker:
    """A process of its own with a copy of an :class:`ExampleMaker`, that is given chunks through a pipe.

    Not a process of ``multiprocessing``: forked, it would share the locks of the libraries' threads; spawned, it would
    run the user's program again; and either would outlive a parent that is killed, where this one sees its input end.
    """

    def __init__(self, maker: ExampleMaker) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._maker: ExampleMaker | None = maker

    def __enter__(self) -> _Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def make(self, chunk: Sequence[Raw]) -> Made:
        """What the maker makes of a chunk. Raises what it raises, and DataError where the process ends."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            if self._maker is not None:
                pickle.dump(self._maker, self._process.stdin)
                self._maker = None
            pickle.dump(list(chunk), self._process.stdin)
            self._process.stdin.flush()
            made, error = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as broken:
            code = self._process.wait()
            raise DataError(
                f"a process that tokenises ended by itself (exit code {code}); where memory ran out, set data.workers "
                f"to fewer"
            ) from broken
        if error is not None:
            raise error
        return made


def make_in_processes(maker: ExampleMaker, chunks: Iterable[Sequence[Raw]], count: int) -> Iterator[Made]:
    """What `maker` makes of each chunk, in their order, in `count` processes; few chunks are in memory at a time."""
    with ExitStack() as stack:
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(count):
            idle.put(stack.enter_context(_Worker(maker)))

        def make(chunk: Sequence[Raw]) -> Made:
            worker = idle.get()
            try:
                return worker.make(chunk)
            finally:
                idle.put(worker)

        threads = stack.enter_context(ThreadPoolExecutor(count))
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        under_way: deque[Future[Made]] = deque()
        for chunk in chunks:
            under_way.append(threads.submit(make, chunk))
            if len(under_way) > 2 * count:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def serve() -> None:
    """What a worker does: answer chunks with what is made of them, or with the error, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets it too, ends this process
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    try:
        maker: ExampleMaker = pickle.load(requests)
        while True:
            pickle.dump(_answer(maker, pickle.load(requests)), answers)
            answers.flush()
    except (EOFError, BrokenPipeError):
        return


def _answer(maker: ExampleMaker, chunk: Sequence[Raw]) -> tuple[Made | None, Any]:
    try:
        return maker.make(chunk), None
    except Exception as error:  # raised in the parent, in the place of what was asked for
        return None, error
