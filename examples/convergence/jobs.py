"""The runs of the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER, MODELS = Path("runs/convergence"), Path("runs/demo")
CONFIGS = "examples/convergence"


@dataclass(frozen=True)
class Method:
    """One way to use the reward: its name for people, its pipeline, and what tells it from others of that pipeline."""

    label: str
    config: str
    options: tuple[str, ...] = ()


METHODS = {
    "distribution": Method("distribution, token level", "distribution.yaml"),
    "token": Method("scalar, token level", "reinforce.yaml", ("--vars.level", "token")),
    "sentence": Method("scalar, sentence level", "reinforce.yaml", ("--vars.level", "sentence")),
}


@dataclass(frozen=True)
class Run:
    """One training run with the samples and the KL of its policy."""

    method: str
    batch: int
    steps: int
    lr: float
    seed: int

    @property
    def folder(self) -> Path:
        return FOLDER / f"batch{self.batch}" / self.method / f"lr{self.lr:g}-seed{self.seed}"

    @property
    def arguments(self) -> list[str]:
        """Arguments of ``aligndistil pipeline``."""
        method = METHODS[self.method]
        given = {"batch": self.batch, "steps": self.steps, "lr": f"{self.lr:g}", "seed": self.seed}
        variables = [part for name, value in given.items() for part in (f"--vars.{name}", str(value))]
        return ["--config", f"{CONFIGS}/{method.config}", "--dir", str(self.folder), *method.options, *variables]

    @property
    def work(self) -> float:
        """How long it takes, in no unit: a start, then steps."""
        return 20 + self.steps * self.batch / 64

    @property
    def leftovers(self) -> tuple[Path, ...]:
        """The policy has been exported: what is left there only serves to go on training it."""
        return (self.folder / "train" / "checkpoints",)
