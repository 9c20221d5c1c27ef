"""One step by TRL's own trainers on a transformers model, in fp32.

TRL takes seconds to import: it is imported where it is first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.engine.dense import Record
from tests.parity.steps import Step

# For every TRL trainer's configuration: fp32 on the CPU, and nothing written.
ARGUMENTS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "max_length": 256,
}


def load(folder: Path, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """A transformers model in fp32, as TRL's trainers take it; `kind` is the auto class."""
    return kind.from_pretrained(folder, dtype="float32", attn_implementation="sdpa")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The word-level tokenizer; for a Qwen2 model, AutoTokenizer would make one that adds a token for padding."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def dataset(**columns: Any) -> Any:
    """A data set to make a trainer with; what is measured goes to :func:`step` as tokens."""
    from datasets import Dataset

    return Dataset.from_dict(columns)


PAIR = {"prompt": ["w3"], "chosen": [" w4"], "rejected": [" w5"]}


def step(trainer: Any, examples: Sequence[Any]) -> Step:
    """Loss, metrics (the loss's is "loss") and gradients of a TRL trainer's own `compute_loss` on one batch.

    `examples` are what the trainer's data set would hold after tokenisation, and are collated by its own collator.
    """
    model = trainer.model.train()
    model.zero_grad()
    kept = trainer._stored_metrics if hasattr(trainer, "_stored_metrics") else trainer._metrics
    kept["train"].clear()
    loss = trainer.compute_loss(model, trainer._prepare_inputs(trainer.data_collator(list(examples))))
    loss.backward()
    metrics = {name: float(values[-1]) for name, values in kept["train"].items()}
    grads: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grads[name] = parameter.grad.clone()
    return Step({**metrics, "loss": float(loss.detach())}, grads)


def mean_steps(trainer: Any, examples: Sequence[Any]) -> Step:
    """The mean over batches of one example each, for losses that TRL does not average over pairs."""
    steps = [step(trainer, [example]) for example in examples]
    count = len(steps)
    return Step(
        {name: sum(each.metrics[name] for each in steps) / count for name in steps[0].metrics},
        {name: torch.stack([each.grads[name] for each in steps]).mean(0) for name in steps[0].grads},
    )


def dpo_trainer(folder: Path, out: Path, **settings: Any) -> Any:
    """A DPOTrainer of `folder`/policy with `folder`/reference; `settings` go to its configuration."""
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=load(folder / "policy"),
        ref_model=load(folder / "reference"),
        args=DPOConfig(str(out), **ARGUMENTS, **settings),
        train_dataset=dataset(**PAIR),
        processing_class=load_tokenizer(folder / "policy"),
    )


def dpo_examples(records: Sequence[Record]) -> list[dict[str, list[int]]]:
    """Pairs of tokens as DPOTrainer's data set holds them."""
    names = {"prompt_ids": "prompt_tokens", "chosen_ids": "chosen_tokens", "rejected_ids": "rejected_tokens"}
    return [{ours: record[theirs] for ours, theirs in names.items()} for record in records]


def cpo_trainer(folder: Path, out: Path, **settings: Any) -> Any:
    """A CPOTrainer of `folder`/policy, which is where TRL keeps SimPO."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return CPOTrainer(
        model=load(folder / "policy"),
        args=CPOConfig(str(out), **ARGUMENTS, **settings),
        train_dataset=dataset(**PAIR),
        processing_class=load_tokenizer(folder / "policy"),
    )


def cpo_examples(records: Sequence[Record]) -> list[dict[str, list[int]]]:
    """Pairs of tokens as CPOTrainer's data set holds them."""
    found = []
    for record in records:
        prompt = record["prompt_tokens"]
        example = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for name in ("chosen", "rejected"):
            response = record[f"{name}_tokens"]
            example |= {
                f"{name}_input_ids": prompt + response,
                f"{name}_attention_mask": [1] * len(prompt + response),
                f"{name}_labels": [-100] * len(prompt) + response,
            }
        found.append(example)
    return found
