"""The reward of what a model wrote: the demo's known one, or what a judge says that was trained on other data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from records import read_json, read_jsonl, write_json
from reward import reward


class Scorer:
    """Rewards of samples; what a judge says is kept beside the samples.

    Args:
        judge: Hugging Face folder of a sequence classification model with one label; None for the known reward.
        device: where the judge runs.
    """

    def __init__(self, judge: str | None = None, device: str = "cpu") -> None:
        self._folder, self._device = judge, device

    def rewards(self, folder: Path, prompts: str) -> list[float]:
        """The reward of every response in samples.jsonl of `folder`, which answers those of the file `prompts`."""
        if self._folder is None:
            return [reward(sample["response"]) for sample in read_jsonl(folder / "samples.jsonl", ("response",))]
        kept = folder / "judged.json"
        if not kept.is_file() or read_json(kept)["judge"] != self._folder:
            samples = read_jsonl(folder / "samples.jsonl", ("index", "response"))
            asked = _prompts(prompts)
            scores = [self._judge.score(asked[sample["index"]], sample["response"]) for sample in samples]
            write_json(kept, {"judge": self._folder, "scores": scores})
        return read_json(kept)["scores"]

    @cached_property
    def _judge(self) -> Judge:
        assert self._folder is not None
        return Judge(self._folder, self._device)


class Judge:
    """A reward model that transformers runs."""

    def __init__(self, folder: str, device: str) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.bfloat16 if device.startswith("cuda") else torch.float32
        ).to(device)
        if self._model.config.num_labels != 1:
            raise SystemExit(f"{folder} has {self._model.config.num_labels} labels; a judge has one, its score")

    def score(self, prompt: str | Sequence[Any], response: str) -> float:
        """The score of one response; one at a time, so that padding plays no part."""
        import torch

        ids = torch.tensor([self._tokens(prompt, response)], device=self._model.device)
        with torch.inference_mode():
            return float(self._model(input_ids=ids).logits[0, 0])

    def _tokens(self, prompt: str | Sequence[Any], response: str) -> list[int]:
        if self._tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            messages += [{"role": "assistant", "content": response}]
            text = self._tokenizer.apply_chat_template(messages, tokenize=False)
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not isinstance(prompt, str):
            prompt = "\n\n".join(message["content"] for message in prompt) + "\n\n"
        joined = self._tokenizer(prompt + response)["input_ids"]
        end = self._tokenizer.eos_token_id
        return joined if end is None or joined[-1] == end else [*joined, end]


def _prompts(file: str) -> list[Any]:
    """The prompts of a file in their order, none of them empty: texts, or lists of messages."""
    from megatron_aligndistil.data.forms import read_turns
    from megatron_aligndistil.data.records import load_records

    return [read_turns(record, "prompts")[0].prompt for record in load_records(file)]
