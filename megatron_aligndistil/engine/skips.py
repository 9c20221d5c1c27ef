"""Updates left out because a loss or gradient was not finite: counted, told, and in the end too many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Skips:
    """Skipped updates of one model: in all, and since the last that was made.

    A checkpoint keeps both, so that a run that is killed and resumed stops where one never killed would.
    """

    total: int = 0
    in_a_row: int = 0

    def count(self, skipped: bool) -> None:
        """One more step, and whether its update was left out."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    def state(self) -> dict[str, int]:
        return asdict(self)

    def load(self, state: Mapping[str, int] | None) -> None:
        """Take over a :meth:`state`; None, of a checkpoint from before there was any, is as good as zeros."""
        self.total, self.in_a_row = (state["total"], state["in_a_row"]) if state else (0, 0)


def told(name: str, skips: Skips, step: int, limit: int, rows: Path) -> str:
    """What the user is told of a step (counted from 1) that was skipped."""
    return (
        f"step {step}: the loss or gradient of {name} is not finite and its update was skipped ({skips.in_a_row} in a "
        f"row of at most {limit}, {skips.total} in all); the rows are in {rows}"
    )


def end(names: Sequence[str], limit: int, step: int, num_steps: int, run_dir: str) -> str:
    """What the user is told when more than `limit` updates in a row were skipped, the last at `step` of `num_steps`.

    The checkpoint has the weights from before the first of them and the place in the data after the last, so the same
    command goes on behind the rows that could not be learned on; the count in a row goes on too, so that a model that
    is beyond repair does not eat up the data with every new start.
    """
    before = f", nor at the steps before it, more than {limit} in a row" if limit else ""
    if step == num_steps:
        next_time = "exports the weights as they are, for that was the last step"
    else:
        next_time = f"goes on with step {step + 1} and stops again if that is not finite either"
    return (
        f"the loss or gradient of {' and '.join(names)} was not finite at step {step}{before} (run.max_skipped "
        f"{limit}); no such step changed the weights, which are in {run_dir}/checkpoints, and the rows are in "
        f"{run_dir}/bad_batches: mend them, or lower optim.lr, and train into another run.dir; the same command "
        f"{next_time}"
    )
