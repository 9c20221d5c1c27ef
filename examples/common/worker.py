"""Runs one pipeline after another for a Pool (pool.py), in a process that imports torch and Megatron once.

A line of standard input, {"arguments": those of `aligndistil pipeline`, "log": a file for all that it says}, is
answered by a line of standard output, its exit code. Ends with its input, and after a run that failed.
"""

from __future__ import annotations

import json
import os
import sys

from megatron_aligndistil.__main__ import main


def serve() -> None:
    """Do runs until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)
        code = main(["pipeline", *request["arguments"]])
        sys.stdout.flush()
        answers.write(f"{code}\n")
        answers.flush()
        if code:
            return  # what was under way may hold process groups


if __name__ == "__main__":
    serve()
