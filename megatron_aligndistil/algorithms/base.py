"""What an algorithm is to the engine: the models it needs, the data it reads, and a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from megatron_aligndistil.config import Section
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.ops.head import LMHead

Need = Literal["logprobs", "distribution", "values", "score"]
HeadKind = Literal["lm", "values", "score"]


@dataclass(frozen=True)
class Frozen:
    """What a model says about a micro-batch, without gradient. Which part is present is the algorithm's declaration.

    Attributes:
        head: whole distributions ("distribution").
        logprobs_T: log-probability of each response token, in nats ("logprobs").
        values_T: a scalar model's number at each position ("values").
        score_B: a scalar model's number at each row's last token ("score").
    """

    head: LMHead | None = None
    logprobs_T: Tensor | None = None
    values_T: Tensor | None = None
    score_B: Tensor | None = None


@dataclass(frozen=True)
class Scored:
    """A micro-batch's responses and what models without gradient say about them."""

    responses: Responses
    frozen: Mapping[str, Frozen]


@dataclass(frozen=True)
class LossOutput:
    """A loss as a sum and a count: the engine divides once, by the count over the whole global batch.

    Attributes:
        loss_sum: scalar with gradient; sum over this micro-batch's units (tokens, sequences or pairs).
        count: how many units were summed (a scalar int64 tensor).
        metrics: name -> (sum, count), detached scalars, reduced like the loss.
    """

    loss_sum: Tensor
    count: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def sampled_rewards(responses: Responses, reward_T: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Metrics of a reward on each response token, averaged over responses.

    `reward_sampled` is its sum over a response, and `reward_token` its mean over a response (the token-averaged reward
    of AlignDistil's figure 2).
    """
    num_rows = (responses.lengths_B > 0).sum()
    return {
        "reward_sampled": (reward_T.sum(), num_rows),
        "reward_token": (responses.mean_rows(reward_T).sum(), num_rows),
    }


class Algorithm(ABC):
    """One algorithm. Subclasses live in one file each and never touch process groups or Megatron.

    Attributes:
        name: what `algorithm.name` says in a configuration.
        Config: its settings, with published defaults.
        data: "responses" for single responses, "pairs" for preference pairs, "prompts" for prompts that the policy
            answers itself at each step (on-policy), "unpaired" for single responses rated 1 or 0.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Section]]
    data: Literal["responses", "pairs", "prompts", "unpaired"]

    def __init__(self, config: Any) -> None:
        """`config` is an instance of this class's Config."""
        self.config = config

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the models that are trained together on the same batches.

        Language models start from `models.policy`; those that end in one row from `models.<name>` where that is set.
        """
        return ("policy",)

    @property
    def best(self) -> str:
        """Which evaluation makes a checkpoint the best: `lowest` or `highest`, and the metric."""
        return f"lowest eval/{self.trained[0]}/loss"

    def head(self, model: str) -> HeadKind:
        """What a trained model ends in: an output layer over the vocabulary ("lm"), or one row.

        With one row, `loss` is given a `ScalarHead` at response positions ("values"), or at the last token of
        each row ("score").
        """
        return "lm"

    @property
    def learning_rates(self) -> Mapping[str, float]:
        """Peak learning rates of trained models that do not use `optim.lr`."""
        return {}

    @property
    def frozen(self) -> Mapping[str, Need]:
        """Models without gradient by name ("reference", "dpo", "reverse", "reward") and what is needed of each.

        The name of a trained model asks for what that model says before the update.
        """
        return {}

    @property
    def mismatched(self) -> Mapping[str, Need]:
        """Models without gradient whose word on mismatched rows `prepare` needs, and what of it; none by default.

        They are run on the mismatched rows only, whatever `frozen` says: a trained model (before the update) or one
        that `frozen` names.
        """
        return {}

    @property
    def rated(self) -> bool:
        """Whether a function has to rate what the policy samples (`rollout.reward`), into `responses.ratings_B`."""
        return False

    @property
    def shifted_mask(self) -> bool:
        """Whether the data layer marks the response positions one state late, as the authors' published code does.

        The state that predicts the first response token is then left out, and the one after the last token counts.
        """
        return False

    def prepare(
        self, batches: Sequence[Scored], mismatched: Sequence[Scored], total: Callable[[Tensor], Tensor]
    ) -> Sequence[Mapping[str, Tensor]]:
        """What the loss needs of the whole global batch: `responses.prepared` of each of this rank's micro-batches.

        Runs on the last pipeline stage before any loss of the step.

        Args:
            batches: this data parallel rank's micro-batches, in order, with what the models in `frozen` say.
            mismatched: the same prompts, each with the response of another row of the global batch, with what the
                models in `mismatched` say; empty where that names none.
            total: sums a tensor over data parallel ranks.
        """
        return [{} for _ in batches]

    @abstractmethod
    def loss(self, model: str, head: Any, responses: Responses, frozen: Mapping[str, Frozen]) -> LossOutput:
        """The loss of the trained model named `model` on one micro-batch; `head` is an LMHead, or a ScalarHead.

        Runs on the last pipeline stage, on every tensor parallel rank alike; may issue collectives only on
        ``head.shard.tp_group``. Must give the same total however a batch is cut into micro-batches.
        """
