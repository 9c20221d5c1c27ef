"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from megatron_aligndistil.algorithms.base import Algorithm, Frozen, LossOutput
from megatron_aligndistil.config import Section
from megatron_aligndistil.data.batch import Responses
from megatron_aligndistil.ops.head import LMHead
from megatron_aligndistil.ops.logprobs import label_logprobs


class SFTConfig(Section):
    name: Literal["sft"] = "sft"
    """Supervised fine-tuning on single responses."""


class SFT(Algorithm):
    name = "sft"
    Config = SFTConfig
    data = "responses"

    def loss(self, model: str, head: LMHead, responses: Responses, frozen: Mapping[str, Frozen]) -> LossOutput:
        """L = -mean log π_θ(y_t), every response token weighing the same. Counted in tokens.

        In nats: perplexity is its exponential.
        Collectives: those of :func:`label_logprobs`.
        """
        logprobs_T, _ = label_logprobs(head, responses.targets_T)
        count = responses.lengths_B.sum()
        return LossOutput(-logprobs_T.sum(), count)
