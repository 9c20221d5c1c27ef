"""The methods of the paper's tables: their algorithms, what each is tried with, and the runs that this makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Literal

CONFIGS = "examples/paper"
CONSTANTS = (1.0, 1.2, 1.5, 1.8, 2.0)  # β0/β of table 3
BETA0 = 0.1
TUNING_SEED, SEEDS = 0, (1, 2, 3)
FACTOR, EXTENSIONS = 3.0, 1  # beyond an edge of the learning rates where the best one lies: so far, so often at most


@dataclass(frozen=True)
class Own:
    """A method's own hyper-parameter: its key in the algorithm's section, the published value, and others to try."""

    key: str
    published: float
    others: tuple[float, ...]


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Attributes:
        label: its name for people.
        algorithm: the `algorithm` section of its configuration.
        seconds: what a run takes on one core with the demo's model, to say when all will be done.
        own: what is tuned beside the learning rate.
        follows: the method whose chosen settings it takes; it is not tuned itself then.
        trained: what the algorithm calls the model that it trains.
        rows: examples in a batch for one pair.
        updates: optimiser steps on one rollout.
        critic: the model that its critic starts from.
        options: more arguments of the pipeline.
    """

    label: str
    algorithm: Mapping[str, str | float | bool]
    seconds: float
    own: Own | None = None
    follows: str | None = None
    trained: str = "policy"
    rows: int = 1
    updates: int = 1
    critic: Literal["initial", "reward"] = "initial"
    options: tuple[str, ...] = ()


def _beta() -> Own:
    return Own("beta", 0.1, (0.3,))


# Published values: the paper's, or where it has none ("to tune") that of the method's own authors. A rollout of PPO
# and RTO serves several steps, as the paper's of 1,024 responses does; clipping means nothing otherwise.
METHODS: dict[str, Method] = {
    "dpo": Method("DPO", {"name": "dpo"}, 75, _beta(), trained="dpo"),
    "kto": Method("KTO", {"name": "kto"}, 85, _beta(), rows=2),
    "tdpo1": Method("TDPO1", {"name": "tdpo", "variant": "tdpo1"}, 80, _beta()),
    "tdpo2": Method("TDPO2", {"name": "tdpo", "variant": "tdpo2"}, 80, Own("alpha", 0.5, (1.0,))),
    "simpo": Method("SimPO", {"name": "simpo", "gamma_beta_ratio": 0.5}, 60, Own("beta", 2.5, (10.0,))),
    "ppo": Method("PPO", {"name": "ppo", "reward": "model"}, 95, Own("kl", 0.01, (0.07,)), updates=4, critic="reward"),
    "rto": Method("RTO", {"name": "rto", "terminal": "none"}, 95, Own("beta2", 0.01, (0.07,)), updates=4),
    "rto_terminal": Method(
        "RTO, terminal reward",
        {"name": "rto", "terminal": "model"},
        95,
        Own("beta2", 0.01, (0.07,)),
        updates=4,
        critic="reward",
    ),
    "off_policy": Method("AlignDistil, off-policy", {"name": "aligndistil"}, 52, Own("r", 10.0, (2.0,))),
    "on_policy": Method(
        "AlignDistil, on-policy", {"name": "aligndistil", "on_policy": True}, 65, Own("r", 10.0, (2.0,))
    ),
    "ppo_known": Method(
        "PPO on the known reward (upper bound)",
        {"name": "ppo", "reward": "function"},
        90,
        Own("kl", 0.01, ()),
        follows="ppo",
        updates=4,
        options=("--defaults.rollout.reward", "examples/demo/reward.py:rewards"),
    ),
    "vanilla": Method(
        "AlignDistil, off-policy, DPO reward",
        {"name": "aligndistil", "teacher": "vanilla_adaptive"},
        52,
        Own("r", 10.0, ()),
        follows="off_policy",
    ),
    **{
        f"constant_{constant:g}": Method(
            f"constant {constant:g}",
            {"name": "aligndistil", "teacher": "contrastive", "beta0": BETA0, "beta": BETA0 / constant},
            52,
            follows="off_policy",
        )
        for constant in CONSTANTS
    },
}
TABLE_1 = (
    "dpo",
    "kto",
    "tdpo1",
    "tdpo2",
    "simpo",
    "ppo",
    "rto",
    "rto_terminal",
    "off_policy",
    "on_policy",
    "ppo_known",
)
TABLE_4 = ("dpo", "ppo", "rto", "off_policy", "on_policy")  # their order in the paper
NEED_REWARD_MODEL = ("ppo", "rto_terminal")
NEED_KNOWN_REWARD = ("ppo_known",)


@dataclass(frozen=True)
class Setting:
    """What all runs start from and are measured by.

    Attributes:
        folder: for all that is made.
        variables: `vars` of the pipelines that are the same for every run; `initial`, `dpo`, `reverse`, `train` among
            them.
        validation: prompts that settings are chosen by.
        test: prompts that the tables speak of.
        rates: learning rates to try, of every method alike.
        critic_lr: the learning rate of critics.
        judge: sequence classification model that gives the reward; none where the demo's reward is known.
        options: more arguments of every pipeline.
    """

    folder: Path
    variables: Mapping[str, str]
    validation: str
    test: str
    rates: tuple[float, ...]
    critic_lr: float
    judge: str | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One training run and what its policy writes: to the validation prompts to choose settings by, or the test ones.

    Attributes:
        method: name in METHODS, or "reward".
        own: value of the method's own hyper-parameter.
        final: whether it counts for the tables.
    """

    method: str
    lr: float
    own: float | None
    seed: int
    final: bool
    folder: Path
    arguments: list[str] = field(compare=False)

    @property
    def work(self) -> float:
        return METHODS[self.method].seconds if self.method in METHODS else 65

    @property
    def leftovers(self) -> tuple[Path, ...]:
        """What only serves to go on training, and the models of runs that others were chosen over, or may be."""
        train = self.folder / "train"
        models = () if self.final or self.method not in METHODS else (train / METHODS[self.method].trained,)
        return (train / "checkpoints", train / "critic", *models)


class Runs:
    """Makes the runs of one setting; `reward` is the folder of the reward model, once there is one."""

    def __init__(self, setting: Setting, reward: str | None = None) -> None:
        self.setting, self.reward = setting, reward

    def of(self, method: str, lr: float, own: float | None, seed: int, final: bool) -> Run:
        """A run of one of METHODS."""
        described, given = METHODS[method], self.setting.variables
        variables = {
            **given,
            "batch": int(given["batch"]) * described.rows,
            "micro": int(given["micro"]) * described.rows,
            "updates": described.updates,
            "trained": described.trained,
            "prompts": self.setting.test if final else self.setting.validation,
            "reward": self.reward or given["initial"],
            "critic": (self.reward if described.critic == "reward" else None) or given["initial"],
        }
        algorithm = dict(described.algorithm)
        if described.own and own is not None:
            algorithm[described.own.key] = own
        if algorithm["name"] in ("ppo", "rto"):
            algorithm["critic_lr"] = self.setting.critic_lr
        options = [part for key, value in algorithm.items() for part in (f"--defaults.algorithm.{key}", _text(value))]
        return self._run(method, "method.yaml", lr, own, seed, final, variables, [*options, *described.options])

    def of_reward(self, lr: float) -> Run:
        """A run of the reward model."""
        return self._run("reward", "reward.yaml", lr, None, TUNING_SEED, False, self.setting.variables, [])

    def _run(
        self,
        method: str,
        config: str,
        lr: float,
        own: float | None,
        seed: int,
        final: bool,
        variables: Mapping[str, object],
        options: list[str],
    ) -> Run:
        named = "" if own is None else f"{METHODS[method].own.key}{own:g}-"
        folder = self.setting.folder / "runs" / method / f"{named}lr{lr:g}-{'seed' if final else 'tuning'}{seed}"
        given = {**variables, "lr": _text(lr), "seed": seed}
        arguments = ["--config", f"{CONFIGS}/{config}", "--dir", str(folder)]
        arguments += [part for name, value in given.items() for part in (f"--vars.{name}", str(value))]
        return Run(method, lr, own, seed, final, folder, [*arguments, *options, *self.setting.options])


def _text(value: str | float | bool) -> str:
    """As YAML reads it back; 1e-05 would be a text there."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str) else format(Decimal(repr(value)), "f")
