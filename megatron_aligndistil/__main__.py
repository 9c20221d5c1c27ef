"""The command line: ``aligndistil COMMAND ...`` or ``python -m megatron_aligndistil COMMAND ...``."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

from megatron_aligndistil.errors import AlignDistilError, ConfigError

COMMANDS = {
    "train": "train one stage: SFT, DPO, reverse DPO, AlignDistil",
    "pipeline": "run a YAML file of stages, each once",
    "convert": "convert checkpoints between Hugging Face and Megatron",
    "generate": "sample responses to prompts",
    "evaluate": "reward accuracy and KL of models on a dataset",
    "doctor": "what is installed, what will be used, and what to mend",
}


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
    except AlignDistilError as error:
        if _first_to_report():
            print(f"aligndistil: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception:
        if _first_to_report():
            traceback.print_exc()
        return 1


def _first_to_report() -> bool:
    """Whether this process is the first of its job to fail: later errors are mostly echoes of the first one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        try:
            return torch.distributed.distributed_c10d._get_default_store().add("aligndistil/errors", 1) == 1
        except RuntimeError:  # the process that held the store has ended, after reporting
            return False
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
