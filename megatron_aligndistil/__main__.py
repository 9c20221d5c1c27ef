"""The command line: ``aligndistil COMMAND ...`` or ``python -m megatron_aligndistil COMMAND ...``."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import time
import traceback
from typing import Any

from megatron_aligndistil.commands.launch import GRACE_SECONDS
from megatron_aligndistil.errors import AlignDistilError, ConfigError

COMMANDS = {
    "train": "train one stage: SFT, DPO, reverse DPO, AlignDistil",
    "pipeline": "run a YAML file of stages, each once",
    "convert": "convert checkpoints between Hugging Face and Megatron",
    "data": "data inspect: records as the model will see them, and what is left out",
    "generate": "sample responses to prompts",
    "serve": "answer OpenAI's completions and chat routes over HTTP",
    "evaluate": "reward accuracy, KL and reward of models; benchmarks with a judge (--suite)",
    "inspect": "responses token by token, on an HTML page",
    "doctor": "what is installed, what will be used, and what to mend",
}

# A file that is not there is no such error: every one that a user names is looked for, with a better sentence.
_USERS_TO_MEND = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS, errno.ENOSPC}
_REPORTED = "aligndistil/errors"  # key of the job's store that counts failures
# Else each process that finds the others gone prints the stack of torch's C++ code. Read when torch is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def usage() -> str:
    """The text of ``--help``."""
    commands = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return f"usage: aligndistil COMMAND [--help] [options]\n\ncommands:\n{commands}\n"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code. User errors become one line on stderr, from one process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise ConfigError(f"there is no command '{arguments[0]}'; commands: {', '.join(COMMANDS)}")
        command = importlib.import_module(f"megatron_aligndistil.commands.{arguments[0]}")
        return command.run(arguments[1:])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        _explain_loss(error)
        if _first_to_report():
            _report(error)
        _leave_job()
        return 1


def _report(error: Exception) -> None:
    """One line for what the user can mend; a traceback for all else."""
    if isinstance(error, AlignDistilError):
        text = str(error)
    elif isinstance(error, OSError) and error.errno in _USERS_TO_MEND:
        text = f"cannot use {error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    else:
        traceback.print_exception(error)
        watch = _watchdog()
        if watch is None:
            return
        text = f"{watch.whereabouts} failed: {type(error).__name__}: {error}"
    print(f"aligndistil: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _first_to_report() -> bool:
    """Whether this process is the first of its job to fail: later errors are mostly echoes of the first one."""
    if _joined():
        try:
            return sys.modules["torch"].distributed.distributed_c10d._get_default_store().add(_REPORTED, 1) == 1
        except RuntimeError:  # the process that held the store has ended, after reporting
            return False
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # The machine's first process has most likely failed too, and whoever started them now ends this one.
        # If not, the error is this process's own.
        time.sleep(1.5 * GRACE_SECONDS)
    return True


def _explain_loss(error: BaseException) -> None:
    """Where a peer has closed its connection and nobody has told why, leave it to the watchdog to find out and end."""
    watch = _watchdog()
    if watch is None or not _is_lost_connection(error):
        return
    try:
        told = watch.num_reported() > 0
    except RuntimeError:  # the process that held the store is gone
        told = False
    if not told:
        watch.explain()


def _is_lost_connection(error: BaseException | None) -> bool:
    """Whether torch, or gloo below it, says that it could not talk to another process, here or in a cause."""
    if error is None:
        return False
    is_torchs = isinstance(error, sys.modules["torch"].distributed.DistError)
    return is_torchs or "gloo/transport" in str(error) or _is_lost_connection(error.__cause__ or error.__context__)


def _watchdog() -> Any:
    """The watchdog of this process, where it is one of a job's."""
    module = sys.modules.get("megatron_aligndistil.engine.watchdog")
    return module.current() if module is not None and _joined() else None


def _joined() -> bool:
    """Whether torch.distributed connects this process with the others of its job."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def _leave_job() -> None:
    """End a process that has failed among others without torch's clean-up, which would wait for them or complain."""
    watch = _watchdog()
    if watch is not None:
        watch.failed()
    if _joined() and sys.modules["torch"].distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
